"""The worker's side of an agent's tools: file tools and commands, each in a sandbox of its own over the fork.

A file tool is tool_script.py in a sandbox without devices. A command is `/bin/sh -c` in the trial's sandbox, with an /out, a /tmp and a HOME
of its own that are removed afterwards, so that only the fork carries anything from one call to the next. Commands and trainings draw on one
`GpuMeter`, which bounds what an arm may use whatever the edited code does.

Call it from the main thread alone, because a sandbox dies with its thread. Nothing runs in the fork between two calls.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.agent import tool_script
from pipeline.agent.tool_script import MAX_OUTPUT_BYTES, PART, shortened
from pipeline.campaign import strict_json
from pipeline.campaign.errors import Interrupted
from pipeline.campaign.files import write_file
from pipeline.execution.trial import oom_kills, printable
from pipeline.sandbox.bubblewrap import Confined, Sandbox
from pipeline.sandbox.namespace import scratch_folder

NO_BYTECODE = {"PYTHONPYCACHEPREFIX": "/tmp/bytecode"}
"""Python then neither reads nor writes a __pycache__ of the fork. A .pyc that is planted there would run in place of its source, which the
diff shows; with this variable it is without effect, and an honest training leaves none (fork_diff.py closes all bytecode)."""
SCRIPTS = ("fork_files.py", "tool_script.py")
WRITING = ("write", "patch")
POLL_SECONDS = 0.05
MAX_COMMAND_BYTES = 2**15
MAX_SECONDS = 24 * 3600
MIB = 2**20
LEAST_DISK = 16 * MIB  # what a command may write even in a fork that is full, so that it can tidy up

FILE_LIMITS: dict[str, Any] = {
    "wall_seconds": 30.0, "num_processes": 64, "file_size_bytes": 8 * MIB, "address_space_bytes": 2**31,
    "disk_size_bytes": 64 * MIB, "tmp_size_bytes": MIB, "log_size_bytes": 4 * MIB,
}  # fmt: skip
RUN_LIMITS: dict[str, Any] = {"num_processes": 1024, "file_size_bytes": 1024 * MIB, "log_size_bytes": 64 * MIB}
MOST_IN_FORK = {"--block-size=1": 2048 * MIB, "--inodes": 20_000}  # that commands may add to a fork, as `du` counts it

Answer = dict[str, Any]


def refused(failure: str, what: str) -> Answer:
    """The answer of a tool that did not do what was asked. failure: a stable code; what: a sentence with the cure."""
    return {"ok": False, "failure": failure, "what": shortened(printable(what))[0]}


class GpuMeter:
    """The GPU-seconds of one arm: what its plan allows, and what commands and trainings have used.

    num_devices: GPUs of the arm, or its ranks where the site has no GPU (unit "rank-seconds"); each second of a process counts so many
    times. wall_left: seconds of the whole session that are left, which end a process too.
    """

    def __init__(
        self, gpu_seconds: float, num_devices: int, wall_left: Callable[[], float] = lambda: math.inf,
        unit: str = "GPU-seconds",
    ) -> None:  # fmt: skip
        self.allowed, self.num_devices, self.used, self.unit = float(gpu_seconds), num_devices, 0.0, unit
        self._wall_left = wall_left

    @property
    def left(self) -> float:
        """GPU-seconds that may still be used; 0 where none are left."""
        return max(0.0, self.allowed - self.used)

    def charge(self, wall_seconds: float) -> None:
        """Count a process that ran so long on every device."""
        self.used += max(0.0, wall_seconds) * self.num_devices

    def wall_limit(self, seconds: float) -> float:
        """How long a process may run that asks for so many seconds."""
        return max(0.0, min(float(seconds), self.left / self.num_devices, self._wall_left()))

    def spent(self) -> tuple[str, str]:
        """(failure, sentence) of a process that may not run, or that was ended before its own limit."""
        if self._wall_left() <= 0 < self.left:
            return "budget_wall", "the session's wall time is over; finish with what there is"
        return (
            "budget_gpu_seconds",
            f"the arm's {self.allowed:g} {self.unit} of runs are used up; finish with what there is",
        )


class ToolRunner:
    """Carries out the tools of one agent in one fork.

    sandbox_of: `image_process.sandbox_of` of the arm's settings. open_paths: globs of article 16. work: a folder in scratch that only the
    worker enters. read_only: further binds of commands, such as /task. gpus: how many a command gets. stop_wanted: whether the worker is
    to stop; a command then ends, and Interrupted is raised. own: makes what else a command may write, at an absent folder, such as a copy
    of the kernels.
    """

    def __init__(
        self,
        sandbox_of: Callable[..., Sandbox],
        fork_root: Path,
        open_paths: Sequence[str],
        meter: GpuMeter,
        work: Path,
        *,
        read_only: Mapping[str, Path] | None = None,
        gpus: int = 0,
        stop_wanted: Callable[[], bool] = lambda: False,
        own: Callable[[Path], Mapping[str, Path]] = lambda folder: {},
    ) -> None:
        self.meter, self.open_paths = meter, tuple(open_paths)
        self._sandbox_of, self._fork, self._work = sandbox_of, fork_root, work
        self._read_only, self._gpus, self._stop_wanted = dict(read_only or {}), gpus, stop_wanted
        self._own = own
        self._before = {count: _disk_usage(fork_root, count) for count in MOST_IN_FORK}

    def call(self, name: str, arguments: Any) -> Answer:
        """What a tool answers: {"ok": true, "output", "truncated"} or {"ok": false, "failure", "what"}."""
        if name != "run":
            return self.file_tool(name, arguments)
        given = {"seconds": 60, **arguments} if isinstance(arguments, dict) else {}
        if set(given) != {"command", "seconds"}:
            return refused("bad_arguments", "run takes an object with command and seconds, and nothing else")
        return self.run(given["command"], given["seconds"])

    def file_tool(self, name: str, arguments: Any) -> Answer:
        """Run list, read, search, write or patch. Raises WorkFailed where the sandbox does not start."""
        if not isinstance(name, str) or name not in tool_script.ARGUMENTS:
            return refused("unknown_tool", f"there is no tool {str(name)[:80]!r}; use one of those that you were given")
        with scratch_folder(self._work, "tool-") as folder:
            request, log = folder / "request.json", folder / "log"
            write_file(request, json.dumps({"name": name, "arguments": arguments, "open_paths": self.open_paths}))
            shown = {f"/tools/pipeline/agent/{each}": Path(__file__).with_name(each) for each in SCRIPTS}
            fork = {"/substrate": self._fork}
            read_only = {**shown, "/request.json": request} | ({} if name in WRITING else fork)
            sandbox = self._sandbox_of(read_only, fork if name in WRITING else {}, 0)
            limits = replace(sandbox.limits, **FILE_LIMITS)
            # Not the substrate's variables: with them Python would import what lies in the fork.
            sandbox = replace(sandbox, env={"PYTHONPATH": "/tools", "PYTHONDONTWRITEBYTECODE": "1"}, limits=limits)
            self._tidy()
            try:
                command = [sys.executable, "-sP", "-m", "pipeline.agent.tool_script", "/request.json"]
                with sandbox.start(command, log) as process:
                    self._wait(process)
                said = strict_json.read(log.read_bytes(), max_bytes=FILE_LIMITS["log_size_bytes"])
            except strict_json.BadJson:
                why = f"after {FILE_LIMITS['wall_seconds']:g} s" if process.timed_out else process.overspent
                what = f"{name} was ended: {why or f'exit code {process.returncode}'}: {_log_text(log)[0][-500:]}"
                return refused("trial_failed", f"{what}; ask for less")
            finally:
                self._tidy()
        if not said["ok"]:
            return refused(said["failure"], said["what"])
        output, is_cut = shortened(printable(said["output"]))
        return {"ok": True, "output": output, "truncated": said["truncated"] or is_cut}

    def run(self, command: Any, seconds: Any = 60) -> Answer:
        """Run a shell command in the fork, at most `seconds`, and as long as GPU-seconds are left.

        The output is that of both streams: head and tail, below a line that says how the command ended and which limit ended it.
        Raises WorkFailed where the sandbox does not start, Interrupted where the worker is to stop.
        """
        if type(seconds) is not int or not 1 <= seconds <= MAX_SECONDS:
            return refused("bad_arguments", f"seconds of run is not a whole number from 1 to {MAX_SECONDS}; give one")
        if not _is_command(command):
            what = f"command of run is no text of 1 to {MAX_COMMAND_BYTES} bytes without a zero byte"
            return refused("bad_arguments", f"{what}; write a long script to a file of the fork")
        limit = self.meter.wall_limit(seconds)
        if limit <= 0:
            return refused(*self.meter.spent())
        kills = oom_kills()
        with scratch_folder(self._work, "run-") as folder:
            (folder / "out").mkdir()
            written = {"/substrate": self._fork, "/out": folder / "out", **self._own(folder / "own")}
            sandbox = self._sandbox_of(self._read_only, written, self._gpus, cwd="/substrate")
            room = {count: most - self._grown(count) for count, most in MOST_IN_FORK.items()}
            limits = replace(
                sandbox.limits,
                **{name: min(most, getattr(sandbox.limits, name)) for name, most in RUN_LIMITS.items()},
                wall_seconds=limit,
                disk_size_bytes=max(LEAST_DISK, room["--block-size=1"]),
                num_files=max(100, room["--inodes"]),
            )
            sandbox = replace(sandbox, limits=limits, env={**sandbox.env, **NO_BYTECODE})
            with sandbox.start(["/bin/sh", "-c", command], folder / "log") as process:
                began = time.monotonic()
                try:
                    self._wait(process, began + limit)
                finally:
                    process.kill()
                    wall_seconds = time.monotonic() - began
                    self.meter.charge(wall_seconds)
            text, is_cut = _log_text(folder / "log")
        if process.timed_out and limit < seconds:
            failure, what = self.meter.spent()
            return refused(failure, f"{what}; the command printed:\n{text}")
        how = _ending(process, seconds, oom_kills() > kills)
        output, was_cut = shortened(f"{how}; it took {wall_seconds:.1f} s\n{text}", MAX_OUTPUT_BYTES)
        return {"ok": True, "output": output, "truncated": is_cut or was_cut}

    def _wait(self, process: Confined, deadline: float = math.inf) -> None:
        """Wait for the end. deadline: when the limit of time ends it, in monotonic seconds, so that no poll comes later than that."""
        while process.poll() is None:
            if self._stop_wanted():
                process.kill()
                raise Interrupted("the worker was asked to stop during an agent's tool", "Start the arm again")
            time.sleep(min(POLL_SECONDS, max(0.001, deadline - time.monotonic())))

    def _grown(self, count: str) -> int:
        return _disk_usage(self._fork, count) - self._before[count]

    def _tidy(self) -> None:
        """Remove what a write that was killed has left; a folder of that name is the agent's, and the diff shows it."""
        with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            os.unlink(self._fork / PART)


