"""`doctor`: is this machine, or this site, fit for a campaign? One line a check: what was found, and the cure where something is wrong.

Nothing is changed, but for a canary file where --campaign names a folder. A check that cannot be made here says so and is no failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import forecast, image, namespace, scheduler, settings, weights
from pipeline.campaign import check_plan_fits, facts_of, verified_code
from pipeline.errors import PipelineError
from pipeline.layout import Campaign
from pipeline.records import NUM_ARMS

SKEW_SECONDS = 2.0
CANARY_SECONDS = 30.0
SECRET = re.compile(r"(token|secret|passw|api_?key|credential)", re.IGNORECASE)
PROGRAMS = {
    "bwrap": "bubblewrap", "mksquashfs": "squashfs-tools", "unsquashfs": "squashfs-tools", "prlimit": "util-linux",
}  # fmt: skip
USER_PROGRAMS = {"squashfuse": "squashfuse", "fuse-overlayfs": "fuse-overlayfs"}


@dataclass(frozen=True)
class Check:
    """verdict: good, bad, or unknown where it cannot be told from here."""

    name: str
    verdict: str
    found: str
    cure: str = ""


def examine(overrides: Sequence[str], campaign: Campaign | None = None) -> list[Check]:
    """All checks, in the order in which they matter. Raises ConfigError for overrides that compose to nothing."""
    chosen = settings.compose(overrides)
    found = [*_machine(), *_space(chosen), *_environment(), _fits(chosen)]
    if chosen.cluster.weights_dir:
        found.append(
            _tell("base weights", lambda: f"{len(weights.describe(chosen.cluster.weights_dir)['files'])} files")
        )
    if chosen.cluster.kind == "slurm":
        found += _slurm(chosen)
    if campaign:
        found += _campaign(campaign, chosen)
    return found


def _machine() -> Iterator[Check]:
    for program, package in PROGRAMS.items():
        where = shutil.which(program)
        yield Check(
            f"program {program}",
            "good" if where else "bad",
            where or "not on PATH",
            "" if where else f"install {package}",
        )
    if namespace.is_machine_root():
        yield Check("user namespaces", "good", "root: kernel mounts are used")
    else:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, text=True
        )
        cure = "sysctl user.max_user_namespaces=10000 (and kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu), or pyxis"
        yield Check(
            "user namespaces",
            "good" if not done.returncode else "bad",
            done.stderr.strip() or "open",
            cure if done.returncode else "",
        )
        for program, package in USER_PROGRAMS.items():
            where = shutil.which(program)
            yield Check(
                f"program {program}",
                "good" if where else "bad",
                where or "not on PATH",
                "" if where else f"install {package}",
            )
        usable = os.access("/dev/fuse", os.R_OK | os.W_OK)
        yield Check(
            "/dev/fuse",
            "good" if usable else "bad",
            "open" if usable else "closed to you",
            "" if usable else "chmod 0666 /dev/fuse",
        )


def _space(chosen: settings.Settings) -> Iterator[Check]:
    scratch = Path(chosen.cluster.scratch_dir or tempfile.gettempdir())
    if not os.access(scratch, os.W_OK):
        yield Check("scratch", "bad", f"{scratch} is not writable", "cluster.scratch_dir names a node-local folder")
        return
    free = shutil.disk_usage(scratch).free
    needed = 4 * 2**30
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(scratch)], capture_output=True, text=True).stdout.strip()
    yield Check("scratch", "good" if free > needed else "bad", f"{free / 2**30:.0f} GiB free in {scratch} ({kind})",
                "" if free > needed else "cluster.scratch_dir names a larger node-local folder")  # fmt: skip
    shared = kind in ("nfs", "lustre", "gpfs", "beegfs", "ceph")
    if shared:
        yield Check(
            "scratch is local",
            "bad",
            f"{scratch} is on {kind}",
            "overlays cannot lie on it: cluster.scratch_dir on a local disk",
        )


def _environment() -> Iterator[Check]:
    leaking = sorted(name for name in os.environ if name.startswith(("SBATCH_", "SRUN_")))
    yield Check("leaking variables", "good" if not leaking else "bad", ", ".join(leaking) or "none",
                "they change every submission by hand: unset them (the pipeline's own are made without)" if leaking else "")  # fmt: skip
    secrets = sorted(name for name in os.environ if SECRET.search(name))
    yield Check("secrets in the environment", "good" if not secrets else "unknown", ", ".join(secrets) or "none",
                "Slurm copies the environment of sbatch into job records: submit from a shell without them" if secrets else "")  # fmt: skip


def _fits(chosen: settings.Settings) -> Check:
    def hours() -> str:
        check_plan_fits(chosen)
        expected = forecast.forecast(chosen, NUM_ARMS)
        arm = chosen.parallelism.world_size
        gpus = f"; the smallest site: {arm} GPUs, one arm at a time" if chosen.cluster.gpus_per_node else ""
        if expected and chosen.cluster.gpus_per_node:
            gpus += f", {expected.hours / arm:,.0f} h a round"
        return f"model {chosen.model.name}, {arm} ranks an arm{gpus}"

    return _tell("configuration", hours)


def _slurm(chosen: settings.Settings) -> Iterator[Check]:
    cluster = chosen.cluster
    if not scheduler.slurm_answers():
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
    yield from _nodes(cluster)


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


def _nodes(cluster: Any) -> Iterator[Check]:
    """A node runs as we do: it sees a file of ours on the shared file system, its clock goes right, its programs are there."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=Path.cwd()) as folder:
        canary = Path(folder, "canary")
        canary.write_text("seen")
        script = (
            f"cat {canary}; echo; date +%s.%N; {sys.executable} --version; command -v bwrap squashfuse | wc -l; "
            "[ -w /dev/fuse ] && echo fuse || echo closed; nvidia-smi -L 2>/dev/null | wc -l"
        )
        flags = [f"--{name}={getattr(cluster, name)}" for name in ("partition", "account", "qos", "reservation", "constraint")
                 if getattr(cluster, name)]  # fmt: skip
        before = time.time()
        said = _said(
            "srun", "--time=1", "--ntasks=1", f"--immediate={CANARY_SECONDS:.0f}", *flags, "bash", "-c", script
        ).splitlines()
        after = time.time()
    if len(said) < 6:
        yield Check(
            "a node",
            "unknown",
            "no node came within half a minute",
            "the queue is full, or account and partition are missing",
        )
        return
    seen, clock, python, programs, fuse, gpus = said[:6]
    yield Check("shared file system", "good" if seen == "seen" else "bad", f"a node reads {Path.cwd()}",
                "" if seen == "seen" else "keep campaign and checkout where nodes see them")  # fmt: skip
    skew = max(0.0, before - float(clock), float(clock) - after)
    yield Check(
        "clock skew",
        "good" if skew < SKEW_SECONDS else "bad",
        f"{skew:.1f} s",
        "" if skew < SKEW_SECONDS else "chrony on the nodes",
    )
    yield Check(
        "runtime on a node",
        "good" if python.startswith("Python") else "bad",
        python,
        "" if python.startswith("Python") else "the .venv on a shared path, or cluster.setup",
    )
    fit = programs == "2" and fuse == "fuse"
    yield Check("mounts on a node", "good" if fit else "unknown", f"{programs} of bwrap, squashfuse; /dev/fuse {fuse}",
                "" if programs == "2" else "install bubblewrap and squashfuse on the nodes")  # fmt: skip
    if cluster.gpus_per_node:
        yield Check("GPUs on a node", "good" if int(gpus) >= cluster.gpus_per_node else "unknown", f"nvidia-smi lists {gpus}",
                    "" if int(gpus) >= cluster.gpus_per_node else "slurm/all_reduce.py asks inside a job")  # fmt: skip


