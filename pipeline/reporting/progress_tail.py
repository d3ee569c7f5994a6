"""Read files that a running arm makes longer, without reading all of them: the newest training line, the line of a step, a curve, items.

A long training writes 100,000 lines, and a view looks at eight arms twice a second. So each function reads a few blocks at places that it
chooses, however long the file is: training lines are in the order of their steps, which a search by halves uses. A trial may write anything,
so a search gives up after MOST_BYTES, and what it finds is checked before it is shown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.campaign import strict_json
from pipeline.campaign.layout import Attempt
from pipeline.campaign.shared_path import open_regular, patiently

BLOCK_BYTES = 2048  # some ten training lines
MOST_BYTES = 2**20  # read in search of one line
LARGEST, LONGEST = 2**53, 1e9  # steps and tokens, and seconds, of any training
_LINES: dict[
    Path, tuple[int, int, int]
] = {}  # journal -> (inode, bytes counted, lines), so that only what is new is read


@dataclass(frozen=True)
class Step:
    """A training line. `tokens` and `seconds` are totals over all starts of the training."""

    step: int
    num_steps: int
    loss: float
    tokens: float
    seconds: float


def newest(path: Path) -> tuple[Step | None, bool]:
    """(the newest training line, whether it is malformed). (None, False) before the first one.

    A last line without its end is still being written and is left out.
    """
    try:
        line = patiently(path, lambda: _newest_line(path))
    except FileNotFoundError:
        return None, False
    step = _numbers(line) if line else None
    return step, line is not None and step is None


def at_step(path: Path, step: int) -> Step | None:
    """The newest training line of at most this step; None without one, or where the file's steps are in no order."""
    try:
        return patiently(path, lambda: _at_step(path, step))
    except FileNotFoundError:
        return None


def curve(path: Path, num_points: int) -> list[Step]:
    """At most so many training lines at equal distances in the file, the last of them the newest; [] before the first line."""
    try:
        found = patiently(path, lambda: _spread(path, num_points))
    except FileNotFoundError:
        return []
    last, _ = newest(path)
    by_step = {each.step: each for each in (*found, *([last] if last else []))}
    return [by_step[step] for step in sorted(by_step)][-num_points:]


def seconds_per_step(path: Path, last: Step) -> float | None:
    """The recent speed of a training that is at `last`: of its newest tenth, or of ten steps; None where it has made fewer than two."""
    before = at_step(path, last.step - max(10, last.step // 10)) or at_step(path, 1)
    if before is None or before.step >= last.step or before.seconds >= last.seconds:
        return None
    return (last.seconds - before.seconds) / (last.step - before.step)


@dataclass(frozen=True)
class Items:
    """Judged items that are decoded: all, and those of the newest start alone. `seconds`: how long that start has been decoding."""

    done: int
    of_start: int
    seconds: float


def items(attempt: Attempt) -> Items | None:
    """How many items an attempt has decoded, by the copies of its journals; None before the first of them.

    Times are those that the file system gave the files: the clocks of this machine and of the node may differ.
    """
    found = []  # (start, first line, items, time of the newest)
    for path in attempt.decoded_dir.glob("journal.*.jsonl"):
        start = path.name.split(".")[2]
        if start.isdigit() and (counted := _counted(path)):
            found.append((int(start), *counted))
    if not found:
        return None
    newest_work = max(found, key=lambda each: (each[3], each[0]))[
        1
    ]  # rows of other work, such as other prompts, do not count
    same = [each for each in found if each[1] == newest_work]
    last = max(start for start, *_ in same)
    of_start = [each for each in same if each[0] == last]
    began = attempt.phases.stat().st_mtime if attempt.phases.exists() else math.inf
    seconds = max(0.0, max(at for *_, at in of_start) - began)
    return Items(sum(count for _, _, count, _ in same), sum(count for _, _, count, _ in of_start), seconds)


def _counted(path: Path) -> tuple[bytes, int, float] | None:
    """(the line that names the journal's work, rows after it, when it last grew); None for an empty or vanished file."""
    try:
        with open_regular(path) as file:
            about = os.fstat(file.fileno())
            inode, upto, lines = _LINES.get(path, (0, 0, 0))
            if inode != about.st_ino or upto > about.st_size:
                upto, lines = 0, 0
            first = file.readline(BLOCK_BYTES)
            file.seek(upto)
            while block := file.read(MOST_BYTES):
                upto, lines = upto + len(block), lines + block.count(b"\n")
            _LINES[path] = (about.st_ino, upto, lines)
    except FileNotFoundError:
        return None
    return (first, lines - 1, about.st_mtime) if lines else None


def _newest_line(path: Path) -> dict[str, Any] | None:
    """The newest whole line that says it is of training; None without one."""
    with open_regular(path) as file:
        size, length = file.seek(0, os.SEEK_END), BLOCK_BYTES
        while True:
            start = max(0, size - length)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")[:-1]
            for text in reversed(lines[1:] if start else lines):
                if line := _training_line(text):
                    return line
            if not start or length >= MOST_BYTES:
                return None
            length *= 4


def _at_step(path: Path, step: int) -> Step | None:
    with open_regular(path) as file:
        low, high = 0, file.seek(0, os.SEEK_END)
        while high - low > BLOCK_BYTES:
            middle = (low + high) // 2
            found = _first_from(file, middle, high)
            if found is None or found.step > step:
                high = middle
            else:
                low = middle
        best = None
        for each in _steps_from(file, low, high + BLOCK_BYTES):
            if each.step <= step and (best is None or each.step >= best.step):
                best = each
        return best


def _spread(path: Path, num_points: int) -> list[Step]:
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        places = {size * number // num_points for number in range(num_points)}
        return [step for place in sorted(places) if (step := _first_from(file, place, size))]


def _first_from(file: IO[bytes], place: int, end: int) -> Step | None:
    return next(_steps_from(file, place, end), None)


def _steps_from(file: IO[bytes], place: int, end: int) -> Iterator[Step]:
    """The valid training lines that begin at or after `place` and before `end`, within MOST_BYTES."""
    file.seek(max(0, place - 1))  # with the byte before, to know whether a line begins at `place`
    rest, upto, is_first = b"", max(0, place - 1), place > 0
    while upto < min(end, place + MOST_BYTES) and (block := file.read(BLOCK_BYTES)):
        upto += len(block)
        *lines, rest = (rest + block).split(b"\n")
        for text in lines[1:] if is_first and lines else lines:
            if (line := _training_line(text)) and (step := _numbers(line)):
                yield step
        is_first = is_first and not lines


def _training_line(text: bytes) -> dict[str, Any] | None:
    """The JSON object of a line that says it is of training; None for every other line."""
    if b'"train"' not in text:  # most other lines are told by this, without being parsed
        return None
    try:
        value = strict_json.read(text)
    except strict_json.BadJson:
        return None
    return value if isinstance(value, dict) and value.get("phase") == "train" else None


def _numbers(line: Mapping[str, Any]) -> Step | None:
    """The numbers of a training line; None where one is missing, no finite number, or beyond what any training has."""
    try:
        loss, tokens, seconds = (float(line[name]) for name in ("loss", "tokens", "seconds"))
        step, num_steps = int(line["step"]), int(line["num_steps"])
        # What a view works out from these must stay a number: a trial may write any.
        is_usable = math.isfinite(loss) and 0 <= tokens <= LARGEST and 0 <= seconds <= LONGEST
        if not is_usable or not 0 <= step <= LARGEST or not 0 <= num_steps <= LARGEST:
            return None
        return Step(step, num_steps, loss, tokens, seconds)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
