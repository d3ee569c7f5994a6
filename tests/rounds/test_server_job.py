"""The job that serves the agents' model: when a meta job cancels it, and how its submission is recorded."""

from pathlib import Path

import pytest

from pipeline.campaign.errors import WorkFailed
from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_clients, slurm_jobs
from pipeline.rounds import chain, control, launch


@pytest.fixture
def folder(tmp_path: Path) -> Round:
    return Campaign.at(tmp_path / "demo").round("r0001")


@pytest.mark.parametrize(
    ("states", "is_cancelled"),
    [
        ({"r0001/a1": "COMPLETED", "r0001/a2": "FAILED", "agent": "RUNNING"}, True),
        ({"r0001/a1": "CANCELLED", "agent": "PENDING", "reference": "RUNNING"}, True),
        ({"r0001/a1": "COMPLETED", "r0001/a2": "RUNNING", "agent": "RUNNING"}, False),  # `rerun` started an arm again
        ({"r0001/a1": "PENDING", "agent": "RUNNING"}, False),
        ({"r0001/a1": "PREEMPTED", "agent": "RUNNING"}, False),  # Slurm may bring the arm back
        ({"r0001/a1": "COMPLETED", "agent": "COMPLETED"}, False),
        ({"r0001/a1": "COMPLETED"}, False),
        ({}, False),
    ],
)
def test_the_meta_job_cancels_it_once_no_arm_can_ask(
    folder: Round, states: dict[str, str], is_cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {name: slurm_jobs.Job(str(number), state) for number, (name, state) in enumerate(states.items())}
    cancelled: list[str] = []
    monkeypatch.setattr(control, "ask_slurm", lambda folder: slurm_jobs.Report(jobs))
    monkeypatch.setattr(slurm_clients, "cancel_jobs", cancelled.extend)
    said = chain.stop_server(folder)
    assert cancelled == ([jobs["agent"].job_id] if is_cancelled else []) and bool(said) == is_cancelled


def test_a_refused_scancel_is_told_and_holds_up_nothing(folder: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(ids: object) -> None:
        raise WorkFailed("scancel failed: Access denied", "Check")

    monkeypatch.setattr(
        control, "ask_slurm", lambda folder: slurm_jobs.Report({"agent": slurm_jobs.Job("7", "RUNNING")})
    )
    monkeypatch.setattr(slurm_clients, "cancel_jobs", refused)
    assert "job 7, was not cancelled: scancel failed: Access denied" in chain.stop_server(folder)


def test_its_job_is_recorded_with_the_arms_so_that_cancel_and_status_know_it(folder: Round) -> None:
    stages = [[("worker", "/runs/demo", "r0001", "a1", "--plan", "0")]]
    ids = {"task_job_ids": [["12_0"]], "agent_job_id": "11", "reference_job_id": "13"}
    tasks = launch.tasks_of(stages, ids)
    assert tasks == {"r0001/a1": "12_0", "agent": "11"}
    folder.folder.mkdir(parents=True)
    slurm_jobs.record_submission(folder, tasks, "14", "round", ids)
    assert slurm_jobs.task_ids(folder) == {"r0001/a1": "12_0", "agent": "11", "meta": "14"}
    assert ("agent", "11") in slurm_jobs.all_ids(folder)
    assert "agent" not in launch.tasks_of(stages, {**ids, "agent_job_id": ""})
