"""`doctor`: is this machine, or this site, fit for a campaign? One line a check: what was found, and the cure where something is wrong.

Nothing is changed, but for a canary file in the working folder while a node of a Slurm site looks for it. A check that cannot be made
here says so and is no failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.facts import facts_of, read_plan, verified_code
from pipeline.campaign.layout import Campaign
from pipeline.campaign.records import NUM_ARMS
from pipeline.cluster import forecast, site_check, slurm_submit
from pipeline.cluster.site_check import LEAST_BYTES, SHARED, Check
from pipeline.config import footprint, settings
from pipeline.config.fit import check_plan_fits
from pipeline.execution import base_weights
from pipeline.sandbox import image, namespace

PROGRAMS = {
    "bwrap": "bubblewrap", "mksquashfs": "squashfs-tools", "unsquashfs": "squashfs-tools", "prlimit": "util-linux",
}  # fmt: skip
USER_PROGRAMS = {"squashfuse": "squashfuse", "fuse-overlayfs": "fuse-overlayfs"}


def examine(chosen: settings.Settings, campaign: Campaign | None = None) -> list[Check]:
    """All checks of a configuration, and of a campaign's frozen digests, in the order in which they matter."""
    found = [*_machine(), *_space(chosen), *_environment(), _fits(chosen), *_memory(chosen)]
    if chosen.cluster.weights_dir:
        found.append(
            _tell(
                "base weights", lambda: f"{len(base_weights.build_manifest(chosen.cluster.weights_dir)['files'])} files"
            )
        )
    if chosen.cluster.kind == "slurm":
        found += site_check.examine(chosen)
    if campaign:
        found += _campaign(campaign)
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
    here = shutil.disk_usage(Path.cwd()).free
    enough = here > LEAST_BYTES
    yield Check("disk", "good" if enough else "bad", f"{here / 2**30:.0f} GiB free in {Path.cwd()}",
                "" if enough else "free some (`gc` says what), or keep campaigns elsewhere")  # fmt: skip
    scratch = Path(chosen.cluster.scratch_dir or tempfile.gettempdir())
    if not os.access(scratch, os.W_OK):
        yield Check("scratch", "bad", f"{scratch} is not writable", "cluster.scratch_dir names a node-local folder")
        return
    free = shutil.disk_usage(scratch).free
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(scratch)], capture_output=True, text=True).stdout.strip()
    yield Check("scratch", "good" if free > LEAST_BYTES else "bad", f"{free / 2**30:.0f} GiB free in {scratch} ({kind})",
                "" if free > LEAST_BYTES else "cluster.scratch_dir names a larger node-local folder")  # fmt: skip
    if kind in SHARED:
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
    secrets = sorted(name for name in os.environ if slurm_submit.SECRET.search(name))
    yield Check("secrets in the environment", "good" if not secrets else "unknown", ", ".join(secrets) or "none",
                "jobs are submitted without them; by hand, sbatch would copy them into job records: unset them" if secrets else "")  # fmt: skip


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


def _memory(chosen: settings.Settings) -> Iterator[Check]:
    """Whether an arm's ranks fit into this machine, where they would run here; on a site plan-memory asks the file of the site."""
    if chosen.cluster.kind != "local":
        return
    ranks = chosen.parallelism.world_size
    wanted = ranks * max(each.peak for each in footprint.of_arm(chosen.to_dict()).values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("memory of an arm", "good" if wanted <= there else "bad",
                f"{ranks} ranks take {wanted / 2**30:,.1f} GiB, {there / 2**30:,.0f} GiB are here",
                "" if wanted <= there else "a site (cluster=slurm...), or a smaller model; `plan-memory` says what takes it")  # fmt: skip


def _campaign(campaign: Campaign) -> Iterator[Check]:
    yield _tell("frozen facts", lambda: str(facts_of(campaign)["campaign"]))
    yield _tell("frozen code", lambda: verified_code(campaign, facts_of(campaign)).name)
    yield _tell(
        "image", lambda: image.verify(campaign.image, facts_of(campaign)["image"]["tree_digest"]).tree_digest[:16]
    )
    rounds = list(campaign.frozen_rounds())
    yield _tell("frozen plans", lambda: f"{len([read_plan(each) for each in rounds])}, as the log has them")
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
