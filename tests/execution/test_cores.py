"""Test that a task says on how many cores it may run, and that `status` shows it where its job asked for more."""

import json
import os
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from pipeline.config import settings
from pipeline.execution import cores, multinode
from pipeline.reporting import status, terminal_tables
from tests.support.campaigns import frozen_campaign


@pytest.fixture
def one_core():
    """This process bound to one core, as srun binds a task that it was not told the number for."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield min(before)
    os.sched_setaffinity(0, before)


def test_case_06_fewer_cores_than_asked_for_are_a_warning_in_the_log(one_core, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    chosen = settings.compose(["cluster=slurm", "cluster.gpus_per_node=2", "cluster.cpus_per_gpu=48"])
    assert cores.cores(chosen) == {"cores": 1, "cores_asked": 96, "core_list": str(one_core)}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: this task may run on 1 of the 96 cores that cluster.cpus_per_task asks for")
    assert f"(cores {one_core})" in line and "SRUN_CPUS_PER_TASK" in line and "--cpus-per-task=96" in line


def test_as_many_cores_as_asked_for_are_no_warning(one_core, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    asked = cores.cores(settings.compose(["cluster=testbed", "cluster.cpus_per_task=1"]))
    assert asked == {"cores": 1, "cores_asked": 1, "core_list": str(one_core)}
    assert f"this task has the cores {one_core} of " in capsys.readouterr().err
    assert cores.cores(settings.compose(["cluster=local"]))["cores_asked"] == 0
    monkeypatch.delenv("SLURM_JOB_ID")
    assert cores.cores(settings.compose(["cluster=slurm"]))["cores_asked"] == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("worker", "helper", "shown"),
    [
        ({"cores": 1, "cores_asked": 64}, None, "1 of 64"),
        ({"cores": 64, "cores_asked": 64}, {"cores": 2, "cores_asked": 64}, "2 of 64"),
        ({"cores": 128, "cores_asked": 64}, {"cores": 64, "cores_asked": 64}, ""),
        ({"cores": 2, "cores_asked": 0}, None, ""),
        ({}, None, ""),  # a claim of older code
    ],
)
def test_status_shows_the_task_with_the_fewest_cores(tmp_path, worker, helper, shown):
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    made = folder.claim_attempt("a1")
    made.claim.write_text(json.dumps({"host": "n1", "pid": 1, "slurm_job_id": "7", "node": "n1"} | worker))
    made.phases.write_text(json.dumps({"phase": "train", "at": time.time(), "detail": ""}) + "\n")
    if helper:
        (made.folder / "nodes").mkdir()
        (made.folder / "nodes" / "1.cores.json").write_text(json.dumps(helper))
    rows = status.round_status(campaign, folder)
    assert [row.cores for row in rows if row.cores is not None] == ([int(shown.split()[0])] if shown else [])
    columns = [column.header for column in terminal_tables.table(rows).columns]
    assert ("cores" in columns) == bool(shown)
    told = asdict(rows[1])
    assert f"{told['cores']} of {told['cores_asked']}" == (shown or "None of None")


def test_a_helper_writes_down_its_cores(tmp_path, one_core, monkeypatch, capsys):
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    made = folder.claim_attempt("a1")
    made.claim.write_text(json.dumps({"slurm_job_id": "41", "restart": "0"}))
    for name, value in {"SLURM_JOB_ID": "41", "POSTRAIN_TASK": "1", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    chosen = settings.compose(["cluster=testbed", "cluster.cpus_per_task=5"])
    monkeypatch.setattr(multinode.settings, "load", lambda path: chosen)
    monkeypatch.setattr(multinode.namespace, "scratch_folder", lambda *words: pytest.fail("it wrote nothing before"))
    monkeypatch.setattr(
        multinode,
        "signal",
        SimpleNamespace(signal=lambda *words: None, **{n: 0 for n in ("SIGUSR2", "SIGTERM", "SIGINT", "SIG_IGN")}),
    )
    with pytest.raises(pytest.fail.Exception):
        multinode.help_with(campaign, folder, "a1")
    assert json.loads((made.folder / "nodes" / "1.cores.json").read_text()) == {
        "cores": 1,
        "cores_asked": 5,
        "core_list": str(one_core),
    }
    assert "1 of the 5 cores" in capsys.readouterr().err
