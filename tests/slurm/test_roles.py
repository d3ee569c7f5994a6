"""Submit the jobs of a round whose roles ask for different things, and compare with what Slurm gave to each.

The frozen code is a stand-in that writes down what its job sees. The testbed does not bind tasks to cores, so the step's cores are taken
from accounting.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import sbatch_parameters, slurm_submit
from pipeline.config.requests import Request
from tests.slurm.playing import ROOT, accounted, states, until, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SEEN = """
names = ("SLURM_JOB_PARTITION", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "SLURM_MEM_PER_NODE", "SLURM_JOB_NUM_NODES")
content = json.dumps({name: os.environ.get(name) for name in names})
Path(FOLDER, sys.argv[1] + "." + os.environ.get("SLURM_ARRAY_TASK_ID", "job")).write_text(content)
"""
CPU = Request(
    partition="cpu",
    account="",
    qos="",
    reservation="",
    constraint="",
    gpus_per_node=0,
    cpus_per_task=1,
    time_limit_minutes=5,
)
WORKER = replace(
    CPU,
    partition="main",
    gpus_per_node=8,
    gpus=2,
    cpus_per_task=3,
    mem="1G",
    time_limit_minutes=10,
    sbatch={"nice": "1"},
)
REFERENCE = replace(CPU, partition="main", gpus_per_node=8, gpus=1, gres="gpu:1", cpus_per_gpu=2, cpus_per_task=2)


@pytest.fixture
def stage_of(tmp_path: Path) -> Any:
    """Makes the stage of a role. Its frozen code writes what the job sees into a file that has the command's name."""
    package = tmp_path / "code" / "pipeline"
    shutil.copytree(ROOT / "pipeline", package, ignore=shutil.ignore_patterns("__pycache__"))
    text = "import json, os, sys\nfrom pathlib import Path\n" + SEEN.replace("FOLDER", repr(str(tmp_path)))
    (package / "__main__.py").write_text(text)
    return lambda role, *arm: (role, str(tmp_path), "r0001", *arm)


def test_case_06_each_role_gets_its_partition_gpus_and_cores(testbed: Any, tmp_path: Path, stage_of: Any) -> None:
    asked = sbatch_parameters.Resources(
        "roles-r0001", {"worker": WORKER, "reference": REFERENCE, "judge": REFERENCE, "meta": CPU}, 30, arms_at_once=2
    )
    arrays = [[stage_of("worker", "a0"), stage_of("worker", "a1")]]
    ids = slurm_submit.submit(
        tmp_path / "slurm", tmp_path / "code", arrays, stage_of("meta"), asked, stage_of("reference")
    )
    seen = {}
    for name in ("worker.0", "worker.1", "reference.job", "chain.job"):
        wait_for(tmp_path / name, f"what the job of {name} sees")
        seen[name.split(".")[0]] = json.loads((tmp_path / name).read_text())
    array, reference, meta = ids["array_job_ids"][0], ids["reference_job_id"], ids["meta_job_id"]
    steps = {f"{job}.0" for job in (f"{array}_0", f"{array}_1", reference, meta)}
    until(lambda: steps <= set(accounted(f"{array},{reference},{meta}", "State")), "the account of every step", 60)
    assert set(states(array, reference, meta).values()) == {"COMPLETED"}

    assert {role: each["SLURM_JOB_PARTITION"] for role, each in seen.items()} == {
        "worker": "main",
        "reference": "main",
        "chain": "cpu",
    }
    assert {role: each["SRUN_CPUS_PER_TASK"] for role, each in seen.items()} == {
        "worker": "3",
        "reference": None,
        "chain": "1",
    }
    gpus = {role: len((each["CUDA_VISIBLE_DEVICES"] or "").replace(",", " ").split()) for role, each in seen.items()}
    assert gpus == {"worker": 2, "reference": 1, "chain": 0}
    assert seen["worker"]["SLURM_MEM_PER_NODE"] == "1024"
    cores, allocated = (accounted(f"{array},{reference},{meta}", column) for column in ("NCPUS", "AllocTRES"))
    assert [cores[f"{job}.0"] for job in (f"{array}_0", f"{array}_1", reference, meta)] == ["3", "3", "2", "1"]
    assert "gres/gpu=2" in allocated[f"{array}_0"] and "gpu" not in allocated[meta]
    assert accounted(f"{array},{meta}", "Timelimit")[f"{array}_1"] == "00:10:00"
