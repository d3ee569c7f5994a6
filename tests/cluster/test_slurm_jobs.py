"""Test asking Slurm for job states with stand-ins that print what Slurm 22.05 printed; any client may be missing."""

import json
import time
from pathlib import Path

import pytest

from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_clients, slurm_jobs
from pipeline.cluster.slurm_jobs import Job
from pipeline.rounds import launch
from tests.support.slurm_stand_ins import Clients

NAMES = ["drill-r0001-arms", "drill-r0001-meta"]
SQUEUE = """JOBID|STATE|NODELIST|REASON|START_TIME
2_3|RUNNING|n1|None|2026-11-23T22:54:10
2_4|PENDING||JobArrayTaskLimit|2026-11-24T01:00:00
2_6|PENDING||JobArrayTaskLimit|N/A
2_7|PENDING||JobArrayTaskLimit|N/A
4|PENDING||Dependency|N/A
"""
SCONTROL = (
    "JobId=5 ArrayJobId=2 ArrayTaskId=0 JobName=drill-r0001-arms UserId=root(0) JobState=COMPLETED Reason=None NodeList=n1\n"
    "JobId=6 ArrayJobId=2 ArrayTaskId=1 JobName=drill-r0001-arms JobState=NODE_FAIL Reason=NodeDown NodeList=n2\n"
    "JobId=2 ArrayJobId=2 ArrayTaskId=4,6-7%2 JobName=drill-r0001-arms JobState=PENDING NodeList=(null)\n"
    "JobId=9 JobName=another JobState=RUNNING NodeList=n4\n"
)
SACCT = (
    "JobID|State|NodeList|ExitCode|End\n"
    "2_0|COMPLETED|n1|0:0|2026-11-23T22:54:10\n2_2|CANCELLED by 1000|None assigned|0:0|Unknown\n"
    "2_[4,6-7%2]|PENDING|None assigned|0:0|Unknown\n1|TIMEOUT|n5|0:0|2026-11-23T22:54:10\n"
)


def query(*ids: str) -> slurm_jobs.Report:
    return slurm_jobs.query_jobs(ids, NAMES, 1764000000.0)


def test_each_source_is_asked_for_what_the_one_before_did_not_know(clients: Clients) -> None:
    asked = clients(squeue=SQUEUE, scontrol=SCONTROL, sacct=SACCT)
    found = query("2_0", "2_1", "2_3", "2_4", "4", "1").jobs
    assert {job_id: (job.state, job.source) for job_id, job in found.items()} == {
        "2_0": ("COMPLETED", "scontrol"), "2_1": ("NODE_FAIL", "scontrol"), "2_3": ("RUNNING", "squeue"),
        "2_4": ("PENDING", "squeue"), "4": ("PENDING", "squeue"), "1": ("TIMEOUT", "sacct"),
    }  # fmt: skip
    assert found["2_4"].expected_start == "2026-11-24T01:00:00" and found["4"].expected_start == ""
    assert (found["2_1"].node, found["2_1"].reason) == ("n2", "NodeDown")
    assert len(asked.read_text().splitlines()) == 3  # once each, however many jobs


def test_nothing_more_is_asked_when_all_is_known(clients: Clients) -> None:
    asked = clients(squeue=SQUEUE, scontrol=SCONTROL, sacct=SACCT)
    query("2_3", "4")
    assert len(asked.read_text().splitlines()) == 1


@pytest.mark.parametrize("silent", [{}, {"squeue": 1, "scontrol": 1, "sacct": 1}], ids=["missing", "failing"])
def test_silence_is_unknown_and_no_error(clients: Clients, silent: dict[str, int]) -> None:
    clients(**silent)
    said = query("2_0", "7")
    assert said.jobs == {"2_0": Job("2_0", "UNKNOWN"), "7": Job("7", "UNKNOWN")}
    assert [line.split()[0].strip(":") for line in said.complaints] == ["squeue", "scontrol", "sacct"]


def test_works_without_accounting(clients: Clients) -> None:
    clients(squeue=SQUEUE, scontrol=SCONTROL, sacct=1)
    found = query("2_0", "1").jobs
    assert (found["2_0"].state, found["1"].state) == ("COMPLETED", "UNKNOWN")
    assert found["1"].absent and not found["1"].ended


def test_a_site_without_accounting_is_told_only_where_a_state_is_not_known(clients: Clients) -> None:
    clients(squeue=SQUEUE, scontrol=SCONTROL, sacct="", errors={"sacct": "Slurm accounting storage is disabled"})
    assert query("2_0").complaints == ()
    assert query("77").complaints == ("sacct: Slurm accounting storage is disabled",)


def test_a_task_that_its_array_no_longer_has_was_cancelled(clients: Clients) -> None:
    clients(squeue=SQUEUE, scontrol=SCONTROL)
    found = query("2_5", "8_1").jobs
    assert (found["2_5"].state, found["2_5"].reason) == ("CANCELLED", "while it waited")
    assert found["2_5"].ended and found["8_1"].state == "UNKNOWN" and not found["8_1"].ended


def test_squeue_alone_never_ends_a_job(clients: Clients) -> None:
    clients(squeue=SQUEUE)
    assert query("2_5").jobs["2_5"] == Job("2_5", "UNKNOWN")


