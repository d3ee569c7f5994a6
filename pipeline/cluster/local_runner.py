"""Run the stages of a round as child processes of this machine, some side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.cluster.stage_command import Stage, command


def run_local(
    stages: Sequence[Stage],
    code_dir: Path,
    at_once: int,
    logs_dir: Path,
    watch: Callable[[], None] = lambda: None,
    runtime: Sequence[str] = (),
) -> dict[str, int]:
    """Run stages as child processes, `at_once` side by side; `watch` is called between polls. Returns exit codes by log name.

    runtime: as of `command`, whose errors come before anything runs.

    A failed stage does not stop the others. On Ctrl-C or SIGTERM every running stage is ended (it saves what it can) and the
    interrupt goes on to the caller.
    """
    logs_dir.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(code_dir)}
    waiting = [(stage, command(stage, runtime)) for stage in stages]
    running: dict[str, subprocess.Popen[bytes]] = {}
    codes: dict[str, int] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, as Ctrl-C does
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                stage, words = waiting.pop(0)
                name = "_".join(stage[2:4]) if stage[0] == "worker" else stage[0]
                with open(logs_dir / f"{name}.log", "ab") as log:
                    running[name] = subprocess.Popen(
                        words, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                    )
            watch()
            time.sleep(0.1)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                codes[name] = running.pop(name).returncode
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
        signal.signal(signal.SIGTERM, before)
    return codes
