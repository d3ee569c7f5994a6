"""Test that nobody can change the constitution within a campaign: the command line refuses before it submits a job."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.campaign import constitution
from pipeline.campaign.errors import Refused
from pipeline.campaign.facts import load_constitution
from pipeline.campaign.layout import Campaign
from pipeline.rounds import freeze, meta
from tests.support.campaigns import OVERRIDES, fresh_campaign, frozen_campaign, publish
from tests.support.paths import ROOT

RULES = load_constitution()
LENIENT = ('z: "2.45"', 'z: "0.01"')
Tamper = Callable[[Campaign], dict[str, str]]


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return fresh_campaign(tmp_path)


def rules_of(campaign: Campaign) -> Path:
    return next(campaign.code_dir.glob("*/constitution"))


def rewrite(folder: Path, *, digest: bool = False) -> Path:
    """The lenient constitution; with its own DIGEST beside it if asked."""
    path = folder / "constitution.yaml"
    path.write_text(path.read_text().replace(*LENIENT))
    if digest:
        (folder / "DIGEST").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")
    return path


def edited(campaign: Campaign) -> dict[str, str]:
    rewrite(rules_of(campaign))
    return {}


def swapped_digest(campaign: Campaign) -> dict[str, str]:
    rewrite(rules_of(campaign), digest=True)
    return {}


def swapped_facts(campaign: Campaign) -> dict[str, str]:
    path = rewrite(rules_of(campaign), digest=True)
    facts = campaign.frozen.read_text()
    campaign.frozen.write_text(facts.replace(RULES.digest, hashlib.sha256(path.read_bytes()).hexdigest()))
    return {}


def eased_facts(campaign: Campaign) -> dict[str, str]:
    """The articles as `campaign.yaml` has them, which nothing else reads."""
    campaign.frozen.write_text(campaign.frozen.read_text().replace("z: '2.45'", "z: '0.01'"))
    return {}


def symlink(campaign: Campaign) -> dict[str, str]:
    path = rules_of(campaign) / "constitution.yaml"
    target = shutil.copyfile(path, campaign.folder.parent / "constitution.yaml")
    path.unlink()
    path.symlink_to(target)
    return {}


def patched_from_a_trial(campaign: Campaign) -> dict[str, str]:
    """The frozen code's folder led to what a trial wrote."""
    code = next(campaign.code_dir.iterdir())
    fork = campaign.round("r0001").folder / "a1" / "attempt_00" / "fork"
    shutil.copytree(code, fork)
    rewrite(fork / "constitution", digest=True)
    shutil.rmtree(code)
    code.symlink_to(fork)
    return {}


def environment_override(campaign: Campaign) -> dict[str, str]:
    return {"POSTRAIN_CONSTITUTION": str(rewrite_elsewhere(campaign))}


def second_in_search_path(campaign: Campaign) -> dict[str, str]:
    return {"PYTHONPATH": str(rewrite_elsewhere(campaign).parent)}


def rewrite_elsewhere(campaign: Campaign) -> Path:
    folder = Path(shutil.copytree(constitution.HERE, campaign.folder.parent / "elsewhere" / "constitution"))
    rewrite(folder, digest=True)
    return folder


def submit(campaign: Campaign, changed: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], bool]:
    """`round` with an sbatch that says when it was called; returns the end, and whether it was."""
    tools = campaign.folder.parent / "tools"
    tools.mkdir()
    called = tools / "called"
    (tools / "sbatch").write_text(f"#!/bin/sh\ntouch {called}\necho Submitted batch job 1\n")
    (tools / "sbatch").chmod(0o755)
    search_path = os.pathsep.join([str(ROOT), *filter(None, [changed.get("PYTHONPATH")])])
    environment = {**os.environ, **changed, "PYTHONPATH": search_path, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [sys.executable, "-P", "-m", "pipeline", "round", str(campaign.folder), "cluster=testbed"]
    done = subprocess.run(command, cwd=campaign.folder.parent, env=environment, capture_output=True, text=True)
    return done, called.exists()


def test_an_honest_campaign_is_submitted(campaign: Campaign) -> None:
    done, called = submit(campaign, {})
    assert called, done.stderr


@pytest.mark.parametrize(
    "tamper",
    [edited, swapped_digest, swapped_facts, eased_facts, symlink, patched_from_a_trial, environment_override, second_in_search_path],
)  # fmt: skip
def test_a_changed_constitution_stops_before_submission(campaign: Campaign, tamper: Tamper) -> None:
    done, called = submit(campaign, tamper(campaign))
    assert done.returncode in (3, 4), done.stderr
    assert not called
    assert "Traceback" not in done.stderr
    assert not campaign.round("r0001").submitted.exists()


@pytest.mark.parametrize(
    ("spending", "code"),
    [
        ((10**12, 1, 8, 0), "optimizer_tokens"),
        ((1, 600, 1, 0), "gpu_hours_per_arm"),
        ((1, 513, 8, 0), "gpu_hours_per_arm"),
        ((1, 512, 8, 32768), "gpu_hours"),
        ((1, 1, 9, 0), "arms"),
    ],
)
def test_budgets_are_refused_by_article_4(spending: tuple[int, int, int, int], code: str) -> None:
    RULES.check_spending(10**6, 1, 8, 0)  # type: ignore[arg-type]
    with pytest.raises(Refused) as refused:
        RULES.check_spending(*spending)  # type: ignore[arg-type]
    assert (refused.value.article, refused.value.code) == ("4", code)


def test_a_round_over_the_budget_is_not_planned(tmp_path: Path) -> None:
    campaign = fresh_campaign(tmp_path)
    with pytest.raises(Refused, match="gpu_hours_per_arm"):
        freeze.freeze(
            campaign,
            "r0001",
            [*OVERRIDES, "cluster=slurm", "cluster.gpus_per_node=2", "cluster.time_limit_minutes=600000"],
        )
    assert not campaign.round("r0001").plan.exists()


def test_a_round_is_planned_with_the_policy_that_was_decided(tmp_path: Path) -> None:
    campaign = frozen_campaign(tmp_path)
    for number in range(8):
        publish(campaign.round("r0001"), f"a{number}")
    meta.close(campaign, campaign.round("r0001"))
    path = campaign.overrides("r0002")
    written = path.read_text()
    for old, new, code in (
        ("replicates: 0", "replicates: 2", "policy_changed"),
        ("standing: []", "standing: [{key: recipe.lora.rank, value: '8'}]", "policy_changed"),
    ):
        assert old in written
        path.write_text(written.replace(old, new))
        with pytest.raises(Refused) as refused:
            freeze.freeze(campaign, "r0002", OVERRIDES)
        assert (refused.value.article, refused.value.code) == ("8", code)
    path.write_text(written)
    freeze.freeze(campaign, "r0002", OVERRIDES)
