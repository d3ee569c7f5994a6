"""Test the command line: exit codes, errors as one sentence without a traceback, and the command to type next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main, parse
from pipeline.campaign.errors import ConfigError
from pipeline.campaign.files import exclusive_lock
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.cli import job_stages
from pipeline.rounds import chain
from tests.attacks.host import command_as, environment
from tests.support.campaigns import OVERRIDES, fresh_campaign, frozen_campaign, publish, tree
from tests.support.paths import ROOT


@pytest.fixture
def campaign(tmp_path) -> Campaign:
    return frozen_campaign(tmp_path)


def test_overrides_stand_before_and_after_options():
    for words in (["--dry-run", *OVERRIDES], [*OVERRIDES, "--dry-run"]):
        arguments = parse(["round", "runs/x", *words])
        assert (arguments.dry_run, arguments.overrides) == (True, OVERRIDES)


def test_arms_stand_before_and_after_options():
    for words in (["a1", "a2", "--round", "r0001"], ["--round", "r0001", "a1", "a2"], ["a1", "--round", "r0001", "a2"]):
        assert parse(["rerun", "runs/x", *words]).arms == ["a1", "a2"]


@pytest.mark.parametrize("words", [["round", "x", "--wiat"], ["status", "x", "r0001"], ["worker", "x"], ["dance"]])
def test_wrong_usage_is_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_misspelled_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["staus", "runs/x"])
    assert "'staus' is no command; did you mean `status`?" in capsys.readouterr().err


def test_after_the_end_no_command_suggests_a_round(campaign, capsys):
    first = campaign.round("r0001")
    first.closed.write_text("{}")
    main(["status", str(campaign.folder)])
    assert capsys.readouterr().out.endswith(f"next: python -m pipeline round {campaign.folder}\n")
    Log(campaign.log).append("end", round="r0001")
    main(["status", str(campaign.folder)])
    assert "the campaign has ended, so no round follows; next: python -m pipeline audit" in capsys.readouterr().out


def test_status_shows_a_pause(campaign, capsys):
    main(["pause", str(campaign.folder)])
    main(["status", str(campaign.folder)])
    assert "rounds that follow by themselves are paused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["status", "{}/nothing"], 2, "is not a campaign"),
        (["round", "{}/new", "recipe.num_stepz=3"], 2, "num_stepz"),
        (["round", "{}/new", "recipe.warmup_steps=1000"], 2, "recipe.warmup_steps is 1000. Valid is 0 to num_steps - 1"),
        (["round", "{}/new", "tasks.train_csv=/absent.csv", "--dry-run"], 2, "/absent.csv is not a file"),
        (["round", "{}/new", "model.weights=base/weights.json", "--dry-run"], 2, "cluster.weights_dir is empty"),
        (["init", "{}/new", "model.weights=base/weights.json", "cluster.weights_dir=/absent"], 2, "is not a folder here"),
        (["round", "{}/new", "model.weights=base/weights.json", "cluster.weights_dir=/usr", "--dry-run"], 2, "is not a published checkpoint"),
        (["round", "{}/new", "parallelism.tp=3"], 2, "tp"),
        (["round", "{}/smoke", "--json"], 2, "--json goes with --dry-run"),
        (["round", "{}/new", "cluster=moon"], 2, "cluster"),
        (["image", "show", "{}/no.sqsh"], 2, "no.sqsh"),
        (["image", "verify", "tasks=full"], 2, "takes no overrides, now came tasks=full"),
        (["status", "{}/smoke", "--watch", "--json"], 2, "--watch prints lines and --json one value"),
        (["meta", "{}/smoke", "--round", "r0000"], 2, "r0000 has no fresh items and is never decided"),
        (["close", "{}/smoke", "--round", "r0000", "--dry-run"], 2, "r0000 has no fresh items and is never decided"),
        (["reference", "{}/smoke", "--round", "r0000"], 2, "r0000 has no fresh items and is never decided"),
        (["round", "{}/smoke/campaign.yaml", "--dry-run"], 2, "campaign.yaml is a file"),
        (["init", "{}/smoke"], 2, "goes on with it; for a new campaign choose another name"),
        (["board", "score", "{}/smoke", "1", "0.5"], 2, "The log has no submission yet"),
    ],
)  # fmt: skip
def test_an_expected_error_is_one_sentence_with_its_code(campaign, words, code, said, capsys):
    before = tree(campaign.folder.parent)
    assert main([word.format(campaign.folder.parent) for word in words]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert tree(campaign.folder.parent) == before


def test_a_dry_run_writes_nothing_and_shows_what_sbatch_gets(campaign, capsys):
    before = tree(campaign.folder)
    assert main(["round", str(campaign.folder), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "a0  anchor" in shown
    assert "#SBATCH" not in shown and "the stages run on this machine (cluster=local)" in shown
    assert main(["round", str(campaign.folder), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [arm["index"] for arm in told["plan"]["arms"]] == [*range(8)]
    assert told["sbatch"] == {} and told["costs"]["parameters"] > 0
    new = str(campaign.folder.parent / "new")
    assert main(["round", new, "experiment=smoke", "cluster=testbed", "--dry-run"]) == 0
    assert "#SBATCH --array=0-7" in capsys.readouterr().out
    assert main(["round", new, "experiment=smoke", "cluster=testbed", "--dry-run", "--json"]) == 0
    assert any("#SBATCH --array=0-7" in text for text in json.loads(capsys.readouterr().out)["sbatch"].values())
    assert tree(campaign.folder) == before


def test_no_submit_prints_the_lines_to_type(campaign, capsys):
    assert main(["round", str(campaign.folder), "--no-submit"]) == 0
    shown = capsys.readouterr().out
    assert f"next: sbatch --array=0,1,2,3,4,5,6,7 slurm/round.sbatch {campaign.folder} r0001" in shown
    assert f"slurm/meta.sbatch {campaign.folder} r0001" in shown


def test_status_for_programs(campaign, capsys):
    publish(campaign.round("r0001"), "a0")
    assert main(["status", str(campaign.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["round"], found["closed"], len(found["arms"])) == ("r0001", False, 8)
    assert {arm["state"] for arm in found["arms"][1:]} == {"waiting"}
    assert [(arm["round"], arm["arm"], arm["state"]) for arm in found["r0000"]] == [
        ("r0000", "a0", "completed"), ("r0000", "a1", "waiting"),
    ]  # fmt: skip
    assert found["jobs"] == {}


def test_status_gives_programs_numbers_as_numbers(campaign, capsys):
    attempt = campaign.round("r0001").claim_attempt("a1")
    attempt.phases.write_text(json.dumps({"phase": "train", "at": 1.0, "detail": ""}) + "\n")
    line = {"phase": "train", "step": 3, "num_steps": 30, "loss": 0.25, "tokens": 90, "seconds": 2}
    attempt.progress.write_text(json.dumps(line) + "\n")
    assert main(["status", str(campaign.folder), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["arms"][1]
    assert (row["step"], row["num_steps"], row["loss"], row["tokens_per_second"]) == (3, 30, 0.25, 45.0)
    assert main(["status", str(campaign.folder)]) == 0
    assert "3/30  0.250        45" in capsys.readouterr().out
    for wrong in ({"loss": "nan"}, {"step": "three"}, {"seconds": -0.0, "tokens": "x", "loss": None}):
        attempt.progress.write_text(json.dumps(line | wrong) + "\n")
        assert main(["status", str(campaign.folder), "--json"]) == 0
        row = json.loads(capsys.readouterr().out)["arms"][1]
        assert row["unread"] and row["loss"] is None and row["step"] is None


def test_the_last_line_of_a_worker_says_who_decides(campaign):
    folder = campaign.round("r0001")
    assert job_stages.after_an_arm(folder, "runs/x").startswith(
        "next: python -m pipeline meta runs/x --round r0001    (when"
    )
    for submitted, who in (
        ({"kind": "slurm", "meta_job_id": "9"}, "meta job 9"),
        ({"kind": "local", "pid": 1}, "`round`"),
    ):
        folder.submitted.write_text(json.dumps(submitted))
        assert job_stages.after_an_arm(folder, "runs/x") == (
            f"{who} decides r0001 once all its arms have ended; next: python -m pipeline status runs/x --round r0001"
        )


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m pipeline --help | head -c 0"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="another person needs root to be played")
def test_another_person_is_told_whose_campaign_it_is(tmp_path: Path) -> None:
    campaign = fresh_campaign(tmp_path)
    for path in (tmp_path, *list(tmp_path.parents)[:-2]):  # /tmp itself stays as it is
        path.chmod(0o755)
    for words in (["round"], ["pause"]):
        command = [*command_as("user", sys.executable, "-P", "-m", "pipeline"), words[0], str(campaign.folder)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        assert str(campaign.folder) in done.stderr and ("belongs to root" in done.stderr or "Permission" in done.stderr)
    looked = [
        *command_as("user", sys.executable, "-P", "-m", "pipeline"),
        "status",
        str(campaign.folder),
        "--round",
        "r0000",
    ]
    done = subprocess.run(looked, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_lock_says_who_holds_it(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "lock", "thing"), pytest.raises(ConfigError, match=f"process {os.getpid()} of "):
        with exclusive_lock(tmp_path / "lock", "thing"):
            pass
    with exclusive_lock(tmp_path / "lock", "thing"):
        assert (tmp_path / "lock").read_text().count("process") == 1


def test_what_is_made_ready_meanwhile_stops_nothing(campaign):
    """Whatever is wrong there is met again, and told, once the meta stage has ended."""
    chain.preload_next_round(campaign, "r0009")
    (campaign.hydra_dir / "round" / "r0001.yaml").write_text("policy: [\n  x: {")
    chain.preload_next_round(campaign, "r0001")
