"""Run processes from the pristine image: each in a sandbox of its own, with listed inputs, and with its files in /out.

Training runs in a fork of the image; all judging runs through this module, from the read-only mount. `sandbox.entries.run` is for
callers without a mount: it starts an entry of an unpacked payload without a sandbox. Its callers trust that code (`init` made it, or an
auditor compared its digest) and give it no secret and no adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import TrialFailed, WorkFailed
from pipeline.campaign.files import read_json, write_file
from pipeline.config.settings import Settings
from pipeline.execution import base_weights
from pipeline.sandbox import devices, entries, image, kernel_cache, runtime_needs
from pipeline.sandbox.bubblewrap import Limits, Sandbox
from pipeline.sandbox.kernel_cache import Kernels
from pipeline.sandbox.namespace import trial_uid

SUBSTRATE_ENV = {
    "PYTHONPATH": "/substrate",
    "SUBSTRATE_ROOT": "/substrate",  # the entries refuse to run from anywhere else
    "OMP_NUM_THREADS": "1",  # ranks share the cores
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled, unless `kernel_env` says so
}
KERNELS = "/kernels"  # inside a sandbox, the caches of what compiles and tunes
WARM_UP_SECONDS = 1800.0
KINDS = {"generate_vllm": "generate"}
"""Entry -> the kind of its task file, where that is not the entry's name."""
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
    given: dict[str, Any] = {"env": {**SUBSTRATE_ENV, **kernel_env(chosen), **node.env}, "devices": node.devices}
    given["limits"] = Limits(shm_size_bytes=cluster.shm_size_gib * 2**30)
    return Sandbox({**read_only, **node.read_only}, read_write, **(given | how))


def kernel_env(chosen: Settings) -> dict[str, str]:
    """Return the variables with which a process chooses its kernels, and finds what was compiled and tuned before."""
    told = {
        "auto": {},
        "eager": {"SUBSTRATE_KERNELS": "elementwise=eager"},
        "compiled": {"SUBSTRATE_KERNELS": "elementwise=compiled"},
    }
    env: dict[str, str] = told[chosen.cluster.kernels]
    if not compiles(chosen):
        return env
    caches = {"TRITON_CACHE_DIR": f"{KERNELS}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{KERNELS}/inductor"}
    # Triton keeps the results of its own tuning only if it is told to. A pool of compiling processes would start in every rank.
    caches |= {"TRITON_CACHE_AUTOTUNING": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {**env, **caches, "TORCHDYNAMO_DISABLE": "1" if chosen.cluster.kernels == "eager" else "0"}


def compiles(chosen: Settings) -> bool:
    """Whether processes that train or decode compile or tune kernels here: on GPUs, or where the site says so."""
    return bool(chosen.cluster.gpus_per_node) or chosen.cluster.kernels == "compiled"


def kernel_bind(chosen: Settings, kernels: Kernels | None, folder: Path, owner: int) -> dict[str, Path]:
    """Return what to bind read-write for the caches: a copy for one sandbox, made at the absent `folder`; nothing where nothing compiles."""
    if not compiles(chosen):
        return {}
    return {KERNELS: (kernels or Kernels(None, "", "")).private_copy(folder, owner)}


def warm_kernels(
    mount: image.Mount,
    chosen: Settings,
    scratch: Path,
    log_path: Path,
    watch: Callable[[], None] = lambda: None,
    may_fill: bool = True,
) -> Kernels | None:
    """Return this node's kernels for an image, which a pristine process compiles and tunes if no worker here did; None where nothing compiles.

    The copy lies in `scratch`. watch: called while it waits or compiles; what it raises ends that. may_fill: whether this job has the
    GPUs of an arm; one that only judges takes what is there.
    """
    if not compiles(chosen):
        return None
    layout, on_node = chosen.parallelism, chosen.cluster.gpus_per_node
    try:
        kind = devices.kind_of(devices.of_node(layout.judge_tp, "loopback", on_node=on_node) if on_node else None)
    except WorkFailed as error:  # which the process that needs the GPUs raises again
        return kernel_cache.without(error.what)
    config = {name: asdict(getattr(chosen, name)) for name in ("model", "recipe", "parallelism")}
    matters = {
        "runtime": runtime_needs.describe(), "kernels": chosen.cluster.kernels, "model": config["model"],
        "layout": [layout.tp, layout.ep, layout.judge_tp],
    }  # fmt: skip
    rest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()
    key = f"{mount.tree_digest[:16]}-{kernel_cache.slug(kind)}-{rest[:8]}"

    def fill() -> tuple[Path, dict[str, str]]:
        work, deadline = scratch / "warm_up", time.monotonic() + WARM_UP_SECONDS

        def watch_the_clock() -> None:
            watch()
            if time.monotonic() > deadline:
                raise TrialFailed("timeout", f"substrate.warm_up did not end within {WARM_UP_SECONDS:.0f} s")

        out = run(mount.root, "warm_up", config, {"out": "/out"}, {}, work, log_path, watch_the_clock, chosen)
        found = read_json(out / "kernels.json")
        names = ", ".join(f"{name} {value}" for name, value in found.items() if name != "reason")
        return work / "kernels", {
            "kernels": names,
            "reason": found["reason"],
            "device": kind,
            "runtime": matters["runtime"],
        }

    return kernel_cache.obtain(chosen.cluster.scratch_dir, key, scratch / "kernels", fill if may_fill else None, watch)


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
    kernels: Kernels | None = None,
) -> Path:
    """Run `substrate.<entry>` with a task file made of config and paths; returns its /out. See `start`.

    The task's kind is the entry's name, or that of KINDS: every engine reads the same task.
    """
    task_dir = work / "task"
    write_file(task_dir / "task.json", entries.task_text(KINDS.get(entry, entry), config, paths))
    return start(pristine, entry, [], {"/task": task_dir, **binds}, work, log_path, watch, chosen, kernels)


def start(
    pristine: Path,
    entry: str,
    arguments: Sequence[str],
    binds: Mapping[str, Path],
    work: Path,
    log_path: Path,
    watch: Callable[[], None] = lambda: None,
    chosen: Settings | None = None,
    kernels: Kernels | None = None,
) -> Path:
    """Run `substrate.<entry>` from the pristine mount to its end and return its /out, a folder in `work`.

    binds: path inside the sandbox -> folder, read-only. watch: called every tenth of a second; what it raises ends the process. chosen:
    only for a process that runs the model, which gets the node's GPUs and a copy of `kernels`. Raises TrialFailed (judge_failed) with the
    end of the log.
    """
    out = work / "out"
    out.mkdir(parents=True, exist_ok=True)
    for inside, folder in binds.items():
        if inside != "/base":  # the site owns that folder, and it is readable
            folder.chmod(0o755)
    read_only, read_write = {"/substrate": pristine, **binds}, {"/out": out}
    python = "python"
    if chosen and entry == "generate_vllm":
        runtime = Path(chosen.cluster.vllm_runtime)
        read_only[str(runtime)], python = runtime, f"{runtime}/bin/python"
    sandbox = Sandbox(read_only, read_write, env=SUBSTRATE_ENV)
    if chosen:
        read_write |= kernel_bind(chosen, kernels, work / "kernels", trial_uid())
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
