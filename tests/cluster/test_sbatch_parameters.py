"""Test the flags of each role's jobs, and that sbatch itself reads them from a script as they were meant."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cluster import sbatch_parameters
from pipeline.config.requests import ROLES, Request
from tests.support.resources import CPU

ODD = {"constraint": "[rack1*2&a100|h100]", "account": "it's a lab", "qos": 'a#b "c" $HOME', "reservation": "%j 100%"}
CONF = """ClusterName=here
SlurmctldHost=localhost(127.0.0.1)
AuthType=auth/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu,lscratch
NodeName=n1 CPUs=4 Gres=gpu:8
PartitionName=main Nodes=n1 Default=YES
"""


def text_of(request: Request, role: str = "array_0", **further) -> str:
    resources = sbatch_parameters.Resources("demo-r0001", dict.fromkeys(ROLES, request), 30, **further)
    stages = [[("worker", "/runs/demo", "r0001", f"a{n}") for n in range(8)]]
    return sbatch_parameters.sbatch_texts(Path("/runs/demo/slurm"), Path("/code"), stages, resources)[role]


def test_nodes_to_avoid_join_those_that_the_site_s_file_excludes():
    request = replace(CPU, sbatch={"exclude": "n3"})
    assert "#SBATCH --exclude=n3\n" in text_of(request)
    assert "#SBATCH --exclude=n3,n5,n7\n" in text_of(request, excluded_nodes=("n5", "n7"))
    assert "#SBATCH --exclude=n5\n" in text_of(CPU, excluded_nodes=("n5",))


def test_case_06_srun_is_told_the_cores_of_each_role_and_leaves_them_to_slurm_where_they_follow_from_gpus():
    resources = sbatch_parameters.Resources(
        "demo-r0001", {"worker": replace(CPU, cpus_per_task=64), "reference": CPU, "meta": CPU}, 30
    )
    for role, cores in (("worker", 64), ("meta", 2)):
        assert (
            f"export SRUN_CPUS_PER_TASK={cores}"
            in sbatch_parameters.parameters(Path("/code"), resources, role)["setup"]
        )
    by_gpu = text_of(replace(CPU, gpus_per_node=2, gpus=2, cpus_per_gpu=8, cpus_per_task=16))
    assert (
        "#SBATCH --cpus-per-gpu=8\n" in by_gpu and "cpus-per-task" not in by_gpu and "SRUN_CPUS_PER_TASK" not in by_gpu
    )


@pytest.mark.skipif(
    shutil.which("sbatch") is None, reason="needs sbatch, which reads the flags here without a controller"
)
@pytest.mark.parametrize(
    ("changes", "read"),
    [
        (ODD, ODD),
        ({"gpus_per_node": 8, "gpus": 8, "gpu_type": "h200", "mem": "2T", "time_limit_minutes": 2160},
         {"gpus-per-node": "h200:8", "mem": "2T", "time": "1-12:00:00", "cpus-per-task": "2"}),
        ({"gpus_per_node": 1, "gpus": 1, "gres": "gpu:a100_1g.5gb:1,lscratch:100G"}, {"gres": "gres:gpu:a100_1g.5gb:1,gres:lscratch:100G"}),
        ({"gpus_per_node": 2, "gpus": 2, "cpus_per_gpu": 8, "mem_per_gpu": "100G"},
         {"cpus-per-gpu": "8", "mem-per-gpu": "100G", "gpus-per-node": "2"}),
        ({"gpus_per_node": 2, "gpus": 2, "sbatch": {"gpus-per-task": "h200:2", "gpu-bind": "closest"}},
         {"gpus-per-task": "h200:2", "gpu-bind": "closest"}),
        ({"sbatch": {"exclusive": "", "licenses": "matlab:1,ansys:2", "nodelist": "n1"}},
         {"exclusive": "exclusive", "licenses": "matlab:1,ansys:2", "nodelist": "n1"}),
        ({"mem_per_cpu": "4GB"}, {"mem-per-cpu": "4G", "signal": "USR2@30", "array": "0-7%8", "requeue": "requeue"}),
        ({"mem": "0"}, {"mem": "0?"}),
    ],
)  # fmt: skip
def test_case_06_sbatch_reads_every_flag_as_it_was_meant(changes, read, tmp_path):
    """Only the parsing is of interest: sbatch prints the options that it read, then looks for a controller, and is ended."""
    (tmp_path / "slurm.conf").write_text(CONF)
    (tmp_path / "script").write_text(text_of(replace(CPU, **changes)))
    environment = {"PATH": os.environ["PATH"], "SLURM_CONF": str(tmp_path / "slurm.conf")}
    found, said = {}, []
    command = ["sbatch", "-v", "--test-only", "script"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or []:
            said.append(line)
            if "end of defined options" in line:
                break
            if match := re.match(r"sbatch: ([a-z-]+) +: (.*)$", line):
                found[match[1]] = "requeue" if match[1] == "requeue" else match[2]
        process.kill()
    assert {name: found.get(name) for name in read} == read, said
    asked = {
        "cpus-per-gpu",
        "cpus-per-task",
        "gpus-per-node",
        "gpus-per-task",
        "gres",
        "mem",
        "mem-per-gpu",
        "mem-per-cpu",
    } & set(found)
    assert asked <= set(read) | {"cpus-per-task"}
