"""What `doctor` checks on a Slurm site: the controller, the partition, and one node, on which it runs a small job as an arm would.

`doctor` waits half a minute for a node (`srun --immediate`). If none is free, the check of the node is `unknown` and not a failure.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.campaign.records import NUM_ARMS
from pipeline.cluster import sbatch_parameters, slurm_clients, slurm_jobs
from pipeline.cluster.sbatch_parameters import Room, room_on_node
from pipeline.config import requests, settings
from pipeline.sandbox import runtime_needs

SKEW_SECONDS = 2.0
CANARY_SECONDS = 30.0
LEAST_BYTES = 4 * 2**30
PLACE = ("partition", "account", "qos", "reservation", "constraint")
"""What decides on which nodes a job may run."""
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph")
"""File systems that cannot hold an overlay, as stat(1) names them."""
NAMESPACES_CURE = (
    "as root: sysctl user.max_user_namespaces=10000 (on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0)"
)

NO_CONTROLLER = (
    "no Slurm controller answers here",
    "run on a login node, or set SLURM_CONF; `make testbed-up` starts a Slurm to try it with",
)
"""What is found, and the cure."""


@dataclass(frozen=True)
class Check:
    """One line of `doctor`. verdict: `good`, `bad`, or `unknown` if the check cannot be made from here."""

    name: str
    verdict: str
    found: str
    cure: str = ""


def make_check(name: str, is_good: bool, found: str, cure: str, otherwise: str = "bad") -> Check:
    """A check that has its cure only if it is not good. otherwise: its verdict then."""
    return Check(name, "good" if is_good else otherwise, found, "" if is_good else cure)


def examine(chosen: settings.Settings) -> Iterator[Check]:
    """Check the controller, the partition and one node. If no controller answers, that is the only check, and it is bad."""
    if not slurm_clients.controller_answers():
        yield Check("slurmctld", "bad", *NO_CONTROLLER)
        return
    config = dict(re.findall(r"^(\S+)\s*= (.*)$", _ask("scontrol", "show", "config"), re.MULTILINE))
    yield Check(
        "slurmctld", "good", f"Slurm {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}"
    )
    size = int(config.get("MaxArraySize", "0"))
    yield make_check("MaxArraySize", size > NUM_ARMS, str(size), f"the site must allow {NUM_ARMS + 1} or more")
    yield make_check("JobRequeue", config.get("JobRequeue") == "1", config.get("JobRequeue", "?"),
                     "jobs ask for it with --requeue; if the site refuses, `rerun` goes on from the checkpoint", "unknown")  # fmt: skip
    accounting = "slurmdbd" in config.get("AccountingStorageType", "")
    yield make_check("accounting", accounting and bool(_ask("sacctmgr", "-n", "show", "cluster")),
                     config.get("AccountingStorageType", "?"),
                     "none is needed: job states come from files, squeue and scontrol", "unknown")  # fmt: skip
    yield job_states_are_read()
    yield from _partitions(chosen, config)
    yield from _nodes(chosen)


def job_states_are_read() -> Check:
    """Ask each client for the jobs that there are now, as `status` will, and show the first line that nobody can read."""
    asked = [slurm_jobs.ask(*each) for each in slurm_jobs.commands([], [], time.time()).items()]
    bad = [line for source in asked for line in source.complaints()]
    number = sum(len(source.answer.lines) for source in asked)
    queues = not any(line.startswith(("squeue", "scontrol")) for line in bad)
    return make_check("job states", not bad, "; ".join(bad) or f"squeue, scontrol and sacct answered, {number} lines were read",
                      "`rerun` waits for squeue and scontrol; sacct only tells of older jobs. See what a wrapper or a profile changes",
                      "unknown" if queues else "bad")  # fmt: skip


def _partitions(chosen: settings.Settings, config: Mapping[str, str]) -> Iterator[Check]:
    """Check the partition of workers, and that of each other role that asks for something else. config: what scontrol says of the site."""
    rows = [line.split("|") for line in _ask("sinfo", "--noheader", "--format=%P|%l|%D|%G|%a|%c|%m").splitlines()]
    default = [row[0] for row in rows if row[0].endswith("*")]  # a job that names no partition goes there
    lines = [[row[0].removesuffix("*"), *row[1:]] for row in rows]
    seen: list[requests.Request] = []
    for role in filter(chosen.worker.has_jobs, requests.ROLES):
        if (request := chosen.cluster.request(role)) not in seen:
            seen.append(request)
            yield from _partition(chosen, role, lines, [name.removesuffix("*") for name in default], config)


def _partition(
    chosen: settings.Settings, role: str, lines: list[list[str]], default: list[str], config: Mapping[str, str]
) -> Iterator[Check]:
    """Check one role's request against the site. lines: what sinfo says of each partition: name, time limit, nodes, gres, state, and of a
    node cores and megabytes.

    default: the site's default partition, if it has one.
    """
    request, is_worker = chosen.cluster.request(role), role == "worker"
    of, at = ("", "cluster") if is_worker else (f" of {role}", f"cluster.{role}")
    names, wanted = sorted({line[0] for line in lines}), [name for name in request.partition.split(",") if name]
    if unknown := [name for name in wanted if name not in names]:
        found = f"there is no partition {unknown[0]}; there are {', '.join(names)}"
        yield Check(f"partition{of}", "bad", found, f"set {at}.partition=... to one of these")
        return
    usable = [line for line in lines if not (wanted or default) or line[0] in (wanted or default)]
    longest = max((_minutes(line[1]) for line in usable), default=0.0)
    saves = ": an arm saves its state, is requeued and goes on" if is_worker else ""
    yield make_check(f"time limit{of}", longest >= request.time_limit_minutes,
                     f"{request.time_limit_minutes} min are asked for, {longest:g} are allowed",
                     f"set a lower {at}.time_limit_minutes{saves}")  # fmt: skip
    if is_worker:
        nodes, nodes_per_arm = sum(int(line[2]) for line in usable), chosen.num_nodes
        room = max((_room(request, line, config) for line in usable), key=lambda each: each.jobs, default=Room(1, ""))
        on_node = room.jobs if nodes_per_arm == 1 else 1
        yield make_check("nodes", nodes >= nodes_per_arm,
                         f"{nodes}; an arm needs {nodes_per_arm}, all arms at once need {-(-NUM_ARMS // on_node) * nodes_per_arm}",
                         "choose another cluster.partition, or a parallelism of fewer ranks")  # fmt: skip
        if request.gpus and nodes_per_arm == 1:
            fills = room.jobs >= request.gpus_per_node // request.gpus or request.is_exclusive
            yield make_check("arms a node", fills, f"{room.jobs}: {room.why}",
                             "set cluster.mem (such as 900G) and cluster.cpus_per_task to what a node has: a job gets the share of its GPUs",
                             "unknown")  # fmt: skip
    if request.gpus:
        types = (
            {request.gpu_type}
            if request.gpu_type
            else {kind for _, kind, _ in requests.gres_entries(request.gres) or [] if kind}
        )
        gpus = max((_gpus(line[3], types) for line in usable), default=0)
        yield make_check(f"GPUs a node{of}", gpus >= request.gpus_per_node,
                         f"{at}.gpus_per_node = {request.gpus_per_node}, of which {request.gpus} are asked for; nodes have {gpus}"
                         f"{' ' if types else ''}{' or '.join(sorted(types))}",
                         f"set {at}.gpus_per_node to as many as the nodes have them")  # fmt: skip
    yield _accepted(request, role)


def _room(request: requests.Request, line: list[str], config: Mapping[str, str]) -> Room:
    """What a node of a partition has room for. line, config: as `_partition` has them."""
    cores, megabytes = (int(text.rstrip("+")) if text.rstrip("+").isdigit() else 0 for text in (*line[5:7], "", "")[:2])
    said = _ask("scontrol", "--oneliner", "show", "partition", line[0]) if not request.megabytes else ""
    return room_on_node(request, cores, megabytes, dict(re.findall(r"(\w+)=(\S+)", said)), config)


def _gpus(gres: str, types: set[str]) -> int:
    """The GPUs of a node by what sinfo prints as its gres, such as gpu:h200:8(S:0-1). types: count only these; all if it is empty."""
    entries = requests.gres_entries(re.sub(r"\([^)]*\)", "", gres)) or []
    return sum(int(number) for name, kind, number in entries if name == "gpu" and (not types or kind in types))


def _accepted(request: requests.Request, role: str) -> Check:
    """Ask sbatch whether it would take a job with this request. Nothing is submitted."""
    name = f"request of {role}"
    flags = {
        **sbatch_parameters.flags_of(request),
        "time": str(request.time_limit_minutes),
        "ntasks-per-node": "1",
        "nodes": "1",
    }
    words = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]
    done = slurm_clients.run("sbatch", "--test-only", *words, "--wrap=true", timeout_seconds=CANARY_SECONDS)
    if done.failed and not done.stderr:
        return Check(name, "unknown", done.error, "make sbatch work in this shell")
    said = done.complaint or "sbatch said nothing"
    at = "cluster" if role == "worker" else f"cluster.{role}"
    return make_check(
        name,
        not done.failed,
        said,
        f"ask for what the site has: {at}.partition, account, gpus_per_node, mem and so on",
    )


def _nodes(chosen: settings.Settings) -> Iterator[Check]:
    """Check a node of every place where jobs run: the workers', and another role's if it asks for another partition, constraint and so on."""
    seen = set()
    for role in filter(chosen.worker.has_jobs, requests.ROLES):
        request = chosen.cluster.request(role)
        place = tuple(getattr(request, name) for name in PLACE)
        if place not in seen:
            seen.add(place)
            of = "" if role == "worker" else f" of {role}"
            yield from (
                replace(check, name=check.name + of) for check in _node(replace(chosen.cluster, **vars(request)))
            )


def _node(cluster: Any) -> Iterator[Check]:
    """Run a small job on a node and check what it saw: our file, its clock, runtime, mounts, disk and GPUs."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=Path.cwd()) as folder:
        canary = Path(folder, "canary")
        canary.write_text("seen")
        flags = [f"--{name}={getattr(cluster, name)}" for name in PLACE if getattr(cluster, name)]
        before = time.time()
        fixed = ["--time=2", "--ntasks=1", f"--immediate={CANARY_SECONDS:.0f}"]
        output = _ask("srun", *fixed, *flags, "bash", "-c", questions(cluster, canary))
        after = time.time()
    answers = dict(re.findall(r"^DOCTOR (\w+)=(.*)$", output, re.MULTILINE))
    if "end" not in answers:
        yield Check("a node", "unknown", "no node ran the job within half a minute",
                    "the queue is full, or the site requires an account or a partition (cluster.account, cluster.partition)")  # fmt: skip
        return
    yield from checks_of_answers(answers, cluster, before, after)