def test_who_cancelled_is_a_reason(clients: Clients) -> None:
    clients(sacct=SACCT)
    assert query("2_2").jobs["2_2"] == Job("2_2", "CANCELLED", "", "by 1000", "", "sacct")


def test_hanging_program_is_silence(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_clients, "TIMEOUT_SECONDS", 0.2)
    path = clients(squeue="x").parent / "squeue"
    path.write_text("#!/bin/sh\nsleep 5\n")
    said = query("4")
    assert said.jobs["4"].state == "UNKNOWN" and said.complaints[0] == "squeue did not answer within 0.2 s"


def test_a_completed_job_whose_step_was_killed_is_no_success(clients: Clients) -> None:
    steps = "2_0.batch|COMPLETED|n1|0:0|\n2_0.extern|CANCELLED|n1|0:0|\n2_0.0|CANCELLED by 7|n1|0:9|\n"
    clients(squeue=SQUEUE, scontrol=SCONTROL, sacct=SACCT + steps)
    assert query("2_0").jobs["2_0"].state == "CANCELLED"
    clients(squeue=SQUEUE, scontrol=SCONTROL, sacct=SACCT + steps.splitlines()[0])
    assert query("2_0").jobs["2_0"].state == "COMPLETED"


@pytest.mark.parametrize("word", ["PREEMPTED", "NODE_FAIL"])
def test_a_job_that_may_come_back_ends_once_slurm_has_forgotten_it_for_long(clients: Clients, word: str) -> None:
    header, rows = SACCT.split("\n", 1)[0], "7|{}|n1|0:0|{}\n"

    def at(seconds: float) -> str:
        ended_at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - seconds))
        return f"{header}\n{rows.format(word, ended_at)}"

    clients(squeue=SQUEUE, scontrol=SCONTROL, sacct=at(60))
    assert query("7").jobs["7"].may_return and not query("7").jobs["7"].ended
    clients(squeue=SQUEUE, scontrol=SCONTROL, sacct=at(slurm_jobs.RETURN_SECONDS + 5))
    assert query("7").jobs["7"].ended
    clients(squeue=1, scontrol=SCONTROL, sacct=at(9999))
    assert not query("7").jobs["7"].ended  # squeue, which would know, was silent


def test_accounting_that_missed_an_end_does_not_hold_a_job_for_ever(clients: Clients) -> None:
    clients(squeue=SQUEUE, scontrol=SCONTROL, sacct="7|RUNNING|n1|0:0|Unknown\n")
    job = query("7").jobs["7"]
    assert job.absent and not job.runs and job.reason == "sacct alone calls it RUNNING"


def test_newest_submission_of_an_arm_counts(tmp_path: Path) -> None:
    folder = Campaign(tmp_path).round("r0001")
    folder.folder.mkdir(parents=True)
    assert slurm_jobs.task_ids(folder) == {}
    before = time.time()
    slurm_jobs.record_submission(folder, {"r0001/a0": "2_0", "r0001/a1": "2_1"}, "4", "round")
    between = time.time()
    slurm_jobs.record_submission(folder, {"r0001/a1": "9"}, "", "rerun")
    assert slurm_jobs.task_ids(folder) == {"r0001/a0": "2_0", "r0001/a1": "9", "meta": "4"}
    assert before - 0.01 <= slurm_jobs.first_submitted(folder) <= between + 0.01


def _attempt(folder: Round, arm: str, **files: object) -> None:
    attempt = folder.claim_attempt(arm)
    for name, content in files.items():
        (attempt.folder / f"{name}.json").write_text(json.dumps(content))


def test_only_nodes_of_which_slurm_says_that_they_failed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arms share nodes, so an arm that vanished (a2, on a good node) is no reason to keep the others away from its node."""
    folder = Campaign(tmp_path).round("r0001")
    _attempt(folder, "a0", claim={"node": "n2"})
    _attempt(folder, "a1", claim={"node": "n3"}, interrupted={})
    _attempt(folder, "a2", claim={"node": ""})
    _attempt(folder, "a3", claim={"node": "n4"})
    _attempt(folder, "a4", claim={"node": "n5"})
    _attempt(folder, "a5", claim={"node": "n6"})
    asked: list[tuple[str, ...]] = []

    def output_of(*command: str) -> str:
        asked.append(command)
        return "n2|mixed\nn4|down*\nn6|idle*\n"

    monkeypatch.setattr(slurm_clients, "output_of", output_of)
    jobs = {"r0001/a4": slurm_jobs.Job("7_4", "NODE_FAIL"), "r0001/a0": slurm_jobs.Job("7_0", "FAILED")}
    arms = ["a0", "a1", "a2", "a3", "a4", "a5", "a6"]
    assert launch.failed_nodes(folder, arms, jobs) == ["n4", "n5", "n6"]
    assert asked == [("sinfo", "--noheader", "--Node", "--nodes=n2,n4,n6", "--format=%N|%T")]
    monkeypatch.setattr(slurm_clients, "output_of", lambda *command: "")
    assert launch.failed_nodes(folder, arms, {}) == []
