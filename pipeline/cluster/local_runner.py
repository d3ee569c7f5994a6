"""Run the stages of a round as child processes on this machine, several at once."""

from __future__ import annotations

import heapq
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.cluster.stage_command import Stage, command
from pipeline.config.settings import Settings
from pipeline.sandbox import devices


def run_local(
    stages: Sequence[Stage],
    code_dir: Path,
    at_once: int,
    logs_dir: Path,
    watch: Callable[[], object] = lambda: None,
    runtime: Sequence[str] = (),
    gpus: Sequence[str] = (),
) -> dict[str, int]:
    """Run stages as child processes, at most `at_once` at the same time. Returns log name (such as r0001_a3) -> exit code.

    watch: called about ten times a second. runtime: as in `stage_command.command`, whose errors are raised before anything runs.
    gpus: for each of the stages that run at the same time its own GPUs (`gpus_by_arm`); none on a machine without GPUs.

    A failed stage does not stop the others. On Ctrl-C or SIGTERM this sends SIGTERM to every running stage, waits until it has saved its
    state, and raises KeyboardInterrupt.

    A signal only sets a flag, which the loop looks at: a handler that raises may run anywhere, such as in a weakref callback, where Python
    swallows what is raised, and the signal would be lost.
    """
    logs_dir.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(code_dir)}
    waiting = [(stage, command(stage, runtime)) for stage in stages]
    running: dict[str, subprocess.Popen[bytes]] = {}
    free, held = list(gpus), {}
    codes: dict[str, int] = {}
    stop = threading.Event()
    earlier = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while waiting or running:
            if stop.is_set():
                raise KeyboardInterrupt
            while waiting and len(running) < at_once:
                stage, words = waiting.pop(0)
                name = "_".join(stage[2:4]) if stage[0] == "worker" else stage[0]
                if free:
                    held[name] = free.pop(0)
                own = {devices.SHARE: held[name]} if name in held else {}
                with open(logs_dir / f"{name}.log", "ab") as log:
                    running[name] = subprocess.Popen(
                        words, env=environment | own, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                    )
            watch()
            time.sleep(0.1)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                codes[name] = running.pop(name).returncode
                free += [held.pop(name)] if name in held else []
    finally:
        for child in running.values():
            child.terminate()
        for child in (
            running.values()
        ):  # a second signal only sets the flag again, so that the arms are saved before this process ends
            child.wait()
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return codes


@contextmanager
def beside(
    stage: Stage | None, code_dir: Path, logs_dir: Path, runtime: Sequence[str], gpus: int, gpus_per_node: int
) -> Iterator[None]:
    """Run a stage while others run, and end it after them. It has the last `gpus` of the node's GPUs. stage: None for none.

    Raises as `devices.of_node`.
    """
    if stage is None:
        yield
        return
    numbers = devices.of_node(gpus, "loopback").gpus[:gpus_per_node] if gpus else []
    own = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers[-gpus:]))} if gpus else {}
    logs_dir.mkdir(parents=True, exist_ok=True)
    with open(logs_dir / f"{stage[0]}.log", "ab") as log:
        environment = {**os.environ, "PYTHONPATH": str(code_dir)} | own
        child = subprocess.Popen(
            command(stage, runtime), env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        child.terminate()
        child.wait()


def arms_at_once(chosen: Settings, most: int) -> int:
    """How many arms this machine runs at the same time. most: for how many it has GPUs; 0 where arms compute on cores."""
    cores = chosen.cluster.arms_at_once or max(1, len(os.sched_getaffinity(0)) // chosen.parallelism.world_size)
    return min(cores, most) if most else cores


def makespan(seconds: Sequence[float], at_once: int) -> float:
    """Seconds from the first start to the last end of stages that last so long, begin in this order and run so many at once."""
    free = [0.0] * max(1, at_once)
    for each in seconds:
        heapq.heappush(free, heapq.heappop(free) + each)
    return max(free)


def gpus_by_arm(gpus: int, gpus_per_node: int) -> list[str]:
    """The GPUs of each arm that this machine can run at the same time, as numbers on it, such as 4,5 and 6,7 for two GPUs an arm.

    Only those are shared out that this process was given: by CUDA_VISIBLE_DEVICES, by a job, by a container. gpus_per_node: at most so many
    are used. Raises as `devices.of_node`.
    """
    return shared_out(devices.of_node(gpus, "loopback"), gpus, gpus_per_node) if gpus else []


def shared_out(node: devices.NodeDevices, gpus: int, most: int) -> list[str]:
    """The GPUs of a node, at most so many, shared out to arms that need `gpus` each. What is left over goes to nobody.

    Parts of a GPU (MIG) are not told apart, so one arm at a time has them all, for which the share is empty.
    """
    if "MIG-" in node.env["CUDA_VISIBLE_DEVICES"]:
        return [""]
    numbers = node.gpus[:most]
    firsts = range(0, len(numbers) - gpus + 1, gpus)
    return [",".join(map(str, numbers[first : first + gpus])) for first in firsts]
