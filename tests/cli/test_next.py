"""Test that a command which is printed as the next one is taken: as it stands, or, where it says so, once a fault is mended."""

import re
import shlex

import pytest

from pipeline.__main__ import main, parse
from pipeline.rounds import meta
from tests.support.campaigns import fresh_campaign, frozen_campaign, publish, publish_reference

MENDED = "    (once that is mended)"


def following(text: str) -> tuple[list[str], bool]:
    """(the words of the last `next:` line, whether it says that something must be mended first)."""
    line = next(line for line in reversed(text.splitlines()) if "next: python -m pipeline " in line)
    command = line.partition("next: python -m pipeline ")[2]
    return shlex.split(command.removesuffix(MENDED).partition("    (")[0]), command.endswith(MENDED)


@pytest.mark.parametrize(
    "words",
    [
        ["plan-memory", "experiment=smoke"],
        ["plan-memory", "experiment=smoke", "policy.confirmation=doubled"],
        ["plan-memory", "experiment=nano_30b", "cluster=slurm"],
        ["round", "runs/new", "experiment=smoke", "--dry-run"],
        ["round", "runs/new", "experiment=nano_30b", "cluster=slurm", "cluster.weights_dir=/no/such", "--dry-run"],
        ["round", "my runs/new", "experiment=smoke", "--dry-run"],
    ],
    ids=" ".join,
)
def test_the_next_command_is_taken(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = main(words)
    told, must_be_mended = following(capsys.readouterr().out)
    parse(told)
    if not must_be_mended:
        assert main([*told, *([] if "--dry-run" in told else ["--dry-run"])]) == first == 0
    else:
        without = [word for word in told if word != "--dry-run"]
        assert main(without) == 2  # the fault that was told
        assert capsys.readouterr().err


def test_the_round_after_init_is_taken(tmp_path, capsys):
    campaign = fresh_campaign(tmp_path)
    assert main(["round", str(campaign.folder), "--dry-run"]) == 0
    told, must_be_mended = following(capsys.readouterr().out)
    assert told == ["round", str(campaign.folder)] and not must_be_mended


def test_after_an_undecided_round_the_report_ends_with_a_command_that_is_taken(tmp_path, capsys):
    """It named `round` before, which refuses a round whose jobs were submitted."""
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    publish_reference(campaign, folder)
    for arm in ("a1", "a2"):
        publish(folder, arm)
    assert meta.close(campaign, folder).state == "undecided"
    capsys.readouterr()
    assert main(["report", str(campaign.folder)]) == 0
    said = capsys.readouterr().out
    told, must_be_mended = following(said)
    assert told == ["status", str(campaign.folder)] and not must_be_mended and "r0001 is open" in said
    assert main(told) == 0
    for number in range(8):
        publish(folder, f"a{number}")
    assert meta.close(campaign, folder).state == "decided"
    capsys.readouterr()
    assert main(["report", str(campaign.folder)]) == 0
    assert following(capsys.readouterr().out) == (["round", str(campaign.folder)], False)


@pytest.mark.parametrize("words", [["status", "runs/absent"], ["report", "runs/absent"]], ids=" ".join)
def test_a_command_in_a_cure_is_taken(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    command = re.search(r"`python -m pipeline ([^`]+)`", capsys.readouterr().err)
    assert command
    assert main([*shlex.split(command[1]), "--dry-run"]) == 0


def test_a_dry_run_shows_the_jobs_in_the_order_of_their_submission(tmp_path, capsys):
    assert main(["round", str(tmp_path / "new"), "experiment=smoke", "cluster=slurm", "--dry-run"]) == 0
    shown = re.findall(r"^--- (\w+)\.sbatch: (.*)$", capsys.readouterr().out, re.M)
    assert [name for name, _ in shown] == ["array_0", "array_1", "reference", "meta", "judge"]
    assert "not submitted now" in shown[-1][1]


def test_hours_are_those_of_gpus_where_there_are_any_and_money_is_said_of_every_round(capsys):
    priced = ["experiment=nano_30b", "cluster=slurm", "cluster.capacity.price_per_gpu_hour=2.5"]
    main(["plan-memory", *priced])
    said = " ".join(capsys.readouterr().out.split())
    first, later = re.findall(r"([\d.]+)(?: GPU-hours)? \((\d+) USD\)", said)
    assert [round(2.5 * float(hours)) for hours in (first[0], later[0])] == pytest.approx(
        [int(first[1]), int(later[1])], abs=1
    )
    assert "device-hours" not in said and "includes a reserve of 3.00 GiB" in said
    main(["plan-memory", "experiment=smoke", "cluster=slurm", "cluster.gpus_per_node=0"])
    said = capsys.readouterr().out
    assert "cluster.gpus_per_node is 0, so arms compute on cores" in said and "GPU-hours" not in said
