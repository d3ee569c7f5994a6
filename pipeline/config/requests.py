"""What each kind of job asks of Slurm: the requests of `cluster`, filled in for every role. (What they may say: request_rules.py.)

The keys of `cluster` describe a node, and `parallelism` says how many GPUs an arm needs. A job asks for the GPUs that its work needs, and
for the same share of the node's cores and memory. `cluster.worker`, `cluster.reference`, `cluster.judge`, `cluster.agent` (the server of
the agents' model) and `cluster.meta` replace some keys for one role, and what they say is asked for as it is. `resolved` fills the requests
in while a configuration is composed. From then on `cluster` itself is what a worker asks for, and those of the other roles are complete.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

from pipeline.campaign.errors import ConfigError

ROLES = ("worker", "reference", "judge", "agent", "meta")


@dataclass(kw_only=True)
class Request:
    """What one kind of job asks of Slurm. An empty text or 0 leaves a value to the site's default."""

    partition: str
    account: str
    qos: str
    reservation: str
    constraint: str
    gpus_per_node: int  # that a node has
    gpus: int = 0  # that the job asks for on each of its nodes
    gpu_type: str = ""  # such as h200
    gres: str = ""  # --gres; where it names GPUs, they are not asked for by --gpus-per-node
    cpus_per_task: int  # that the job asks for on each of its nodes, because one task runs on each
    cpus_per_gpu: int = 0  # instead of cpus_per_task
    mem: str = ""  # likewise, with its unit, such as 900G; "0" is all that the node has
    mem_per_gpu: str = ""
    mem_per_cpu: str = ""
    time_limit_minutes: int
    sbatch: dict[str, str] = field(default_factory=dict)  # further flags; an empty text is a flag without a value

    @property
    def is_exclusive(self) -> bool:
        """Whether no other job may share its nodes; `exclusive: user` lets those of the same user."""
        return self.sbatch.get("exclusive") == ""

    @property
    def megabytes(self) -> float:
        """The memory that it asks for on a node; 0 for the site's default, infinity for all that the node has."""
        if self.mem == "0":
            return float("inf")
        each = {self.mem: 1, self.mem_per_gpu: self.gpus, self.mem_per_cpu: self.cpus_per_task}
        sizes = [(re.fullmatch(r"(\d+)([KMGT])B?", text, re.IGNORECASE), times) for text, times in each.items() if text]
        return sum(int(size[1]) * 1024.0 ** (UNITS.index(size[2].upper()) - 1) * times for size, times in sizes if size)


UNITS = "KMGT"  # of memory, each 1,024 times the one before
MEMORY, CORES = ("mem", "mem_per_gpu", "mem_per_cpu"), ("cpus_per_task", "cpus_per_gpu")
FOR_GPUS = ("gpu_type", "cpus_per_gpu", "mem_per_gpu")
FLAGS_FOR_GPUS = ("gpu-bind", "gpu-freq", "gpus-per-task")