def _campaign(campaign: Campaign, chosen: settings.Settings) -> Iterator[Check]:
    yield _tell("frozen facts", lambda: str(facts_of(campaign)["campaign"]))
    yield _tell("frozen code", lambda: verified_code(campaign, facts_of(campaign)).name)
    yield _tell(
        "image", lambda: image.verify(campaign.image, facts_of(campaign)["image"]["tree_digest"]).tree_digest[:16]
    )
    mode = campaign.vault.stat().st_mode & 0o777 if campaign.vault.exists() else 0
    yield Check(
        "vault",
        "good" if mode == 0o700 else "bad",
        f"mode {mode:04o}",
        "" if mode == 0o700 else f"chmod 700 {campaign.vault}",
    )


def _tell(name: str, act: Callable[[], str]) -> Check:
    """What `act` says; its error and cure where it raises one."""
    try:
        return Check(name, "good", act())
    except PipelineError as error:
        return Check(name, "bad", error.what, error.cure)


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


def table(checks: Sequence[Check]) -> Any:
    """A rich table."""
    from rich.table import Table

    colours = {"good": "green", "bad": "red", "unknown": "yellow"}
    view = Table(box=None, pad_edge=False)
    for column in ("", "check", "found", "cure"):
        view.add_column(column)
    for check in checks:
        view.add_row(f"[{colours[check.verdict]}]{check.verdict}[/]", check.name, check.found, check.cure)
    return view
