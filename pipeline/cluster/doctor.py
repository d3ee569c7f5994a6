"""`doctor`: check whether this machine, or this Slurm site, can run a campaign.

Each check has a verdict, what was found, and a cure where something is wrong. A check that cannot be made here is `unknown`, which is
not a failure. `doctor` plays the whole sandbox in scratch. It changes nothing, except that it writes a small file into the working folder
while it tries a lock, and while a node of a Slurm site looks for one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.campaign import other_rules
from pipeline.campaign.errors import ConfigError, PipelineError
from pipeline.campaign.facts import facts_of, read_plan, verified_code
from pipeline.campaign.layout import Campaign
from pipeline.campaign.records import NUM_ARMS
from pipeline.campaign.shared_path import take_lock
from pipeline.cluster import forecast, outside_check, sandbox_check, site_check, slurm_clients, slurm_submit
from pipeline.cluster.site_check import LEAST_BYTES, NAMESPACES_CURE, SHARED, Check, make_check
from pipeline.config import decoding, footprint, settings
from pipeline.config.credentials import NOT_INHERITED
from pipeline.config.decoding import Settled
from pipeline.config.fit import check_plan_fits
from pipeline.execution import base_weights
from pipeline.sandbox import entries, image, namespace, runtime_needs

PROGRAMS = {
    "bwrap": "bubblewrap", "mksquashfs": "squashfs-tools", "unsquashfs": "squashfs-tools", "prlimit": "util-linux",
}  # fmt: skip
"""Every machine needs these. Program -> the Debian package that has it."""
USER_PROGRAMS = {"squashfuse": "squashfuse", "fuse-overlayfs": "fuse-overlayfs"}
"""An ordinary user needs these too, because only root may use the kernel's mounts."""


def examine(
    chosen: settings.Settings,
    campaign: Campaign | None = None,
    *,
    with_weights: bool = True,
    settled: Settled | None = None,
) -> list[Check]:
    """All checks of a configuration, and of a campaign's frozen digests if one is given, the most important first.

    with_weights: also compare the published checkpoint with the model, by names and shapes; no weight is read. settled: what the campaign
    froze for `auto`; None where there is no campaign yet.
    """
    checks = [
        *_machine(),
        *sandbox_check.examine(chosen),
        *_space(chosen),
        *_environment(),
        _fits(chosen),
        *outside_check.decoding_engine(chosen, decoding.settled_of(chosen) if settled is None else settled),
        *_layouts(chosen),
        *_memory(chosen),
    ]
    checks += outside_check.examine(chosen)
    if with_weights:
        checks += _weights(chosen.cluster.weights_dir, chosen.to_dict()["model"])
    if chosen.tasks.train_csv:
        tasks = chosen.tasks
        checks.append(
            _check_of("real rows", lambda: entries.describe_real_rows(tasks.train_csv, tasks.families, whole=True))
        )
    if chosen.cluster.kind == "slurm":
        checks += [*_meta_job(chosen), *site_check.examine(chosen)]
    if campaign:
        checks += _campaign(campaign)
    return checks


def _machine() -> Iterator[Check]:
    yield make_check(
        "runtime", not runtime_needs.lacking(), runtime_needs.describe(), f"`make setup`; {runtime_needs.CURE}"
    )
    yield from _programs(PROGRAMS)
    if namespace.is_machine_root():
        yield Check(
            "user namespaces", "good", "root needs none for its mounts; the sandbox needs them, and is played below"
        )
        return
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, text=True)
    refused = done.stderr.strip()
    cures = [
        *(sandbox_check.cures(refused) or [NAMESPACES_CURE]),
        "or run the arms in a container (cluster=slurm_pyxis)",
    ]
    yield make_check("user namespaces", not done.returncode, refused or "allowed", "; ".join(cures))
    yield from _programs(USER_PROGRAMS)
    usable = os.access("/dev/fuse", os.R_OK | os.W_OK)
    found = "you may read and write it" if usable else "you may not read and write it"
    yield make_check("/dev/fuse", usable, found, "as root: chmod 0666 /dev/fuse")