def resolved(cluster: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """Return `cluster` of a configuration with every role's request filled in; resolving it again changes nothing.

    cluster, layout: plain values of `cluster` and `parallelism`, whose types are not checked yet. Raises ConfigError for a value that is none
    of its kind, such as a malformed time, and for a key that no request has.
    """
    shared = {name: value for name, value in cluster.items() if name not in ROLES}
    # What stood in the place of `mem` in rounds that were frozen before roles had requests.
    old = shared.pop("mem_gb", 0)
    if old and not shared.get("mem"):
        shared["mem"] = f"{old}G"
    base = _read({name: value for name, value in shared.items() if name in _names()}, "cluster.")
    needed = _needed(shared.get("ranks_per_node"), base.get("gpus_per_node"), layout)
    is_resolved = _is_resolved(cluster)
    if is_resolved:
        needed["worker"] = base["gpus"]
    full = {
        role: _filled(base, cluster.get(role), f"cluster.{role}.", needed[role], is_scaled=is_resolved)
        for role in ROLES
    }
    return {**shared, **full.pop("worker"), **full}


def _is_resolved(cluster: Mapping[str, Any]) -> bool:
    """Whether the requests are filled in already, as in the configuration of a frozen round: then nothing is scaled a second time."""
    own = [cluster.get(role) for role in ROLES[1:]]
    return (
        "worker" not in cluster
        and "gpus" in cluster
        and all(isinstance(each, Mapping) and set(each) == set(_names()) and None not in each.values() for each in own)
    )


def _needed(ranks_per_node: Any, gpus_per_node: Any, layout: Mapping[str, Any]) -> dict[str, int]:
    """Role -> the GPUs that its work needs on a node: a worker one for each rank, judging and serving a model judge_tp, and deciding none."""
    sizes = [layout.get(axis) for axis in ("tp", "pp", "cp", "dp")]
    ranks = prod(size for size in sizes if isinstance(size, int))
    judge_tp = layout.get("judge_tp")
    if isinstance(gpus_per_node, int):
        ranks = min(ranks, gpus_per_node)
    arm = ranks_per_node if isinstance(ranks_per_node, int) and ranks_per_node > 0 else ranks
    judging = judge_tp if isinstance(judge_tp, int) else 1
    return {"worker": arm, "reference": judging, "judge": judging, "agent": judging, "meta": 0}


def _names() -> dict[str, Any]:
    """Return each field of a request with its value where nobody gives one."""
    empty = {"str": str, "int": int, "dict[str, str]": dict}
    return {each.name: empty[str(each.type)]() for each in fields(Request)}


def _read(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Return the given values of a request in one form: times in minutes, `h200:8` as type and number, flags as text. at: for errors."""
    read = {name: value for name, value in values.items() if value is not None}
    if isinstance(limit := read.get("time_limit_minutes"), str):
        read["time_limit_minutes"] = minutes_of(limit, f"{at}time_limit_minutes")
    elif limit is not None and type(limit) is not int:  # a float, or a bool, which is an int to Python
        minutes_of(str(limit), f"{at}time_limit_minutes")
    if isinstance(gpus := read.get("gpus_per_node"), str):
        match = re.fullmatch(r"(?:([\w.+-]+):)?(\d+)", gpus)
        if not match:
            raise ConfigError(f"{at}gpus_per_node = {gpus}", "Valid: a number, or a type and a number, such as h200:8")
        if match[1] and read.get("gpu_type", match[1]) not in ("", match[1]):
            raise ConfigError(f"{at}gpus_per_node = {gpus}, and {at}gpu_type = {read['gpu_type']}", "Give one type")
        if match[1] and gpus_of(read.get("gres")) is not None:
            raise ConfigError(
                f"{at}gpus_per_node = {gpus}, and {at}gres = {read['gres']}",
                f"Name the type once: {at}gpus_per_node={match[2]} beside {at}gres, or leave the GPUs out of {at}gres",
            )
        read |= {"gpus_per_node": int(match[2])} | ({"gpu_type": match[1]} if match[1] else {})
    if isinstance(gres := read.get("gres"), str):
        read["gres"] = ",".join(re.sub(r"^gres[/:]", "", entry.strip()) for entry in gres.split(",")) if gres else ""
    read |= {name: str(read[name]) for name in MEMORY if isinstance(read.get(name), int)}
    if "sbatch" in read:
        read["sbatch"] = _flags(read["sbatch"], f"{at}sbatch")
    return read


def _flags(given: Any, key: str) -> dict[str, str]:
    """Return free flags as text: true is a flag without a value, and null or false leaves a flag out."""
    flags = {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} = {given}", "Valid: names and values, such as {exclude: n3, exclusive: true}")
    for name, value in given.items():
        if isinstance(value, Mapping | list):
            raise ConfigError(
                f"{key}.{name} = {value}", "Valid: one word or number; several are joined by commas, such as n1,n2"
            )
        if value is not None and value is not False:
            flags[str(name).replace("_", "-")] = "" if value is True else str(value)
    return flags


def _filled(base: Mapping[str, Any], own: Any, at: str, needed: int, *, is_scaled: bool) -> dict[str, Any]:
    """Return one role's request. base: the shared values. own: what the role has instead, or None. needed: the GPUs that its work needs.

    is_scaled: `base` has the job's share already.

    Of memory, and of cores, the role's own keys replace all the shared ones. A role without GPUs does not inherit what only GPUs need.
    """
    if not isinstance(own, Mapping | None):
        raise ConfigError(f"{at[:-1]} = {own}", "Valid: keys and values, such as {partition: cpu}")
    names = _names()
    if unknown := sorted(set(own or {}) - set(names)):
        near = difflib.get_close_matches(unknown[0], names, n=3, cutoff=0.5) or sorted(names)
        raise ConfigError(
            f"there is no setting {at}{unknown[0]}", f"Similar settings: {', '.join(at + name for name in near)}"
        )
    own = _read(own or {}, at)
    on_node = own.get("gpus_per_node", base.get("gpus_per_node", 0))
    gpus = own.get("gpus", needed if on_node else 0)
    inherited = dict(base) if is_scaled else _share(base, gpus, on_node)
    for group in (MEMORY, CORES):
        if any(name in own for name in group):
            inherited = {name: value for name, value in inherited.items() if name not in group}
    if gpus_of(own.get("gres")) is not None:
        inherited.pop("gpu_type", None)
    filled = {**names, **inherited, **own, "gpus": gpus}
    if not gpus:
        filled |= {name: names[name] for name in FOR_GPUS if name not in own}
        if "gres" not in own and isinstance(filled["gres"], str):
            filled["gres"] = ",".join(entry for entry in filled["gres"].split(",") if gpus_of(entry) is None)
        if "sbatch" not in own:
            filled["sbatch"] = {name: value for name, value in filled["sbatch"].items() if name not in FLAGS_FOR_GPUS}
    per_gpu = filled["cpus_per_gpu"]
    if isinstance(per_gpu, int) and isinstance(gpus, int) and per_gpu and gpus:
        filled["cpus_per_task"] = per_gpu * gpus
    return filled


def _share(base: Mapping[str, Any], gpus: Any, on_node: Any) -> dict[str, Any]:
    """Return the shared values for a job with some of a node's GPUs: their share of its cores and memory. A job without GPUs gets that of one.

    The number of GPUs in `gres`, and in the flag gpus-per-task, is that of a node too, and becomes the job's.
    """
    shared = dict(base)
    if not (isinstance(gpus, int) and isinstance(on_node, int) and 0 <= gpus < on_node):
        return shared
    part = max(1, gpus)
    if isinstance(cores := shared.get("cpus_per_task"), int) and cores > 0:
        shared["cpus_per_task"] = max(1, cores * part // on_node)
    if match := re.fullmatch(r"([1-9]\d*)([KMGT])B?", str(shared.get("mem", "")), re.IGNORECASE):
        size, unit = int(match[1]) * part, match[2].upper()
        while size % on_node and unit != "K":
            size, unit = 1024 * size, UNITS[UNITS.index(unit) - 1]
        shared["mem"] = f"{size // on_node}{unit}"
    if gpus and gpus_of(shared.get("gres")) == on_node:
        shared["gres"] = re.sub(rf"\b(gpu:(?:[\w.+-]+:)?){on_node}(?=,|$)", rf"\g<1>{gpus}", shared["gres"])
    if gpus and "gpus-per-task" in (flags := shared.get("sbatch", {})):
        per_task = re.sub(rf"(^|:){on_node}$", rf"\g<1>{gpus}", flags["gpus-per-task"])
        shared["sbatch"] = {**flags, "gpus-per-task": per_task}
    return shared


def minutes_of(text: str, key: str) -> int:
    """Return minutes, rounded up, of a time as sbatch reads it: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s. Raises ConfigError, which names `key`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise ConfigError(
            f"{key} = {text}",
            'Valid: whole minutes, or a time in quotes as sbatch reads it, such as 240, "4:00:00" or "1-12:00:00"',
        )
    numbers = [int(number) for number in match.groups()[1:] if number]
    if match[1]:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return 1440 * int(match[1] or 0) + 60 * hours + minutes + -(-seconds // 60)


def gres_entries(text: str) -> list[tuple[str, str, str]] | None:
    """Return (name, type, number) of each entry of a --gres text, such as ("gpu", "h200", "8"); None if it is malformed."""
    entries = []
    for entry in text.split(",") if text else []:
        name, *rest = entry.split(":")
        number = rest.pop() if rest and re.fullmatch(r"\d+[kKmMgGtT]?", rest[-1]) else "1"
        if len(rest) > 1 or not all(re.fullmatch(r"[\w.+-]+", word) for word in (name, *rest)):
            return None
        entries.append((name, "".join(rest), number))
    return entries


def gpus_of(text: Any) -> int | None:
    """Return the GPUs of a node that a --gres text asks for, or None if it names none. A part of a GPU (mps, shard) is one GPU."""
    entries = (gres_entries(text) or []) if isinstance(text, str) else []
    numbers = [
        int(number) if name == "gpu" and number.isdigit() else 1
        for name, _, number in entries
        if name in ("gpu", "mps", "shard")
    ]
    return sum(numbers) if numbers else None


def has_gpu_flag(request: Request) -> bool:
    """Whether --gres or a free flag asks for the GPUs, so that --gpus-per-node must not."""
    return gpus_of(request.gres) is not None or "gpus-per-task" in request.sbatch
