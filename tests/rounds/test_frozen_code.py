"""Test that an updated checkout only shows a campaign, and that its frozen code acts on it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.layout import Campaign
from pipeline.rounds import frozen_code
from tests.support.campaigns import changed_byte, fresh_campaign, frozen_campaign, publish, tree
from tests.support.paths import ROOT

UPDATED = "\nimport sys\nprint('the updated checkout is here', file=sys.stderr)\n"


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which every module that looks or acts is another, and says so."""
    copy = tmp_path_factory.mktemp("updated")
    for name in ("pipeline", "constitution", "hydra_conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("rounds/launch", "rounds/freeze", "rounds/control", "rounds/chain", "reporting/status"):
        with open(copy / "pipeline" / f"{name}.py", "a") as module:
            module.write(UPDATED)
    return copy


def typed(checkout: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A command in a checkout; Python writes bytecode, as it does for people."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-m", "pipeline", *map(str, words)]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["rerun", "{}", "a1", "--dry-run"], 0, "would: r0001/a1: again, on this machine"),
        (["cancel", "{}"], 0, "no job of r0001 waits or runs in Slurm"),
        (["pause", "{}"], 0, "the campaign pauses after the running round"),
        (["resume", "{}"], 0, "no round was submitted: campaign.auto is off"),
        (["chain", "{}", "--round", "r0001"], 0, "no round was submitted: campaign.auto is off"),
        (["round", "{}", "--no-submit"], 0, "next: sbatch --array=0,1,2,3,4,5,6,7"),
        (["round", "{}", "recipe.num_steps=3"], 2, "was frozen with"),
    ],
)
def test_an_updated_checkout_acts_with_the_campaign_s_own_code(tmp_path, updated, words, code, said):
    campaign = frozen_campaign(tmp_path)
    for _ in range(2):  # what ran once has left the frozen code as it was
        done = typed(updated, *(word.format(campaign.folder) for word in words))
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr
        assert "this checkout differs from the code that smoke was frozen with" in done.stderr
        assert "the updated checkout is here" not in done.stderr


def test_a_plain_meta_job_closes_a_round_from_a_checkout(tmp_path):
    """As slurm/meta.sbatch does: no PYTHONPATH, and the stage that decides is a process of its own."""
    campaign = frozen_campaign(tmp_path)
    for number in range(8):
        publish(campaign.round("r0001"), f"a{number}")
    done = typed(ROOT, "chain", campaign.folder, "--round", "r0001", "--meta")
    assert done.returncode == 0, done.stderr
    assert campaign.round("r0001").closed.exists()


def test_a_round_is_frozen_as_the_old_checkout_would(tmp_path, updated):
    """Policy, settings and constitution come from the copy, though the checkout's have changed."""
    ours, theirs = (fresh_campaign(tmp_path / name) for name in ("ours", "theirs"))
    other = shutil.copytree(updated, tmp_path / "other", ignore=shutil.ignore_patterns("constitution"))
    for checkout, campaign in ((ROOT, ours), (other, theirs)):
        done = typed(checkout, "round", campaign.folder, "--no-submit")
        assert done.returncode == 0, done.stderr
    assert ours.round("r0001").plan.read_bytes() == theirs.round("r0001").plan.read_bytes()
    assert ours.round("r0001").config.read_bytes() == theirs.round("r0001").config.read_bytes()


def test_an_updated_checkout_looks_with_its_own_code(tmp_path, updated):
    done = typed(updated, "status", frozen_campaign(tmp_path).folder)
    assert done.returncode == 0 and "the updated checkout is here" in done.stderr
    assert "another than" not in done.stderr


@pytest.mark.parametrize("verb", ["round", "pause", "cancel"])
def test_frozen_code_that_was_changed_is_refused_by_any_checkout(tmp_path, updated, verb):
    campaign = frozen_campaign(tmp_path)
    (changed,) = campaign.folder.glob("**/pipeline/decision/decide.py")
    with changed_byte(changed):
        before = tree(campaign.folder)
        for checkout in (ROOT, updated):
            done = typed(checkout, verb, campaign.folder)
            assert done.returncode == 4, done.stderr
            assert "IntegrityError" in done.stderr and "Restore it from a copy" in done.stderr
        assert tree(campaign.folder) == before


def test_the_same_code_goes_on_as_it_is(tmp_path, monkeypatch):
    campaign = fresh_campaign(tmp_path)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("another process was begun"))
    frozen_code.act_as_frozen(campaign, ["round", str(campaign.folder)])
    frozen_code.act_as_frozen(Campaign.at(tmp_path / "none"), ["round"])
    (code_dir,) = campaign.code_dir.iterdir()
    assert frozen_code.is_same_code(ROOT, code_dir)
    # A site's file is added to the checkout and another one changed: the campaign is composed from its own copy.
    copy = tmp_path / "checkout"
    for name in ("pipeline", "constitution", "hydra_conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "hydra_conf" / "cluster" / "mysite.yaml").write_text("defaults: [slurm]\npartition: gpu\n")
    (copy / "hydra_conf" / "cluster" / "slurm.yaml").write_text("defaults: [local]\n")
    assert frozen_code.is_same_code(copy, code_dir)
    (copy / "constitution" / "more.yaml").touch()
    assert not frozen_code.is_same_code(copy, code_dir)
    (code_dir / "pipeline" / "more.py").touch()
    assert not frozen_code.is_same_code(ROOT, code_dir)