def _programs(packages: Mapping[str, str]) -> Iterator[Check]:
    for program, package in packages.items():
        path = shutil.which(program)
        yield make_check(f"program {program}", bool(path), path or "not on PATH", f"install the package {package}")


def _space(chosen: settings.Settings) -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    yield make_check("disk", free > LEAST_BYTES, f"{free / 2**30:.0f} GiB free in {Path.cwd()}",
                     "free some space (`gc` lists what can go), or keep campaigns on another disk")  # fmt: skip
    yield _locks(Path.cwd())
    try:
        scratch = namespace.scratch_place(chosen.cluster.scratch_dir)
    except ConfigError as error:
        yield Check("scratch", "bad", error.what, error.cure)
        return
    free = shutil.disk_usage(scratch).free
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(scratch)], capture_output=True, text=True).stdout.strip()
    yield make_check("scratch", free > LEAST_BYTES, f"{free / 2**30:.0f} GiB free in {scratch} ({kind})",
                     "set cluster.scratch_dir to a folder on a larger local disk")  # fmt: skip
    if kind in SHARED:
        yield Check("scratch is local", "bad", f"{scratch} is on {kind}, which cannot hold an overlay",
                    "set cluster.scratch_dir to a folder on a local disk")  # fmt: skip


def _locks(folder: Path) -> Check:
    """Whether a file lock in a folder keeps another out. Campaigns need one: only `slurm/drill.py` shows whether it holds between machines."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file, open(file.name) as other:
            take_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                take_lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Check("file locks", "good", f"a lock in {folder} keeps others of this machine out")
        return Check(
            "file locks",
            "bad",
            f"two locks of one file in {folder} were given at once",
            "keep campaigns on another file system",
        )
    except ConfigError as error:
        return Check("file locks", "bad", error.what, error.cure)
    except OSError as error:
        return Check("file locks", "unknown", f"no file can be made in {folder}: {error.strerror}")


def _environment() -> Iterator[Check]:
    with slurm_submit.clean_environment():
        kept = set(os.environ)
    unused = {
        "jobs": sorted(set(os.environ) - kept),
        "questions to Slurm": slurm_clients.ignored(os.environ),
        "set-up of a stage": sorted({"PYTHONPATH", "SOURCE_DATE_EPOCH"} & set(os.environ)),
    }
    listed = "; ".join(f"of {where}: {', '.join(names)}" for where, names in unused.items() if names)
    yield Check("ignored variables", "good", f"{listed or 'none'} (a sandbox gets no variable of yours)")
    leaking = sorted(name for name in os.environ if name.startswith(("SBATCH_", "SRUN_")))
    yield make_check("leaking variables", not leaking, ", ".join(leaking) or "none",
                     "unset them: they change whatever you submit by hand (the pipeline submits without them)")  # fmt: skip
    secrets = sorted(name for name in os.environ if NOT_INHERITED.search(name))
    yield make_check("secrets in the environment", not secrets, ", ".join(secrets) or "none",
                     "unset them before you call sbatch by hand, which copies them into job records (the pipeline submits without them)",
                     "unknown")  # fmt: skip


def _fits(chosen: settings.Settings) -> Check:
    def describe() -> str:
        check_plan_fits(chosen)
        expected = forecast.forecast(chosen, NUM_ARMS)
        ranks = chosen.parallelism.world_size
        gpus = f"; it needs {ranks} GPUs at least, with one arm at a time" if chosen.cluster.gpus_per_node else ""
        if expected and chosen.cluster.gpus_per_node:
            gpus += f", and then {expected.first_round_hours / ranks:,.3g} h for the first round"
        return f"model {chosen.model.name}, {ranks} ranks an arm{gpus}"

    return _check_of("configuration", describe)


def _weights(weights_dir: str, model: Mapping[str, Any]) -> Iterator[Check]:
    """Whether the published checkpoint is one of the model, or whether a folder is named that nobody reads."""
    if base_weights.are_outside(model):
        yield _check_of("base weights", lambda: "; ".join(base_weights.describe(weights_dir, model)))
    elif unread := base_weights.unused(weights_dir, model):
        yield Check("base weights", "unknown", unread, "choose that experiment, or leave cluster.weights_dir out")


def _layouts(chosen: settings.Settings) -> Iterator[Check]:
    """What each layout that ships would mean on a site with GPUs: memory of a GPU, GPU-hours of a round, what the site must have."""
    for layout in forecast.layouts(chosen, NUM_ARMS) if chosen.cluster.gpus_per_node else ():
        hours = f"; the first round takes {layout.expected.first_round_hours:,.3g} GPU-hours" if layout.expected else ""
        sizes = ", ".join(f"{work} {footprint.in_units(size)}" for work, size in layout.bytes_per_gpu.items())
        yield make_check(f"layout {layout.name}", not layout.refusal, layout.refusal or f"{layout.must_have(NUM_ARMS)} ({sizes}){hours}",
                         "choose another one (parallelism=...)", "unknown")  # fmt: skip


def _memory(chosen: settings.Settings) -> Iterator[Check]:
    """Whether an arm's ranks fit into the memory of this machine, if arms run here. For a site, see `plan-memory`."""
    if chosen.cluster.kind != "local":
        return
    ranks = chosen.parallelism.world_size
    needed = ranks * max(plan.peak for plan in footprint.of_arm(chosen.to_dict()).values())
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield make_check("memory of an arm", needed <= available,
                     f"{ranks} ranks need {needed / 2**30:,.1f} GiB, this machine has {available / 2**30:,.0f} GiB",
                     "run on a site (cluster=slurm...) or choose a smaller model; `plan-memory` shows what needs the memory")  # fmt: skip


