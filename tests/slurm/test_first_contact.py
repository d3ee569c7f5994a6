"""Take the testbed through the gates up to one that submits a job: the job runs, a killed command's job is waited for, another's is ended."""

import subprocess
import sys
from typing import Any

import pytest

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.cluster import slurm_jobs
from pipeline.first_contact.visit import Visit
from tests.slurm.playing import ROOT, own, pipeline, queued, states, until

OVERRIDES = ["cluster=testbed", "experiment=smoke", "parallelism=tp1"]

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def killed_beside_its_job(campaign: Campaign, *words: str) -> str:
    """Start a first contact, and kill the command as soon as its job is recorded. Returns the job's id."""
    folder = Visit(campaign, OVERRIDES).probe_round
    known = slurm_jobs.task_ids(folder)
    command = [sys.executable, "-m", "pipeline", "first-contact", str(campaign.folder), *OVERRIDES, *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: slurm_jobs.task_ids(folder) not in ({}, known), "the job of the forward pass", 60)
    process.kill()
    process.wait()
    (job_id,) = slurm_jobs.task_ids(folder).values()
    return job_id


def test_the_forward_pass_runs_as_a_job_that_survives_the_command(
    testbed: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    campaign = Campaign.at(own(tmp_path_factory.mktemp("campaigns")) / "site")
    other = killed_beside_its_job(campaign, "seed=7", "--until", "forward")
    # Another configuration ends that job, which would else work on in the new folder.
    job_id = killed_beside_its_job(campaign, "--until", "forward")
    assert other not in queued() and job_id != other
    pipeline("first-contact", campaign.folder, *OVERRIDES, "--until", "forward")
    passed = read_json(campaign.folder.with_name("site.first-contact") / "gates.json")["passed"]
    assert "nats a token on plain English" in passed["forward"]["found"]
    probe = Visit(campaign, OVERRIDES).probe_round
    assert list(slurm_jobs.task_ids(probe).values()) == [job_id], "the same job, and no second one"
    assert states(job_id) == {job_id: "COMPLETED"} and not queued()