def questions(cluster: Any, canary: Path) -> str:
    """The shell script of the job. Like an arm's job it begins with the lines of cluster.setup. Each answer is a line `DOCTOR name=...`."""
    words = cluster.runtime or [sys.executable]
    # In double quotes the shell replaces $NAME, as it does in an arm's job.
    runtime = " ".join('"' + re.sub(r'([\\"`])', r"\\\1", word) + '"' for word in words)
    scratch = cluster.scratch_dir or "${TMPDIR:-/tmp}"
    lines = {
        "seen": f"cat '{canary}'",
        "clock": "date +%s.%N",
        "runtime": f"{runtime} '{runtime_needs.__file__}' 2>&1 | grep -v '^cure: ' | tail -n 1",
        "absent": "for each in bwrap squashfuse; do command -v $each > /dev/null || printf '%s ' $each; done",
        "fuse": "[ -w /dev/fuse ] && echo open || echo closed",
        "namespaces": "unshare --user --map-root-user --mount echo open 2>&1 | tail -n 1",
        "bytes": f'df --output=avail -B1 "{scratch}" | tail -n 1',
        "kind": f'stat -f -c %T "{scratch}"',
        "gpus": "nvidia-smi -L 2> /dev/null | wc -l",
        "errors": "nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader 2> /dev/null | tr '\\n' ' '",
        "end": "hostname",
    }
    asked = [f'echo "DOCTOR {name}=$({command})"' for name, command in lines.items()]
    return "\n".join([*cluster.setup, *asked])