def _meta_job(chosen: settings.Settings) -> Iterator[Check]:
    """Whether the meta job has time for an external target that does all that it may do."""
    target, limit = chosen.external, chosen.cluster.meta.time_limit_minutes
    if target.kind in ("kaggle", "command") and target.push == "meta":
        longest = (target.wait_seconds + target.submissions * target.timeout_seconds) / 60
        yield make_check("time of the meta job", longest <= limit,
                         f"{target.submissions} submissions may take {longest:,.0f} min, and the job ends after {limit} min",
                         "raise cluster.meta.time_limit_minutes, or lower external.timeout_seconds", "unknown")  # fmt: skip


def _campaign(campaign: Campaign) -> Iterator[Check]:
    yield _check_of("frozen facts", lambda: str(facts_of(campaign)["campaign"]))
    yield _check_of("frozen code", lambda: verified_code(campaign, facts_of(campaign)).name)
    yield _check_of(
        "image", lambda: image.verify(campaign.image, facts_of(campaign)["image"]["tree_digest"]).tree_digest[:16]
    )
    yield _plans(campaign)
    mode = campaign.vault.stat().st_mode & 0o777 if campaign.vault.exists() else 0
    yield make_check("vault", mode == 0o700, f"mode {mode:04o}", f"chmod 700 {campaign.vault}")


def _plans(campaign: Campaign) -> Check:
    """Whether the plans are those in the log. Plans of another constitution are not read, because they may have another form."""
    facts = other_rules.facts_in(campaign.log) or {}
    if why := other_rules.other_constitution(facts):
        answer = other_rules.error(campaign.folder, campaign.folder, facts, why, ("doctor", str(campaign.folder)))
        return Check("frozen plans", "unknown", f"they were not read, because {why}", answer.cure)
    rounds = list(campaign.frozen_rounds())
    return _check_of(
        "frozen plans", lambda: f"{len([read_plan(folder) for folder in rounds])} plans agree with the sealed log"
    )


def _check_of(name: str, describe: Callable[[], str]) -> Check:
    """Good, with what `describe` returns. If it raises a PipelineError: bad, with the error's sentence and cure."""
    try:
        return Check(name, "good", describe())
    except PipelineError as error:
        return Check(name, "bad", error.what, error.cure)


def table(checks: Sequence[Check]) -> Any:
    """The checks as a `rich.table.Table`, a row each."""
    from rich.table import Table

    colours = {"good": "green", "bad": "red", "unknown": "yellow"}
    view = Table(box=None, pad_edge=False)
    for column in ("", "check", "found", "cure"):
        view.add_column(column)
    for check in checks:
        view.add_row(f"[{colours[check.verdict]}]{check.verdict}[/]", check.name, check.found, check.cure)
    return view
