"""Replay what Slurm printed of real jobs (answers/22.05.8, made by slurm/testbed/capture.py) and the small inputs of answers/cases."""

from itertools import combinations
from pathlib import Path

import pytest

from pipeline.cluster import slurm_jobs
from tests.support.slurm_stand_ins import Clients

ANSWERS = Path(__file__).parent / "answers"
SOURCES = ("squeue", "scontrol", "sacct")
FOLDERS = sorted(path.parent for path in ANSWERS.glob("*/*/expect"))
NAMES = ["captured", "demo-r0001-arms"]
SINCE = 1764000000.0


def expected(folder: Path) -> dict[str, tuple[str, str]]:
    """Job id -> (Slurm's word, whether it waits, runs, ended, or is unknown)."""
    rows = [line.split() for line in (folder / "expect").read_text().splitlines()]
    return {job_id: (word, kind) for job_id, word, kind in rows}


def kind(job: slurm_jobs.Job) -> str:
    held = [name for name in ("waits", "runs", "ended") if getattr(job, name)]
    assert len(held) <= 1
    return held[0] if held else "unknown"


def texts(folder: Path) -> dict[str, str | int | None]:
    return {source: (folder / source).read_text() for source in SOURCES}


@pytest.mark.parametrize("folder", FOLDERS, ids=[f"{folder.parent.name}-{folder.name}" for folder in FOLDERS])
def test_case_01_02_03_every_captured_answer_is_read_as_what_was_true(clients: Clients, folder: Path) -> None:
    clients(**texts(folder))
    truth = expected(folder)
    said = slurm_jobs.query_jobs(truth, NAMES, SINCE)
    assert {job_id: (job.state, kind(job)) for job_id, job in said.jobs.items()} == truth
    if folder.name == "database_down":
        assert "sacct: error: slurmdbd: Unable to connect" in said.complaints


@pytest.mark.parametrize("folder", FOLDERS, ids=[f"{folder.parent.name}-{folder.name}" for folder in FOLDERS])
def test_case_01_no_silence_of_any_source_ends_a_job_that_waits_or_runs(clients: Clients, folder: Path) -> None:
    truth = expected(folder)
    for count in (1, 2, 3):
        for silent in combinations(SOURCES, count):
            for silence in (None, 1, ""):  # missing, failing, and answering with nothing at all
                clients(**texts(folder) | dict.fromkeys(silent, silence))
                for job_id, job in slurm_jobs.query_jobs(truth, NAMES, SINCE).jobs.items():
                    if truth[job_id][1] in ("waits", "runs"):
                        assert not job.ended and not (job.absent and not job.may_return), (silent, silence, job)


def test_every_kind_of_job_was_captured() -> None:
    captured = {path.name for path in (ANSWERS / "22.05.8").iterdir()}
    wanted = {"waiting", "throttled", "no_array", "requeued", "preempted", "cancelled_by_administrator", "array_of_one",
              "out_of_memory_without_cgroups", "time_limit", "node_failure", "step_cancelled"}  # fmt: skip
    assert wanted <= captured and len([path for path in FOLDERS if path.parent.name == "cases"]) == 11