def checks_of_answers(answers: dict[str, str], cluster: Any, before: float, after: float) -> Iterator[Check]:
    """Turn the answers of a node into checks.

    answers: question -> the line that the node printed. before, after: our clock around the job, in seconds since the epoch.
    """
    node = answers["end"]
    sees = answers["seen"] == "seen"
    yield make_check("shared file system", sees, f"{node} {'reads' if sees else 'cannot read'} {Path.cwd()}",
                     "keep campaign and checkout on a file system that the nodes share")  # fmt: skip
    skew = max(0.0, before - float(answers["clock"]), float(answers["clock"]) - after)
    yield make_check(
        "clock skew", skew < SKEW_SECONDS, f"{skew:.1f} s", "run a time service such as chrony on the nodes"
    )
    found = answers["runtime"]
    works = found.startswith("Python") and " lacks " not in found
    yield make_check("runtime on a node", works, found or "it printed nothing",
                     f"check cluster.runtime and what cluster.setup exports for it; without one, the .venv must lie on a shared path; "
                     f"{runtime_needs.CURE}")  # fmt: skip
    if cluster.gpus and works:
        *_, compiler, scan = ["", *found.split("; ")]
        yield make_check("compiler for kernels", runtime_needs.NO_COMPILER not in compiler, compiler,
                         "install gcc and Python's headers (python3-dev) where cluster.runtime runs, or set CC in cluster.setup",
                         "unknown")  # fmt: skip
        yield make_check("kernel of the scan", runtime_needs.PLAIN_SCAN not in scan, scan,
                         "docs/containers.md has mamba-ssm; slurm.yaml's rates were measured with its kernel", "unknown")  # fmt: skip
    inside = " (of the node itself; the runtime brings its own)" if cluster.runtime else ""
    fit = not answers["absent"] and answers["fuse"] == "open"
    found = f"absent programs: {answers['absent'].strip() or 'none'}; /dev/fuse is {answers['fuse']}{inside}"
    yield make_check("mounts on a node", fit, found,
                     "as root on the nodes: install bubblewrap and squashfuse, and chmod 0666 /dev/fuse", "unknown")  # fmt: skip
    namespaces = answers["namespaces"]
    yield make_check("user namespaces on a node", namespaces == "open", namespaces, NAMESPACES_CURE)
    free = int(answers["bytes"] or 0)
    yield make_check("scratch on a node", free > LEAST_BYTES and answers["kind"] not in SHARED,
                     f"{free / 2**30:.0f} GiB free ({answers['kind']})",
                     "set cluster.scratch_dir to a folder on a larger local disk")  # fmt: skip
    if cluster.gpus:
        yield make_check("GPUs on a node", int(answers["gpus"]) >= cluster.gpus,
                         f"nvidia-smi lists {answers['gpus']}",
                         "ask inside a job, which may see more of them: `srun --gpus=2 python slurm/all_reduce.py`", "unknown")  # fmt: skip
        errors = sum(int(count) for count in re.findall(r"\d+", answers["errors"]))
        yield make_check("GPU health", errors == 0,
                         f"uncorrected memory errors: {answers['errors'].strip() or 'nvidia-smi does not say'}",
                         f"ask the site to drain and reset {node}; cluster.constraint or sbatch's --exclude avoids it")  # fmt: skip


def _ask(*command: str) -> str:
    return slurm_clients.output_of(*command, timeout_seconds=CANARY_SECONDS + 15)


def _minutes(text: str) -> float:
    """Minutes of a time as sinfo prints it. `infinite` and `n/a` mean that there is no limit."""
    return requests.minutes_of(text, "sinfo's time limit") if re.fullmatch(r"(\d+-)?[\d:]+", text) else float("inf")
