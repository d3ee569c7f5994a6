"""A round on a site whose arms have GPUs, and a Slurm that takes every job."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_jobs, slurm_submit
from pipeline.cluster.slurm_jobs import Job
from pipeline.rounds import freeze
from pipeline.rounds.init import init
from tests.support.campaigns import GPUS, OVERRIDES, publish, publish_reference


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Slurm that takes every job: calls are what was submitted, states what it says of a job (COMPLETED by default)."""
    said = SimpleNamespace(calls=[], states={}, kept=[])

    def submit(
        slurm_dir, code_dir, arrays, meta_stage, resources, reference=None, recorded=(), judge=None, server=None
    ):
        number = len(said.calls)
        call = SimpleNamespace(
            arrays=arrays, meta=meta_stage, reference=reference, judge=judge, requests=resources.requests
        )
        said.calls.append(call)
        tasks = [[f"{number}70_{n}" for n in range(len(stages))] for stages in arrays]
        return {
            "kind": "slurm", "array_job_ids": [f"{number}70"] if arrays else [], "task_job_ids": tasks,
            "reference_job_id": f"{number}8" if reference else "", "judge_job_id": f"{number}6" if judge else "",
            "meta_job_id": f"{number}9", "submission": f"mark {number}",
        }  # fmt: skip

    def query_jobs(ids, names, since):
        return slurm_jobs.Report({each: Job(each, said.states.get(each, "FAILED")) for each in ids})

    monkeypatch.setattr(slurm_submit, "submit", submit)
    monkeypatch.setattr(slurm_submit, "keep", lambda folder, mark: said.kept.append(mark))
    monkeypatch.setattr(slurm_jobs, "query_jobs", query_jobs)
    return said


@pytest.fixture
def boarded(tmp_path: Path) -> Round:
    """The first round of a campaign with a local board on a site with GPUs; its arms and reference are judged on dev and fresh."""
    campaign = Campaign.at(tmp_path / "boarded")
    overrides = [*OVERRIDES, *GPUS, "external=local", "external.rows=6", "external.submissions=1"]
    init(campaign, overrides)
    made = freeze.freeze(campaign, "r0001", overrides)
    publish_reference(campaign, made)
    for number in range(8):
        publish(made, f"a{number}", 15 + number, adapter_digest=f"{number}" * 64)
    return made
