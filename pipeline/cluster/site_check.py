"""What `doctor` checks on a Slurm site: the controller, the partition, and one node, on which it runs a small job as an arm would.

`doctor` waits half a minute for a node (`srun --immediate`). If none is free, the check of the node is `unknown` and not a failure.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign.records import NUM_ARMS
from pipeline.cluster import slurm_clients, slurm_jobs
from pipeline.config import settings

SKEW_SECONDS = 2.0
CANARY_SECONDS = 30.0
LEAST_BYTES = 4 * 2**30
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph")
"""File systems that cannot hold an overlay, as stat(1) names them."""
NAMESPACES_CURE = (
    "as root: sysctl user.max_user_namespaces=10000 (on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0)"
)


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
        yield Check("slurmctld", "bad", "no Slurm controller answers here",
                    "run on a login node, or set SLURM_CONF; `make testbed-up` starts a Slurm to try it with")  # fmt: skip
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
    yield from _partition(chosen)
    yield from _node(chosen.cluster)


def job_states_are_read() -> Check:
    """Ask each client for the jobs that there are now, as `status` will, and show the first line that nobody can read."""
    asked = slurm_jobs.commands(["0"], [], time.time())
    asked["squeue"] = [word for word in asked["squeue"] if not word.startswith("--name")]
    asked["sacct"] = asked["sacct"][: asked["sacct"].index("-j")]
    bad, number = [], 0
    for name, command in asked.items():
        output = slurm_clients.run(*command)
        answer = slurm_jobs.READERS[name](output.text)
        number += len(answer.lines)
        said = output.error or (
            f"{name} printed a line that cannot be read: {answer.unread[0]}" if answer.unread else ""
        )
        silent = f"{name} printed nothing, not even a header" if not answer.spoke else ""
        if complaint := said or silent:
            bad.append(complaint)
    queues = not any(line.startswith(("squeue", "scontrol")) for line in bad)
    return make_check("job states", not bad, "; ".join(bad) or f"squeue, scontrol and sacct answered, {number} lines were read",
                      "`rerun` waits for squeue and scontrol; sacct only tells of older jobs. See what a wrapper or a profile changes",
                      "unknown" if queues else "bad")  # fmt: skip


def _partition(chosen: settings.Settings) -> Iterator[Check]:
    cluster = chosen.cluster
    lines = [line.split("|") for line in _ask("sinfo", "--noheader", "--format=%R|%l|%D|%G|%a").splitlines()]
    names = sorted({line[0] for line in lines})
    if cluster.partition and cluster.partition not in names:
        found = f"there is no partition {cluster.partition}; there are {', '.join(names)}"
        yield Check("partition", "bad", found, "set cluster.partition=... to one of these")
        return
    usable = [line for line in lines if not cluster.partition or line[0] == cluster.partition]
    longest = max((_minutes(line[1]) for line in usable), default=0.0)
    yield make_check("time limit", longest >= cluster.time_limit_minutes,
                     f"{cluster.time_limit_minutes} min are asked for, {longest:g} are allowed",
                     "set a lower cluster.time_limit_minutes: an arm saves its state, is requeued and goes on")  # fmt: skip
    nodes = sum(int(line[2]) for line in usable)
    per_node = cluster.gpus_per_node or chosen.parallelism.world_size
    nodes_per_arm = -(-chosen.parallelism.world_size // per_node)
    yield make_check("nodes", nodes >= nodes_per_arm,
                     f"{nodes}; an arm needs {nodes_per_arm}, all arms at once need {NUM_ARMS * nodes_per_arm}",
                     "choose another cluster.partition, or a parallelism of fewer ranks")  # fmt: skip
    if cluster.gpus_per_node:
        gpus = max((int(count) for line in usable for count in re.findall(r"gpu[^,|]*?:(\d+)", line[3])), default=0)
        yield make_check("GPUs a node", gpus >= cluster.gpus_per_node,
                         f"{cluster.gpus_per_node} are asked for, nodes have {gpus}",
                         "set cluster.gpus_per_node to as many as the nodes have them")  # fmt: skip


def _node(cluster: Any) -> Iterator[Check]:
    """Run a small job on a node and check what it saw: our file, its clock, runtime, mounts, disk and GPUs."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=Path.cwd()) as folder:
        canary = Path(folder, "canary")
        canary.write_text("seen")
        flags = [f"--{name}={getattr(cluster, name)}" for name in ("partition", "account", "qos", "reservation", "constraint")
                 if getattr(cluster, name)]  # fmt: skip
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
        "runtime": f"{runtime} --version 2>&1 | tail -n 1",
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
    works = answers["runtime"].startswith("Python")
    yield make_check("runtime on a node", works, answers["runtime"] or "it printed nothing",
                     "check cluster.runtime and what cluster.setup exports for it; without one, the .venv must lie on a shared path")  # fmt: skip
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
    if cluster.gpus_per_node:
        yield make_check("GPUs on a node", int(answers["gpus"]) >= cluster.gpus_per_node,
                         f"nvidia-smi lists {answers['gpus']}",
                         "ask inside a job, which may see more of them: `srun --gpus=2 python slurm/all_reduce.py`", "unknown")  # fmt: skip
        errors = sum(int(count) for count in re.findall(r"\d+", answers["errors"]))
        yield make_check("GPU health", errors == 0,
                         f"uncorrected memory errors: {answers['errors'].strip() or 'nvidia-smi does not say'}",
                         f"ask the site to drain and reset {node}; cluster.constraint or sbatch's --exclude avoids it")  # fmt: skip


def _ask(*command: str) -> str:
    return slurm_clients.output_of(*command, timeout_seconds=CANARY_SECONDS + 15)


def _minutes(text: str) -> float:
    """Minutes of Slurm's [days-]hours:minutes:seconds. `infinite` and `n/a` mean that there is no limit."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", text):
        return float("inf")
    days, _, rest = text.rpartition("-")
    hours, minutes, seconds = ([0, 0, *map(int, rest.split(":"))])[-3:]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60
