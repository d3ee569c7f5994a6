"""Processes of the image as it is: how each is started, what it is given, and how its end is read.

A training runs in a fork; everything here runs from the mount itself, in a sandbox of its own, and leaves files in its /out. Judging has
no other way. `sandbox.entries.run` is for who has no mount and needs no sandbox: it starts an entry of an unpacked payload as the caller,
who believes that code (`init` made it, an auditor compared its digest) and shows it no secret and no adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import TrialFailed
from pipeline.campaign.files import write_file
from pipeline.config.settings import Settings
from pipeline.execution import base_weights
from pipeline.sandbox import devices, entries
from pipeline.sandbox.bubblewrap import Limits, Sandbox

SUBSTRATE_ENV = {
    "PYTHONPATH": "/substrate",
    "SUBSTRATE_ROOT": "/substrate",  # the entries refuse to run from anywhere else
    "OMP_NUM_THREADS": "1",  # ranks share the cores
    "TORCHDYNAMO_DISABLE": "1",  # compiling needs a C++ compiler on the node and buys nothing at these sizes
}
POLL_SECONDS = 0.1


def base_of(pristine: Path, chosen: Settings) -> tuple[str, dict[str, Path]]:
    """(folder of the base weights inside a sandbox, what to bind for it); verified, and staged where the site asks for it."""
    if not base_weights.are_outside(asdict(chosen.model)):
        return "/substrate/base", {}
    cluster = chosen.cluster
    return "/base", {
        "/base": base_weights.ready(pristine / chosen.model.weights, cluster.weights_dir, cluster.stage_dir)
    }


def sandbox_of(chosen: Settings, read_only: Mapping[str, Path], read_write: Mapping[str, Path], **how: Any) -> Sandbox:
    """A sandbox for training or decoding: the substrate's variables, and of the node what the site's file says; how: of `Sandbox`.

    Raises WorkFailed where GPUs should be and none opens.
    """
    cluster = chosen.cluster
    node = devices.of_node(cluster.gpus_per_node, how.get("network", "loopback"))
    given: dict[str, Any] = {"env": {**SUBSTRATE_ENV, **node.env}, "devices": node.devices}
    given["limits"] = Limits(shm_size_bytes=cluster.shm_size_gib * 2**30)
    return Sandbox({**read_only, **node.read_only}, read_write, **(given | how))


def run(
    pristine: Path,
    entry: str,
    config: Mapping[str, Any],
    paths: Mapping[str, Any],
    binds: Mapping[str, Path],
    work: Path,
    log_path: Path,
    watch: Callable[[], None] = lambda: None,
    chosen: Settings | None = None,
) -> Path:
    """An entry that reads a task file of its own name as kind; returns its /out."""
    task_dir = work / "task"
    write_file(task_dir / "task.json", entries.task_text(entry, config, paths))
    return start(pristine, entry, [], {"/task": task_dir, **binds}, work, log_path, watch, chosen)


def start(
    pristine: Path,
    entry: str,
    arguments: Sequence[str],
    binds: Mapping[str, Path],
    work: Path,
    log_path: Path,
    watch: Callable[[], None] = lambda: None,
    chosen: Settings | None = None,
) -> Path:
    """Run `substrate.<entry>` from the pristine mount to its end, calling `watch` meanwhile; returns its /out.

    chosen: for the process that decodes, which gets the node's GPUs; the others need nothing of it.
    """
    out = work / "out"
    out.mkdir(parents=True, exist_ok=True)
    for inside, folder in binds.items():
        if inside != "/base":  # the site's own, and readable
            folder.chmod(0o755)
    seen, written = {"/substrate": pristine, **binds}, {"/out": out}
    python = "python"
    if chosen and chosen.tasks.engine == "vllm":
        runtime = Path(chosen.cluster.vllm_runtime)
        seen[str(runtime)], python = runtime, f"{runtime}/bin/python"
    sandbox = sandbox_of(chosen, seen, written) if chosen else Sandbox(seen, written, env=SUBSTRATE_ENV)
    with sandbox.start([python, "-P", "-m", f"substrate.{entry}", *arguments], log_path) as process:
        while process.poll() is None:
            watch()  # what it raises ends the process too
            time.sleep(POLL_SECONDS)
        code = process.returncode
    if code:
        tail = log_path.read_text(errors="replace")[-2000:]
        raise TrialFailed("judge_failed", f"substrate.{entry} ended with exit code {code}", tail)
    return out
