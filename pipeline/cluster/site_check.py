"""What `doctor` asks of a Slurm site: its controller, the partition, and a node that runs a small job as an arm would.

A node is asked for half a minute (`srun --immediate`): where none comes, that is no failure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign.records import NUM_ARMS
from pipeline.cluster import slurm_submit
from pipeline.config import settings

SKEW_SECONDS = 2.0
CANARY_SECONDS = 30.0
LEAST_BYTES = 4 * 2**30
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph")
"""File systems on which no overlay can lie, as stat(1) calls them."""


@dataclass(frozen=True)
class Check:
    """verdict: good, bad, or unknown where it cannot be told from here."""

    name: str
    verdict: str
    found: str
    cure: str = ""


def examine(chosen: settings.Settings) -> Iterator[Check]:
    """Controller, partition, and one node. A site whose controller does not answer is one bad check."""
    cluster = chosen.cluster
    if not slurm_submit.slurm_answers():
        yield Check(
            "slurmctld", "bad", "no controller answers", "a login node, SLURM_CONF, or `make testbed-up` to try it"
        )
        return
    config = dict(re.findall(r"^(\S+)\s*= (.*)$", _said("scontrol", "show", "config"), re.MULTILINE))
    yield Check(
        "slurmctld", "good", f"Slurm {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}"
    )
    size = int(config.get("MaxArraySize", "0"))
    yield Check(
        "MaxArraySize",
        "good" if size > NUM_ARMS else "bad",
        str(size),
        "" if size > NUM_ARMS else f"the site must allow {NUM_ARMS + 1}",
    )
    again = config.get("JobRequeue") == "1"
    yield Check("JobRequeue", "good" if again else "unknown", config.get("JobRequeue", "?"),
                "" if again else "jobs ask for it (--requeue); where the site refuses, `rerun` goes on from the checkpoint")  # fmt: skip
    accounting = "slurmdbd" in config.get("AccountingStorageType", "") and bool(
        _said("sacctmgr", "-n", "show", "cluster")
    )
    yield Check("accounting", "good" if accounting else "unknown", config.get("AccountingStorageType", "?"),
                "" if accounting else "not needed: states come from files, squeue and scontrol")  # fmt: skip
    yield from _partition(chosen)
    yield from _node(cluster)


def _partition(chosen: settings.Settings) -> Iterator[Check]:
    cluster = chosen.cluster
    lines = [line.split("|") for line in _said("sinfo", "--noheader", "--format=%R|%l|%D|%G|%a").splitlines()]
    names = sorted({line[0] for line in lines})
    if cluster.partition and cluster.partition not in names:
        yield Check(
            "partition", "bad", f"no {cluster.partition}; there are {', '.join(names)}", "cluster.partition=..."
        )
        return
    ours = [line for line in lines if not cluster.partition or line[0] == cluster.partition]
    longest = max((_minutes(line[1]) for line in ours), default=0.0)
    fits = longest >= cluster.time_limit_minutes
    yield Check("time limit", "good" if fits else "bad", f"asked {cluster.time_limit_minutes} min, allowed {longest:g}",
                "" if fits else "a lower cluster.time_limit_minutes: arms save, requeue and go on")  # fmt: skip
    nodes = sum(int(line[2]) for line in ours)
    per_node = cluster.gpus_per_node or chosen.parallelism.world_size
    asked = -(-chosen.parallelism.world_size // per_node)
    yield Check("nodes", "good" if nodes >= asked else "bad", f"{nodes}; an arm takes {asked}, eight at once {8 * asked}",
                "" if nodes >= asked else "another cluster.partition, or parallelism of fewer ranks")  # fmt: skip
    if cluster.gpus_per_node:
        has = max((int(count) for line in ours for count in re.findall(r"gpu[^,|]*?:(\d+)", line[3])), default=0)
        fits = has >= cluster.gpus_per_node
        yield Check("GPUs a node", "good" if fits else "bad", f"asked {cluster.gpus_per_node}, nodes have {has}",
                    "" if fits else "cluster.gpus_per_node as the nodes have them")  # fmt: skip


def _node(cluster: Any) -> Iterator[Check]:
    """A node runs as we do: it sees a file of ours, its clock goes right, its runtime, mounts and disk are there, its GPUs well."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=Path.cwd()) as folder:
        canary = Path(folder, "canary")
        canary.write_text("seen")
        flags = [f"--{name}={getattr(cluster, name)}" for name in ("partition", "account", "qos", "reservation", "constraint")
                 if getattr(cluster, name)]  # fmt: skip
        before = time.time()
        said = _said(
            "srun",
            "--time=2",
            "--ntasks=1",
            f"--immediate={CANARY_SECONDS:.0f}",
            *flags,
            "bash",
            "-c",
            questions(cluster, canary),
        )
        after = time.time()
    found = dict(re.findall(r"^DOCTOR (\w+)=(.*)$", said, re.MULTILINE))
    if "end" not in found:
        yield Check(
            "a node",
            "unknown",
            "no node came within half a minute",
            "the queue is full, or account and partition are missing",
        )
        return
    yield from judged(found, cluster, before, after)


