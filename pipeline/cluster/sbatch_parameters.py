"""What the jobs of a round ask of Slurm, as submitit's parameters, the sbatch texts that follow from them, and how many jobs share a node.

submitit puts each value into quotes as a shell needs them, and sbatch reads an #SBATCH line likewise. Only a backslash is read otherwise;
config/requests.py refuses it.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.stage_command import Stage
from pipeline.config.requests import ROLES, Request, has_gpu_flag
from pipeline.sandbox.devices import REQUESTED


@dataclass(frozen=True)
class Resources:
    """What the jobs of one round ask of Slurm. requests: role (worker, reference, judge, agent or meta) -> what its jobs ask for."""

    job_name: str
    requests: Mapping[str, Request]
    signal_lead_seconds: int
    nodes: int = 1  # of an arm; judging and deciding need one
    arms_at_once: int = 0
    setup: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    excluded_nodes: tuple[str, ...] = ()  # beside those that a request excludes
    comment: str = ""  # an anchor of the sealed log, for sites whose accounting keeps comments


def flags_of(request: Request, excluded_nodes: Sequence[str] = ()) -> dict[str, str | bool]:
    """Flag of sbatch -> its value, or True for a flag without one: all that a request asks for but its time, which submitit needs apart."""
    names = ("partition", "account", "qos", "reservation", "constraint", "gres", "mem", "mem_per_gpu", "mem_per_cpu")
    flags: dict[str, str | bool] = {name.replace("_", "-"): text for name in names if (text := getattr(request, name))}
    cores = "cpus_per_gpu" if request.cpus_per_gpu else "cpus_per_task"
    flags[cores.replace("_", "-")] = str(getattr(request, cores))
    if request.gpus and not has_gpu_flag(request):
        flags["gpus-per-node"] = f"{request.gpu_type}:{request.gpus}".removeprefix(":")
    flags |= {name: value or True for name, value in request.sbatch.items()}
    if excluded_nodes:
        flags["exclude"] = ",".join(filter(None, [request.sbatch.get("exclude"), *excluded_nodes]))
    return flags


def parameters(code_dir: Path, resources: Resources, role: str) -> dict[str, Any]:
    """The parameters of submitit for the jobs of a role: worker (or array, as their texts are named), reference, judge, agent or meta."""
    role = "worker" if role == "array" else role
    request = resources.requests[role]
    # The ranks of several nodes have the host's network, so nobody else may run on these nodes.
    alone = {"exclusive": True} if role == "worker" and resources.nodes > 1 else {}
    given: dict[str, Any] = {
        "job_name": f"{resources.job_name}-{'arms' if role == 'worker' else role}",
        "time": request.time_limit_minutes,
        "nodes": resources.nodes if role == "worker" else 1,
        "ntasks_per_node": 1,
        "signal_delay_s": resources.signal_lead_seconds,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": [
            *resources.setup,
            # From Slurm 22.05 on srun does not take the number of cores from the job, and would bind the stage to one.
            *([] if request.cpus_per_gpu else [f"export SRUN_CPUS_PER_TASK={request.cpus_per_task}"]),
            f"export {REQUESTED}={request.gpus}",
            f"export PYTHONPATH={shlex.quote(str(code_dir))}",
            *([f"export POSTRAIN_RUNTIME={shlex.quote(shlex.join(resources.runtime))}"] if resources.runtime else []),
        ],
        "additional_parameters": {"requeue": True, **flags_of(request, resources.excluded_nodes), **alone},
    }
    if resources.comment:
        given["comment"] = resources.comment
    if resources.arms_at_once:
        given["array_parallelism"] = resources.arms_at_once
    return given


@dataclass(frozen=True)
class Room:
    """How many jobs of one request a node takes at once, and what limits that, in words."""

    jobs: int
    why: str


def room_on_node(
    request: Request, cores: int, megabytes: int, partition: Mapping[str, str], config: Mapping[str, str]
) -> Room:
    """What a node has room for, at least one job. cores, megabytes: that it has, 0 where the site does not say so.

    partition, config: what scontrol prints of both, in which memory that nobody asks for has its default.
    """
    if request.is_exclusive:
        return Room(1, "cluster.sbatch.exclusive gives a job the whole node")
    limits = {}
    if request.gpus:
        limits[f"{request.gpus} of {request.gpus_per_node} GPUs"] = request.gpus_per_node // request.gpus
    if cores:
        limits[f"{request.cpus_per_task} of {cores} cores"] = cores // request.cpus_per_task
    asked = request.megabytes or _default_memory(request, partition, config)
    if asked and megabytes:
        size = f"{min(asked, megabytes) / 1024:,.0f} of {megabytes / 1024:,.0f} GiB of memory"
        by_default = "" if request.megabytes else ", the site's default, because cluster.mem is empty"
        limits[size + by_default] = int(megabytes // asked)
    return Room(max(1, min(limits.values(), default=1)), f"each takes {', '.join(limits)}")


def _default_memory(request: Request, partition: Mapping[str, str], config: Mapping[str, str]) -> float:
    """The megabytes that Slurm gives to a job which asks for none: 0 where it does not count memory, infinity for all of the node."""
    if "MEMORY" not in config.get("SelectTypeParameters", "MEMORY").upper():
        return 0
    times = {"DefMemPerGPU": request.gpus, "DefMemPerCPU": request.cpus_per_task, "DefMemPerNode": 1}
    for said in (partition, config):
        given = {**said, **dict(re.findall(r"(\w+)=(\d+)", said.get("JobDefaults", "")))}
        for name, number in times.items():
            if given.get(name, "").isdigit() and int(given[name]) * number:
                return int(given[name]) * number
    return float("inf")


def sbatch_texts(
    folder: Path, code_dir: Path, arrays: Sequence[Sequence[Stage]], resources: Resources
) -> dict[str, str]:
    """Job name -> the script that `submit` would give to sbatch. Needs no Slurm."""
    from submitit.slurm.slurm import _make_sbatch_string

    text = {}
    jobs = [
        *((f"array_{number}", stages) for number, stages in enumerate(arrays)),
        *((name, []) for name in ROLES[1:] if name in resources.requests),
    ]
    for name, stages in jobs:
        given = parameters(code_dir, resources, name.split("_")[0])
        if stages:
            given["map_count"] = len(stages)
        elif name == "reference" and arrays[1:]:
            given["dependency"] = "afterany:<id of array_1>"
        elif name == "meta":
            given["dependency"] = "afterany:<ids of the arrays and of the reference job>"
        body = f"{shlex.quote(sys.executable)} -P -u -m submitit.core._submit {shlex.quote(str(folder))}"
        text[name] = _make_sbatch_string(command=body, folder=folder, **given)
    return text
