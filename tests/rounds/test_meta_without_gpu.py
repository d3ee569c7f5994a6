"""Test a meta job without GPUs on a site whose arms have them: what it does, what it cannot do, and who does that instead."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_jobs, slurm_submit
from pipeline.cluster.slurm_jobs import Job
from pipeline.rounds import control, freeze, launch, meta
from pipeline.rounds.init import init
from tests.support.campaigns import OVERRIDES, fresh_campaign, publish, publish_reference, tree

GPUS = ["cluster=slurm", "cluster.gpus_per_node=2", "cluster.file_wait_seconds=0"]


@pytest.fixture
def folder(tmp_path: Path) -> Round:
    """The first round, frozen for a site with GPUs, whose arms all have a score and whose reference is judged."""
    campaign = fresh_campaign(tmp_path)
    made = freeze.freeze(campaign, "r0001", [*OVERRIDES, *GPUS])
    publish_reference(campaign, made)
    for number in range(8):
        publish(made, f"a{number}", 15 + number)
    return made


def test_case_06_the_meta_job_asks_for_no_gpu_few_cores_and_a_short_time(folder: Round) -> None:
    texts = {path.stem: path.read_text() for path in folder.slurm_dir.glob("*.sbatch")}
    assert [name for name in sorted(texts) if "#SBATCH --gpus-per-node=2\n" in texts[name]] == [
        "array_0",
        "array_1",
        "reference",
    ]
    asked = {line for line in texts["meta"].splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --cpus-per-task=4", "#SBATCH --mem=16G", "#SBATCH --time=180"} <= asked
    assert not any("gpu" in line for line in asked)


def test_the_meta_job_decides_without_a_gpu(folder: Round) -> None:
    assert meta.close(folder.campaign, folder).state == "decided"


def test_a_reference_that_nobody_judged_is_named_with_what_to_type(folder: Round) -> None:
    (folder.folder / "reference.h5").unlink()
    before = tree(folder.campaign.folder)
    with pytest.raises(WorkFailed) as error:
        meta.close(folder.campaign, folder)
    assert error.value.what.startswith(
        "no job has judged the reference on the fresh items of r0001, and it cannot be judged here: cluster.gpus"
    )
    assert f"`python -m pipeline rerun {folder.campaign.folder} --round r0001`" in error.value.cure
    assert "cluster.meta.gpus_per_node" in error.value.cure
    assert tree(folder.campaign.folder) == before


def test_where_the_node_has_a_gpu_the_meta_stage_judges_as_before(
    folder: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.folder / "reference.h5").unlink()
    folder.campaign.round("r0000").claim_attempt("a0")
    monkeypatch.setattr(meta.devices, "of_node", lambda *words: None)
    monkeypatch.setattr(meta.judge, "judge_once", lambda *words: pytest.fail("it judges"))
    with pytest.raises(pytest.fail.Exception, match="it judges"):
        meta.close(folder.campaign, folder)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What was submitted. Slurm knows no job of the round any more."""
    calls: list[SimpleNamespace] = []

    def submit(slurm_dir, code_dir, arrays, meta_stage, resources, reference=None, recorded=()):
        calls.append(SimpleNamespace(arrays=arrays, meta=meta_stage, reference=reference, requests=resources.requests))
        tasks = [[f"7{number}_{n}" for n in range(len(stages))] for number, stages in enumerate(arrays)]
        ids = {
            "kind": "slurm",
            "array_job_ids": ["7"],
            "task_job_ids": tasks,
            "reference_job_id": "8" if reference else "",
            "meta_job_id": "9",
        }
        return {**ids, "submission": "the mark"}

    monkeypatch.setattr(slurm_submit, "submit", submit)
    monkeypatch.setattr(slurm_submit, "keep", lambda folder, mark: None)
    slurm_says(monkeypatch)
    return calls


def slurm_says(monkeypatch: pytest.MonkeyPatch, reference: str = "FAILED") -> None:
    """Let Slurm say that every job failed, but for the reference's, which has the id 8."""

    def query_jobs(ids, names, since):
        return slurm_jobs.Report({each: Job(each, reference if each == "8" else "FAILED") for each in ids})

    monkeypatch.setattr(slurm_jobs, "query_jobs", query_jobs)


def rerun(folder: Round, *arms: str, dry_run: bool = False) -> list[str]:
    return control.rerun(folder.campaign, folder, arms, failed=False, dry_run=dry_run, watch=lambda: None)


def test_rerun_has_the_reference_judged_and_the_meta_job_again(folder: Round, submitted: list[SimpleNamespace]) -> None:
    assert rerun(folder) == [] and submitted == []
    (folder.folder / "reference.h5").unlink()
    assert rerun(folder, dry_run=True) == ["reference: one more job"] and submitted == []
    assert rerun(folder) == ["reference: job 8"]
    (call,) = submitted
    assert (call.arrays, call.reference[0], call.meta[0]) == ([], "reference", "meta")
    assert (call.requests["reference"].gpus_per_node, call.requests["meta"].gpus_per_node) == (2, 0)
    (line,) = read_json_lines(folder.jobs)
    assert (line["tasks"], line["meta"], line["why"]) == ({"reference": "8"}, "9", "rerun")


def test_rerun_of_arms_brings_the_reference_only_where_no_job_of_it_waits_or_runs(
    folder: Round, submitted: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.folder / "reference.h5").unlink()
    folder.published("a3").unlink()
    assert rerun(folder, "a3") == ["r0001/a3: job 70_0"]
    assert submitted[-1].reference is None
    assert rerun(folder) == ["r0001/a3: job 70_0", "reference: job 8"]
    for state in ("PENDING", "RUNNING", "UNKNOWN", "PREEMPTED"):  # the last two may still run, or come back
        slurm_says(monkeypatch, reference=state)
        assert rerun(folder) == ["r0001/a3: job 70_0"]
        assert submitted[-1].reference is None


def test_a_local_board_that_a_small_meta_job_could_not_judge_is_refused_at_init_and_in_a_dry_run(
    tmp_path: Path, capsys
) -> None:
    overrides = [*OVERRIDES, *GPUS, "external=local", "external.rows=6"]
    with pytest.raises(ConfigError, match="external=local is judged by the meta job") as error:
        init(Campaign.at(tmp_path / "boarded"), overrides)
    assert error.value.cure.startswith("Set cluster.meta.gpus_per_node=1")
    assert main(["round", str(tmp_path / "boarded"), *overrides, "--dry-run"]) == 2
    assert "external=local is judged by the meta job" in capsys.readouterr().err
    assert not (tmp_path / "boarded").exists()
    assert (
        main(["round", str(tmp_path / "boarded"), *overrides, "cluster.meta.gpus_per_node=1", "--dry-run", "--json"])
        == 0
    )
    text = json.loads(capsys.readouterr().out)["sbatch"]["meta.sbatch"]
    assert "#SBATCH --gpus-per-node=1\n" in text and "#SBATCH --cpus-per-task=4\n" in text


def test_resources_of_a_round_are_those_of_its_frozen_file(folder: Round) -> None:
    assert {role: request.gpus_per_node for role, request in launch.resources(folder).requests.items()} == {
        "worker": 2, "reference": 2, "meta": 0,
    }  # fmt: skip
