"""Test asking Slurm for job states with stand-ins that print what Slurm 22.05 printed; any client may be missing."""

import json
import os
from pathlib import Path

import pytest

from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_jobs
from pipeline.cluster.slurm_jobs import Job

NAMES = ["drill-r0001-arms", "drill-r0001-meta"]
SQUEUE = """2_3|RUNNING|n1|None|2026-11-23T22:54:10
2_4|PENDING||JobArrayTaskLimit|2026-11-24T01:00:00
4|PENDING||Dependency|N/A
"""
SCONTROL = (
    "JobId=5 ArrayJobId=2 ArrayTaskId=0 JobName=drill-r0001-arms UserId=root(0) JobState=COMPLETED Reason=None NodeList=n1\n"
    "JobId=6 ArrayJobId=2 ArrayTaskId=1 JobName=drill-r0001-arms JobState=NODE_FAIL Reason=NodeDown NodeList=n2\n"
    "JobId=2 ArrayJobId=2 ArrayTaskId=4,6-7%2 JobName=drill-r0001-arms JobState=PENDING NodeList=(null)\n"
    "JobId=9 JobName=another JobState=RUNNING NodeList=n4\n"
)
SACCT = "2_0|COMPLETED|n1|0:0\n2_2|CANCELLED by 1000|None assigned|0:0\n2_[4,6-7%2]|PENDING|None assigned|0:0\n1|TIMEOUT|n5|0:0\n"


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts programs on PATH that print these texts; a None is a program that is missing, a number one that fails so."""

    def install(**texts: str | int | None) -> Path:
        for name, text in texts.items():
            if text is not None:
                body = f"exit {text}" if isinstance(text, int) else f"cat <<'END'\n{text}END"
                (tmp_path / name).write_text(f"#!/bin/sh\necho $0 >> {tmp_path}/asked\n{body}\n")
                (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
        return tmp_path / "asked"

    return install


def test_each_source_is_asked_for_what_the_one_before_did_not_know(answers):
    asked = answers(squeue=SQUEUE, scontrol=SCONTROL, sacct=SACCT)
    found = slurm_jobs.query_jobs(["2_0", "2_1", "2_3", "2_4", "4", "1"], NAMES)
    assert {job_id: (job.state, job.source) for job_id, job in found.items()} == {
        "2_0": ("COMPLETED", "scontrol"), "2_1": ("NODE_FAIL", "scontrol"), "2_3": ("RUNNING", "squeue"),
        "2_4": ("PENDING", "squeue"), "4": ("PENDING", "squeue"), "1": ("TIMEOUT", "sacct"),
    }  # fmt: skip
    assert found["2_4"].expected_start == "2026-11-24T01:00:00" and found["4"].expected_start == ""
    assert (found["2_1"].node, found["2_1"].reason) == ("n2", "NodeDown")
    assert len(asked.read_text().splitlines()) == 3  # once each, however many jobs


def test_nothing_more_is_asked_when_all_is_known(answers):
    asked = answers(squeue=SQUEUE, scontrol=SCONTROL, sacct=SACCT)
    slurm_jobs.query_jobs(["2_3", "4"], NAMES)
    assert len(asked.read_text().splitlines()) == 1


@pytest.mark.parametrize("silent", [{}, {"squeue": 1, "scontrol": 1, "sacct": 1}], ids=["missing", "failing"])
def test_silence_is_unknown_and_no_error(answers, silent):
    answers(**silent)
    assert slurm_jobs.query_jobs(["2_0", "7"], NAMES) == {"2_0": Job("2_0", "UNKNOWN"), "7": Job("7", "UNKNOWN")}


def test_works_without_accounting(answers):
    answers(squeue=SQUEUE, scontrol=SCONTROL, sacct=1)
    found = slurm_jobs.query_jobs(["2_0", "1"], NAMES)
    assert (found["2_0"].state, found["1"].state) == ("COMPLETED", "UNKNOWN")


def test_task_that_its_array_no_longer_has_was_cancelled(answers):
    answers(squeue=SQUEUE)
    found = slurm_jobs.query_jobs(["2_5", "8_1"], NAMES)
    assert (found["2_5"].state, found["2_5"].reason) == ("CANCELLED", "while it waited")
    assert found["2_5"].ended and found["8_1"].state == "UNKNOWN" and not found["8_1"].ended


def test_who_cancelled_is_a_reason(answers):
    answers(sacct=SACCT)
    assert slurm_jobs.query_jobs(["2_2"], NAMES)["2_2"] == Job(
        "2_2", "CANCELLED", "None assigned", "by 1000", "", "sacct"
    )


def test_hanging_program_is_silence(answers, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "TIMEOUT_SECONDS", 0.2)
    path = answers(squeue="x").parent / "squeue"
    path.write_text("#!/bin/sh\nsleep 5\n")
    assert slurm_jobs.query_jobs(["4"], NAMES)["4"].state == "UNKNOWN"


def test_asking_becomes_seldom_while_nothing_happens(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(slurm_jobs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(slurm_jobs, "query_jobs", lambda ids, names: asked.append(now[0]) or {"4": Job("4", "RUNNING")})
    asker = slurm_jobs.Asker(NAMES, shortest=2, longest=30)
    for tenth in range(2000):
        now[0] = tenth / 10
        asker.states(["4"])
    gaps = [round(b - a) for a, b in zip(asked, asked[1:], strict=False)]
    assert gaps[:5] == [2, 4, 8, 16, 30] and set(gaps[4:]) == {30}


def test_newest_submission_of_an_arm_counts(tmp_path: Path):
    folder = Campaign(tmp_path).round("r0001")
    folder.folder.mkdir(parents=True)
    assert slurm_jobs.task_ids(folder) == {}
    slurm_jobs.record_submission(folder, {"r0001/a0": "2_0", "r0001/a1": "2_1"}, "4", "round")
    slurm_jobs.record_submission(folder, {"r0001/a1": "9"}, "", "rerun")
    assert slurm_jobs.task_ids(folder) == {"r0001/a0": "2_0", "r0001/a1": "9", "meta": "4"}


def _attempt(folder: Round, arm: str, **files: object) -> None:
    attempt = folder.claim_attempt(arm)
    for name, content in files.items():
        (attempt.folder / f"{name}.json").write_text(json.dumps(content))


def test_nodes_that_lost_an_arm_are_named(tmp_path: Path):
    folder = Campaign(tmp_path).round("r0001")
    _attempt(folder, "a0", claim={"node": "n2"})
    _attempt(folder, "a1", claim={"node": "n3"}, interrupted={})
    _attempt(folder, "a2", claim={"node": ""})
    assert slurm_jobs.lost_nodes(folder, ["a0", "a1", "a2", "a3"]) == ["n2"]
