"""Run processes from the pristine image: each in a sandbox of its own, with listed inputs, and with its files in /out.

Training runs in a fork of the image; all judging runs through this module, from the read-only mount. `sandbox.entries.run` is for
callers without a mount: it starts an entry of an unpacked payload without a sandbox. Its callers trust that code (`init` made it, or an
auditor compared its digest) and give it no secret and no adapter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
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
    """Return (folder of the base weights inside a sandbox, folders to bind for it), after verifying weights that lie outside the image.

    pristine: root of the mounted image. Raises as `base_weights.verified_folder`.
    """
    if not base_weights.are_outside(asdict(chosen.model)):
        return "/substrate/base", {}
    cluster = chosen.cluster
    return "/base", {
        "/base": base_weights.verified_folder(pristine / chosen.model.weights, cluster.weights_dir, cluster.stage_dir)
    }


def sandbox_of(
    chosen: Settings, read_only: Mapping[str, Path], read_write: Mapping[str, Path], gpus: int, **how: Any
) -> Sandbox:
    """Return a sandbox for training or decoding, with the substrate's variables and the job's devices on this node.

    gpus: how many the work needs here where the site has GPUs. how: further arguments of `Sandbox`. Raises as `devices.of_node`.
    """
    cluster = chosen.cluster
    needed, network = gpus if cluster.gpus_per_node else 0, how.get("network", "loopback")
    node = devices.of_node(needed, network, on_node=cluster.gpus_per_node)
    given: dict[str, Any] = {"env": {**SUBSTRATE_ENV, **node.env}, "devices": node.devices}
    given["limits"] = Limits(shm_size_bytes=cluster.shm_size_gib * 2**30)
    return Sandbox({**read_only, **node.read_only}, read_write, **(given | how))


def judge_replicas(chosen: Settings) -> int:
    """Return how many replicas of the model decode here: one for each judge_tp devices of this job on this node.

    The devices are the job's GPUs, or where the site has none as many cores as an arm has ranks. Raises as `devices.of_node`.
    """
    layout, on_node = chosen.parallelism, chosen.cluster.gpus_per_node
    if on_node:
        node = devices.of_node(layout.judge_tp, "loopback", on_node=on_node)
        return layout.replicas(len(node.env["CUDA_VISIBLE_DEVICES"].split(",")))
    return layout.replicas(min(layout.world_size, len(os.sched_getaffinity(0))))


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
    """Run `substrate.<entry>` with a task file made of config and paths; returns its /out. See `start`.

    The task's kind is the entry's name up to its first `_`: every engine reads the same task, of kind generate.
    """
    task_dir = work / "task"
    write_file(task_dir / "task.json", entries.task_text(entry.partition("_")[0], config, paths))
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
    """Run `substrate.<entry>` from the pristine mount to its end and return its /out, a folder in `work`.

    binds: path inside the sandbox -> folder, read-only. watch: called every tenth of a second; what it raises ends the process. chosen:
    only for the process that decodes, which gets the node's GPUs. Raises TrialFailed (judge_failed) with the end of the log.
    """
    out = work / "out"
    out.mkdir(parents=True, exist_ok=True)
    for inside, folder in binds.items():
        if inside != "/base":  # the site owns that folder, and it is readable
            folder.chmod(0o755)
    read_only, read_write = {"/substrate": pristine, **binds}, {"/out": out}
    python = "python"
    if chosen and chosen.tasks.engine == "vllm":
        runtime = Path(chosen.cluster.vllm_runtime)
        read_only[str(runtime)], python = runtime, f"{runtime}/bin/python"
    sandbox = Sandbox(read_only, read_write, env=SUBSTRATE_ENV)
    if chosen:
        sandbox = sandbox_of(chosen, read_only, read_write, chosen.parallelism.judge_tp)
        if chosen.tasks.engine == "vllm":  # its own default compiles, and says what it lacks where it cannot
            sandbox = replace(
                sandbox, env={key: value for key, value in sandbox.env.items() if key != "TORCHDYNAMO_DISABLE"}
            )
    with sandbox.start([python, "-P", "-m", f"substrate.{entry}", *arguments], log_path) as process:
        while process.poll() is None:
            watch()
            time.sleep(POLL_SECONDS)
        code = process.returncode
    if code:
        tail = log_path.read_text(errors="replace")[-2000:]
        raise TrialFailed("judge_failed", f"substrate.{entry} ended with exit code {code}", tail)
    return out