def questions(cluster: Any, canary: Path) -> str:
    """The job's shell text: as an arm's, after the lines of cluster.setup. Each answer is a line `DOCTOR name=...`."""
    words = cluster.runtime or [sys.executable]
    # Double quotes: the shell fills in $NAME, as the jobs do.
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


def judged(found: dict[str, str], cluster: Any, before: float, after: float) -> Iterator[Check]:
    """What the node's answers mean. before, after: our clock around the job."""

    def check(name: str, good: bool, seen: str, cure: str, otherwise: str = "bad") -> Check:
        return Check(name, "good" if good else otherwise, seen, "" if good else cure)

    yield check("shared file system", found["seen"] == "seen", f"{found['end']} reads {Path.cwd()}",
                "keep campaign and checkout where nodes see them")  # fmt: skip
    skew = max(0.0, before - float(found["clock"]), float(found["clock"]) - after)
    yield check("clock skew", skew < SKEW_SECONDS, f"{skew:.1f} s", "chrony on the nodes")
    works = found["runtime"].startswith("Python")
    yield check("runtime on a node", works, found["runtime"] or "no answer",
                "cluster.runtime and what cluster.setup exports for it; without one, the .venv on a shared path")  # fmt: skip
    inside = " (of the node itself; the runtime brings its own)" if cluster.runtime else ""
    fit = not found["absent"] and found["fuse"] == "open"
    seen = f"absent: {found['absent'].strip() or 'none'}; /dev/fuse {found['fuse']}{inside}"
    yield check(
        "mounts on a node", fit, seen, "install bubblewrap and squashfuse on the nodes, chmod 0666 /dev/fuse", "unknown"
    )
    yield check("user namespaces on a node", found["namespaces"] == "open", found["namespaces"],
                "sysctl user.max_user_namespaces=10000 (and kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu)")  # fmt: skip
    free = int(found["bytes"] or 0)
    yield check("scratch on a node", free > LEAST_BYTES and found["kind"] not in SHARED,
                f"{free / 2**30:.0f} GiB free ({found['kind']})", "cluster.scratch_dir names a larger folder on a local disk")  # fmt: skip
    if cluster.gpus_per_node:
        yield check("GPUs on a node", int(found["gpus"]) >= cluster.gpus_per_node, f"nvidia-smi lists {found['gpus']}",
                    "slurm/all_reduce.py asks inside a job", "unknown")  # fmt: skip
        errors = sum(int(count) for count in re.findall(r"\d+", found["errors"]))
        yield check("GPU health", errors == 0, f"uncorrected memory errors: {found['errors'].strip() or 'not told'}",
                    f"have {found['end']} drained and reset; cluster.constraint or sbatch's --exclude avoids it")  # fmt: skip


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=CANARY_SECONDS + 15).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _minutes(text: str) -> float:
    """Of Slurm's [days-]hours:minutes:seconds; infinite and n/a are no limit."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", text):
        return float("inf")
    days, _, rest = text.rpartition("-")
    hours, minutes, seconds = ([0, 0, *map(int, rest.split(":"))])[-3:]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60
