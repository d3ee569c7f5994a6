"""Kill `round` and `rerun` at every step of a submission: exactly one set of jobs survives the next command, and a healthy round is left alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.cluster import slurm_clients, slurm_jobs, slurm_sbatch
from pipeline.first_contact import stages
from pipeline.rounds import control, freeze, launch
from tests.support.campaigns import OVERRIDES, fresh_campaign
from tests.support.slurm_stand_ins import Queue

TAKES = 'take; echo "Submitted batch job $count"'


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    campaign = fresh_campaign(tmp_path)
    freeze.freeze(campaign, "r0001", [*OVERRIDES, "cluster=testbed"])
    return campaign


def killed_at(step: int, act: Callable[[], object]) -> bool:
    """Whether a process that does `act` is killed at this step: before or after a call of Slurm's clients, a written file or a mark."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    taken = [0]

    def deadly(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **keywords: object) -> object:
            for _ in ("before", "after"):
                taken[0] += 1
                if taken[0] == step:
                    os._exit(9)
                if taken[0] % 2:
                    found = function(*arguments, **keywords)
            return found

        return wrapped

    slurm_clients.run = deadly(slurm_clients.run)  # type: ignore[assignment]
    for module in (launch, slurm_jobs):
        module.write_file = deadly(module.write_file)  # type: ignore[attr-defined]
    for name in ("open", "keep"):
        setattr(slurm_sbatch.Mark, name, deadly(getattr(slurm_sbatch.Mark, name)))
    try:
        act()
    finally:
        os._exit(0)
    raise AssertionError


def queued(folder: Path) -> list[str]:
    path = folder / "queue"
    return [line.split("|")[0] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_case_04_round_killed_at_every_step(campaign: Campaign, cluster: Queue) -> None:
    slurm, folder = cluster(TAKES), campaign.round("r0001")
    step = 1
    while killed_at(step, lambda: launch.submit(campaign, folder)):
        try:
            launch.submit(campaign, folder)
        except ConfigError as error:
            assert "is submitted already" in str(error)
        record = read_json(folder.submitted)
        named = [*record["array_job_ids"], record["reference_job_id"], record["meta_job_id"]]
        assert queued(slurm) == named and len(named) == 4, step
        for path in (folder.submitted, folder.jobs, slurm / "queue", *(folder.slurm_dir / "submissions").glob("*")):
            path.unlink(missing_ok=True)
        step += 1
    assert step > 20


def test_case_04_rerun_leaves_a_healthy_round_alone_whenever_round_was_killed(
    campaign: Campaign, cluster: Queue
) -> None:
    slurm, folder = cluster(TAKES), campaign.round("r0001")
    step, refused, adopted = 1, 0, 0
    while killed_at(step, lambda: launch.submit(campaign, folder)):
        before = queued(slurm)
        try:
            control.rerun(campaign, folder, ["a3"], failed=False, dry_run=False, watch=lambda: None)
        except WorkFailed as error:
            refused += "was cut short" in str(error)
            adopted += "nobody knows whether job" in str(error)  # this squeue does not tell states, so the job may run
        assert queued(slurm) == before or not before  # where nothing was submitted yet, rerun starts a3 alone
        for path in (folder.submitted, folder.jobs, slurm / "queue", *(folder.slurm_dir / "submissions").glob("*")):
            path.unlink(missing_ok=True)
        step += 1
    assert refused > 5 and adopted > 2


def test_case_04_an_earlier_submission_stays_open_until_its_jobs_are_gone(campaign: Campaign, cluster: Queue) -> None:
    slurm, folder = cluster(TAKES), campaign.round("r0001")
    step = 1
    while len(queued(slurm)) < 2:  # killed later each time, until two of the jobs are left
        for path in (folder.slurm_dir / "submissions").glob("*"):
            path.unlink()
        (slurm / "queue").unlink(missing_ok=True)
        assert killed_at(step, lambda: launch.submit(campaign, folder))
        step += 1
    before = queued(slurm)
    (slurm / "squeue").rename(slurm / "away")
    (slurm / "squeue").write_text("#!/bin/sh\necho 'squeue: error: Socket timed out' >&2\nexit 1\n")
    (slurm / "squeue").chmod(0o755)
    with pytest.raises(WorkFailed, match="was cut short, and nobody knows whether its jobs run .*Socket timed out"):
        launch.submit(campaign, folder)
    (slurm / "away").rename(slurm / "squeue")
    scancel = (slurm / "scancel").read_text()
    (slurm / "scancel").write_text("#!/bin/sh\necho 'scancel: error: Socket timed out' >&2\nexit 1\n")
    with pytest.raises(WorkFailed, match="scancel failed: error: Socket timed out"):
        launch.submit(campaign, folder)
    assert queued(slurm) == before
    (slurm / "scancel").write_text(scancel)
    launch.submit(campaign, folder)
    assert len(queued(slurm)) == 4 and not set(before) & set(queued(slurm))


def test_another_cluster_s_login_node_neither_cancels_nor_starts(
    campaign: Campaign, cluster: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm, folder = cluster(TAKES), campaign.round("r0001")
    monkeypatch.setattr(slurm_clients, "cluster_name", lambda: "alpha")
    launch.submit(campaign, folder)
    before = queued(slurm)
    monkeypatch.setattr(slurm_clients, "cluster_name", lambda: "beta")
    said = "the round was submitted to cluster alpha, and Slurm's clients here ask beta"
    assert control.ask_slurm(folder).complaints == (said,)
    with pytest.raises(WorkFailed, match=f"does not answer .{said}"):
        control.rerun(campaign, folder, ["a3"], failed=False, dry_run=False, watch=lambda: None)
    assert queued(slurm) == before


def test_the_job_of_a_first_contact_is_submitted_once_wherever_its_command_was_killed(
    campaign: Campaign, cluster: Queue
) -> None:
    slurm, first = cluster(TAKES), campaign.round("r0000")
    code_dir, digest = launch.verify_frozen(campaign, first)
    (stage,) = launch.worker_stages(campaign, first, ["a0"], digest)
    step = 1
    while killed_at(step, lambda: stages.job_of(first, code_dir, stage)):
        job_id = stages.job_of(first, code_dir, stage)
        assert queued(slurm) == [job_id] and slurm_jobs.task_ids(first) == {"r0000/a0": job_id}, step
        for path in (first.jobs, slurm / "queue", *(first.slurm_dir / "submissions").glob("*")):
            path.unlink()
        step += 1
    assert step > 10
    job_id = stages.job_of(first, code_dir, stage)
    with pytest.raises(
        ConfigError, match=f"jobs of r0000 may wait or run already .r0000/a0 as {job_id}.*--round r0000"
    ):
        launch.submit(campaign, campaign.round("r0001"))
    assert queued(slurm) == [job_id], "the reference is not trained twice at once"
