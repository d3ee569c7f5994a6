"""The trial: training inside a fork, in a sandbox, watched from outside.

The worker's only words to it are `task.json` and, later, a stop file; its only words back are files in /out. Its progress file is the
heartbeat: a trial that writes nothing new for the configured minutes is killed as stalled. The exit codes are those of
docs/contract.md.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from pipeline.campaign import strict_json
from pipeline.campaign.errors import Interrupted, NotFound, TrialFailed
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Attempt
from pipeline.sandbox import entries
from pipeline.sandbox.bubblewrap import Limits, open_output

ENTRY = ("python", "-P", "-m", "substrate.train")
PATHS = {
    "base": "/substrate/base",
    "tokenizer": "/substrate/base/tokenizer.json",
    "train_data": "/substrate/data/train.jsonl",
    "out": "/out",
    "stop": "/task/stop",
}
POLL_SECONDS = 0.2
MAX_PROGRESS_BYTES = 64 * 2**20  # a trial may write anything; what is copied to the shared file system is bounded
LOG_TAIL_BYTES = 4000


def write_task(attempt: Attempt, config: Mapping[str, Any], base: str = PATHS["base"]) -> None:
    """`task.json` of kind train; config: model, recipe, parallelism, seed; base: folder of the base weights inside."""
    write_file(attempt.task_dir / "task.json", entries.task_text("train", config, PATHS | {"base": base}))


class Process(Protocol):
    """A trial that runs."""

    @property
    def returncode(self) -> int | None: ...

    @property
    def timed_out(self) -> bool: ...

    @property
    def overspent(self) -> str: ...

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...


class Starts(Protocol):
    """A sandbox, or those of several nodes."""

    @property
    def limits(self) -> Limits: ...

    def start(self, command: Sequence[str], log_path: Path) -> AbstractContextManager[Process]: ...


def train(
    sandbox: Starts,
    attempt: Attempt,
    out_dir: Path,
    stall_seconds: float,
    stop_wanted: Callable[[], bool],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Run the trial to its end, calling `look` meanwhile.

    Raises Interrupted when it stopped on request with its state saved, TrialFailed otherwise.
    """
    kills = oom_kills()
    with sandbox.start(ENTRY, attempt.trial_log) as process:
        stalled = _watch(process, attempt, out_dir, stall_seconds, stop_wanted, look)
        code = process.returncode
    if stalled:
        raise TrialFailed("stalled", f"no progress for {stall_seconds:.0f} s", log_tail(attempt.trial_log))
    if process.timed_out:
        raise TrialFailed(
            "timeout", f"the trial used up its {sandbox.limits.wall_seconds:.0f} s", log_tail(attempt.trial_log)
        )
    if process.overspent:
        raise TrialFailed("disk_limit", f"the trial wrote too much: {process.overspent}", log_tail(attempt.trial_log))
    if code == 75 and stop_wanted():
        raise Interrupted("the trial was stopped and saved its state", "Start the arm again and it goes on")
    if code:
        kind = {
            3: "isolation",
            64: "configuration",
            65: "data",
            66: "diverged",
            67: "out_of_memory",
            137: "killed",
        }.get(code, "crashed")
        if kind == "killed" and oom_kills() > kills:
            kind = "out_of_memory"
        raise TrialFailed(kind, f"the trial ended with exit code {code}", log_tail(attempt.trial_log))


def number(value: Any) -> int | float | None:
    """A finite number that a float can hold, as it is; None for everything else that JSON may bring."""
    if type(value) not in (int, float):
        return None
    try:
        return value if math.isfinite(float(value)) else None
    except OverflowError:
        return None


def oom_kills() -> int:
    """How many processes of our memory cgroup the kernel has killed for want of memory; 0 where it does not say."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for file in (
            Path(f"/sys/fs/cgroup{path}/memory.events") if not controllers else None,
            Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control") if "memory" in controllers.split(",") else None,
        ):
            if file and file.exists():
                found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
                return int(found[1]) if found else 0
    return 0


def _watch(
    process: Process,
    attempt: Attempt,
    out_dir: Path,
    stall_seconds: float,
    stop_wanted: Callable[[], bool],
    look: Callable[[], None],
) -> bool:
    """Follow until the end; True when it was killed for standing still."""
    attempt.progress.unlink(
        missing_ok=True
    )  # of a start of this attempt that stalled: the trial's own file goes on from it
    heard, last_heard = 0, time.monotonic()
    while True:
        ended = process.poll() is not None
        size = copy_progress(out_dir, attempt.progress, heard)
        if size != heard:
            heard, last_heard = size, time.monotonic()
        if ended:
            return False
        look()
        if stop_wanted() and not (attempt.task_dir / "stop").exists():
            write_file(attempt.task_dir / "stop", "")
        if time.monotonic() - last_heard > stall_seconds:
            process.kill()
            return True
        time.sleep(POLL_SECONDS)


def copy_progress(out_dir: Path, target: Path, copied: int) -> int:
    """Append to `target` what is new in the trial's progress file; returns how many bytes are copied so far.

    A trial that goes on from a checkpoint takes back the lines of later steps: where the file has become shorter, the copy begins anew.
    """
    try:
        with open_output(out_dir, "progress.jsonl") as source:
            if source.seek(0, 2) < copied:
                target.unlink()
                copied = 0
            source.seek(copied)
            new = source.read(MAX_PROGRESS_BYTES - copied)
    except NotFound:
        return copied
    if new:
        with open(target, "ab") as file:
            file.write(new)
    return copied + len(new)


def progress_lines(attempt: Attempt, phase: str) -> list[dict[str, Any]]:
    """The trial's own complete lines of one phase; what is no such line is left out, for the trial may write anything."""
    if not attempt.progress.exists():
        return []
    found = []
    for text in attempt.progress.read_bytes().split(b"\n")[:-1]:
        try:
            line = strict_json.read(text)
        except strict_json.BadJson:
            continue
        if isinstance(line, dict) and line.get("phase") == phase:
            found.append(line)
    return found


def printable(text: str) -> str:
    """Lines with a mark for each character that is no text: a terminal would obey what a trial has put into its log."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def log_tail(path: Path) -> str:
    """The end of a log, for an outcome's traceback."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
            return printable(file.read().decode(errors="replace"))
    except FileNotFoundError:
        return ""