def _is_command(command: Any) -> bool:
    try:
        return isinstance(command, str) and 0 < len(command.encode()) <= MAX_COMMAND_BYTES and "\0" not in command
    except UnicodeEncodeError:
        return False


def _ending(process: Confined, seconds: int, is_out_of_memory: bool) -> str:
    """How a command ended, for the first line of its output."""
    code = process.returncode or 0
    if process.timed_out:
        return f"killed by the limit of this command, {seconds} s"
    if process.overspent:
        return f"killed because it wrote too much: {process.overspent}"
    if code == 137 and is_out_of_memory:
        return "killed for lack of memory"
    if code > 128:
        with suppress(ValueError):
            return f"ended by signal {signal.Signals(code - 128).name}"
    return f"exit code {code}"


def _log_text(log: Path) -> tuple[str, bool]:
    """(the printable text of a log, whether its middle was cut). Only head and tail of a long one are read."""
    most = MAX_OUTPUT_BYTES - 512
    size = log.stat().st_size
    # A byte that is not printable becomes a mark of three bytes.
    for half in (most // 2, most // 6):
        with open(log, "rb") as file:
            if size <= 2 * half:
                text, is_cut = printable(file.read().decode(errors="replace")), False
            else:
                head = file.read(half).decode(errors="replace")
                file.seek(size - half)
                tail = file.read(half).decode(errors="replace")
                text = printable(f"{head}\n[{size - 2 * half} bytes were cut here]\n{tail}")
                is_cut = True
        if len(text.encode()) <= most:
            break
    return shortened(text, most)[0], is_cut


def _disk_usage(folder: Path, count: str) -> int:
    """What `du` counts below a folder."""
    done = subprocess.run(["du", "-s", count, "--", folder], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return int(done.stdout.split()[0]) if done.stdout else 0
