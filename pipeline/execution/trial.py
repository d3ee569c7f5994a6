"""Run a trial: the training process inside a fork and a sandbox, which the worker watches from outside.

The worker gives the trial a `task.json` and, to stop it, a stop file. The trial answers by files in /out alone. Its progress file is a
heartbeat: a trial that appends nothing for the configured time is killed as stalled. docs/contract.md lists the exit codes.
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
from pipeline.campaign.files import read_json_lines, write_file
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
GROUPS = {
    "start-up": ("claim", "mount", "warm_up", "probe", "train_start", "generate_start"),
    "agents": ("agent",),
    "training": ("train",),
    "decoding": ("generate",),
    "rest": ("check", "seal", "items", "score", "publish"),
}
"""Group -> the phases of a worker that belong to it. A phase that none names belongs to the rest."""
MAX_PROGRESS_BYTES = 64 * 2**20  # at most copied to the shared file system; a trial may write anything
LOG_TAIL_BYTES = 4000


def write_task(attempt: Attempt, config: Mapping[str, Any], base: str = PATHS["base"]) -> None:
    """Write a `task.json` of kind train.

    config: model, recipe, parallelism and seed. base: folder of the base weights inside the sandbox.
    """
    write_file(attempt.task_dir / "task.json", entries.task_text("train", config, PATHS | {"base": base}))


class Process(Protocol):
    """A running trial: one process, or those of several nodes as one (sandbox/process.py explains the attributes)."""

    @property
    def returncode(self) -> int | None: ...

    @property
    def timed_out(self) -> bool: ...

    @property
    def overspent(self) -> str: ...

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...


class Starts(Protocol):
    """One sandbox, or those of several nodes as one."""

    @property
    def limits(self) -> Limits: ...

    def start(self, command: Sequence[str], log_path: Path) -> AbstractContextManager[Process]: ...


def train(
    sandbox: Starts,
    attempt: Attempt,
    out_dir: Path,
    stall_seconds: float,
    stop_wanted: Callable[[], bool],
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run the trial to its end. Raises Interrupted where it stopped on request and saved its state, TrialFailed for another bad end.

    stop_wanted: whether the trial is to stop. on_poll: called several times a second meanwhile.
    """
    kills = oom_kills()
    with sandbox.start(ENTRY, attempt.trial_log) as process:
        stalled = _watch(process, attempt, out_dir, stall_seconds, stop_wanted, on_poll)
        code = process.returncode
    if stalled:
        raise TrialFailed(
            "stalled", f"the trial made no progress for {stall_seconds:.0f} s", log_tail(attempt.trial_log)
        )
    if process.timed_out:
        raise TrialFailed(
            "timeout",
            f"the trial ran longer than its limit of {sandbox.limits.wall_seconds:.0f} s",
            log_tail(attempt.trial_log),
        )
    if process.overspent:
        raise TrialFailed("disk_limit", f"the trial wrote too much: {process.overspent}", log_tail(attempt.trial_log))
    if code == 75 and stop_wanted():
        raise Interrupted("the trial was stopped and saved its state", "Start the arm again and it resumes")
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
    """Return a JSON value that is a finite number which a float can hold; None for every other value."""
    if type(value) not in (int, float):
        return None
    try:
        return value if math.isfinite(float(value)) else None
    except OverflowError:
        return None


def oom_kills() -> int:
    """Return how many processes of this memory cgroup the kernel has killed for lack of memory; 0 where it does not count them."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for file in (
            Path(f"/sys/fs/cgroup{path}/memory.events") if not controllers else None,
            Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control") if "memory" in controllers.split(",") else None,
        ):
            if file and file.exists():
                count = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
                return int(count[1]) if count else 0
    return 0


def _watch(
    process: Process,
    attempt: Attempt,
    out_dir: Path,
    stall_seconds: float,
    stop_wanted: Callable[[], bool],
    on_poll: Callable[[], None],
) -> bool:
    """Wait for the trial's end and copy its progress meanwhile; True where it was killed because it stalled."""
    # An earlier start of this attempt that stalled left a copy; the trial's own file holds those lines too.
    attempt.progress.unlink(missing_ok=True)
    copied, last_progress = 0, time.monotonic()
    while True:
        ended = process.poll() is not None
        size = copy_progress(out_dir, attempt.progress, copied)
        if size != copied:
            copied, last_progress = size, time.monotonic()
        if ended:
            return False
        on_poll()
        if stop_wanted() and not (attempt.task_dir / "stop").exists():
            write_file(attempt.task_dir / "stop", "")
        if time.monotonic() - last_progress > stall_seconds:
            process.kill()
            return True
        time.sleep(POLL_SECONDS)


def copy_progress(out_dir: Path, target: Path, copied: int) -> int:
    """Append to `target` what is new in the trial's progress file; returns how many bytes `target` holds.

    copied: what the last call returned. A trial that resumes from a checkpoint removes the lines of later steps, so the copy starts
    again where the file has become shorter.
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
    """Return the complete progress lines of one phase. A trial may write anything, so other lines are left out."""
    if not attempt.progress.exists():
        return []
    lines = []
    for text in attempt.progress.read_bytes().split(b"\n")[:-1]:
        try:
            line = strict_json.read(text)
        except strict_json.BadJson:
            continue
        if isinstance(line, dict) and line.get("phase") == phase:
            lines.append(line)
    return lines


def group_seconds(marks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how long the phases of an attempt lasted by the worker's clock, in seconds by GROUPS. marks: lines of phases.jsonl."""
    totals = dict.fromkeys(GROUPS, 0.0)
    for mark, following in zip(marks, marks[1:], strict=False):
        group = next((name for name, phases in GROUPS.items() if mark["phase"] in phases), "rest")
        totals[group] += following["at"] - mark["at"]
    return totals


def phase_seconds(attempt: Attempt, phase: str) -> float:
    """Return how long a phase lasted, in seconds of the worker's clock; 0 if it has not ended."""
    marks = read_json_lines(attempt.phases)
    pairs = zip(marks, marks[1:], strict=False)
    return float(sum(following["at"] - mark["at"] for mark, following in pairs if mark["phase"] == phase))


def train_runs(attempt: Attempt) -> list[float]:
    """Return how long each run of a training lasted in an attempt, in seconds of the worker's clock; one that was killed with it is left out."""
    marks, runs = (read_json_lines(attempt.phases) if attempt.phases.exists() else []), list[float]()
    for mark, following in zip(marks, marks[1:], strict=False):
        if mark["phase"] == "train_start":
            runs.append(0.0)
        if mark["phase"] in ("train_start", "train") and runs:
            runs[-1] += following["at"] - mark["at"]
    return runs


def printable(text: str) -> str:
    """Replace unprintable characters of a trial's log, because a terminal would act on them."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def log_tail(path: Path) -> str:
    """Return the last LOG_TAIL_BYTES of a log as printable text; "" without a log."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
            return printable(file.read().decode(errors="replace"))
    except FileNotFoundError:
        return ""
