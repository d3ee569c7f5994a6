"""Test the reader of Slurm's ids, states and lines, and the explanation of reasons."""

import random

import pytest

from pipeline.cluster import slurm_answers, slurm_jobs
from pipeline.cluster.slurm_clients import Output
from tests.support.slurm_world import World


@pytest.mark.parametrize(
    ("text", "covered", "others"),
    [
        ("41", ["41"], ["41_0", "4", "410"]),
        ("41_3", ["41_3"], ["41", "41_30", "41_0"]),
        ("41_[0-7%4]", ["41_0", "41_7"], ["41_8", "41"]),
        ("41_[0-7]%4", ["41_0", "41_7"], ["41_8"]),
        ("41_[1,3-5]", ["41_1", "41_3", "41_5"], ["41_2", "41_0"]),
        ("41_[0-9:2]", ["41_0", "41_8"], ["41_1", "41_9"]),
        ("41_[0-3,8-14:2,40%1]", ["41_3", "41_14", "41_40"], ["41_9", "41_15"]),
        ("41_3;alpha", ["41_3"], ["41_0"]),
        ("41;alpha", ["41"], []),
        (" 41 ", ["41"], []),
        ("41+0", ["41"], []),
        ("41+1", ["41+1"], ["41", "41_1"]),
    ],
)
def test_case_01_ids(text: str, covered: list[str], others: list[str]) -> None:
    ids = slurm_answers.parse_ids(text)
    assert ids and not ids.step and not ids.cut
    assert all(ids.covers(job_id) for job_id in covered) and not any(ids.covers(job_id) for job_id in others)
    assert set(covered) <= set(ids.each())


def test_case_01_a_list_that_slurm_cut_stands_for_more_than_it_names() -> None:
    ids = slurm_answers.parse_ids("41_[1,3,5,...]")
    assert ids and ids.cut and ids.covers("41_5") and not ids.covers("41_7")


@pytest.mark.parametrize(
    ("text", "step"), [("41.batch", "batch"), ("41_3.extern", "extern"), ("41_3.0", "0"), ("41.0+1", "0")]
)
def test_case_01_steps(text: str, step: str) -> None:
    ids = slurm_answers.parse_ids(text)
    assert ids and ids.step == step


@pytest.mark.parametrize("text", ["", "JOBID", "41_", "41_x", "sacct: error", "-41", "41_[0-7", "4 1"])
def test_what_is_no_id_is_none(text: str) -> None:
    assert slurm_answers.parse_ids(text) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("RUNNING", "RUNNING"), ("running", "RUNNING"), ("CANCELLED by 1000", "CANCELLED"), ("CANCELLED+", "CANCELLED"),
        ("COMPLETI+", "COMPLETING"), ("OUT_OF_ME+", "OUT_OF_MEMORY"), ("NODE_FAI+", "NODE_FAIL"), ("PREEMPT+", "PREEMPTED"),
        ("COMPLET+", "COMPLET+"), ("RE+", "RE+"), ("", "UNKNOWN"), ("  ", "UNKNOWN"), ("REVOKED", "REVOKED"), ("R", "R"),
        ("COMPLETED ", "COMPLETED"),
    ],
)  # fmt: skip
def test_case_02_states(text: str, word: str) -> None:
    assert slurm_answers.parse_state(text) == word


@pytest.mark.parametrize("word", ["REVOKED", "SOMETHING_NEW", "COMPLET+", "UNKNOWN", "R"])
def test_case_02_a_word_of_no_set_is_not_known_yet(word: str) -> None:
    job = slurm_jobs.Job("41_0", word)
    assert not (job.waits or job.runs or job.ended)


def test_case_14_a_name_with_blanks_hides_no_value() -> None:
    row = "JobId=55 ArrayJobId=41 ArrayTaskId=0 JobName=my demo  x JobState=RUNNING Reason=None NodeList=n1 Comment=JobState=FAILED"
    (line,) = slurm_answers.read_scontrol(row).lines
    assert (line.state, line.node) == ("RUNNING", "n1") and line.ids.covers("41_0")


def test_case_03_a_line_that_nobody_can_read_is_kept_and_headers_are_none() -> None:
    text = "CLUSTER: alpha\nJobID|State|NodeList|ExitCode|End\nslurm_load_jobs error: x\n41|COMPLETED|n1|0:0|Unknown\n"
    answer = slurm_answers.read_sacct(text)
    assert answer.unread == ["slurm_load_jobs error: x"] and len(answer.lines) == 1 and answer.spoke
    nothing = slurm_answers.read_scontrol("No jobs in the system\n")
    assert nothing.spoke and not nothing.unread and not slurm_answers.read_scontrol("").spoke


@pytest.mark.parametrize(
    ("reason", "needs_person"),
    [
        ("JobHeldUser", True), ("JobHeldAdmin", True), ("BadConstraints", True), ("DependencyNeverSatisfied", True),
        ("AssocGrpCPUMinutesLimit", True), ("QOSMaxWallDurationPerJobLimit", True), ("QOSMaxGRESPerJob", True),
        ("PartitionTimeLimit", True), ("ReservationDeleted", True), ("launch failed requeued held", True), ("QOSMinGRES", True),
        ("QOSMaxGRESPerUser", False), ("AssocGrpGRES", False), ("QOSGrpCpuLimit", False), ("AssocGrpCPURunMinutesLimit", False),
        ("QOSMaxJobsPerUserLimit", False), ("Priority", False), ("Resources", False), ("JobArrayTaskLimit", False),
        ("BeginTime", False), ("Dependency", False), ("ReqNodeNotAvail, UnavailableNodes:n[1-3]", False), ("Reservation", False),
    ],
)  # fmt: skip
def test_case_07_what_waits_for_a_person_is_told_from_what_takes_long(reason: str, needs_person: bool) -> None:
    told = slurm_answers.explain_reason(reason)
    assert told and told.needs_person is needs_person
    shown = slurm_answers.describe_reason(reason)
    assert shown.startswith(reason) and told.sentence in shown and ("needs a person" in shown) is needs_person


def test_case_07_an_unknown_reason_is_shown_as_it_is() -> None:
    assert slurm_answers.describe_reason("SomethingNew") == "SomethingNew" and slurm_answers.describe_reason("") == ""


def test_ten_thousand_worlds_never_end_a_job_that_waits_or_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random arrays, throttles, states, and sources that are silent, filtered, cut or late; the truth is known."""
    rng = random.Random(20261127)
    seen = {"waits": 0, "runs": 0, "ended": 0, "unknown": 0, "startable": 0}
    for _ in range(10_000):
        world = World.random(rng)
        monkeypatch.setattr(
            slurm_jobs.slurm_clients, "run", lambda *command, world=world, **_: Output(*world.answer(command[0]))
        )
        for job_id, job in slurm_jobs.query_jobs(world.ids, [world.name], 0.0).jobs.items():
            alive, story = world.is_alive(job_id), (world, job)
            assert not (alive and job.ended), story
            startable = not (job.waits or job.runs or job.may_return) and (job.ended or job.absent)
            assert not (alive and startable), story  # never a second start
            if world.end_that_is_told(job_id):
                assert job.ended, story
            seen["startable"] += startable
            seen[next((name for name in ("waits", "runs", "ended") if getattr(job, name)), "unknown")] += 1
    assert min(seen.values()) > 2000, seen
