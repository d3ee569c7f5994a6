"""Training curves from what a trial says of itself, one point a step with its wall time. People see them; nobody checked them.

A resumed trial keeps the lines of the steps that it does not make again (substrate/interface/progress.py), so the newest attempt's file has
the whole curve, and the files of the attempts before it are not read: no step appears twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.files import read_bytes, read_json_lines
from pipeline.campaign.layout import Attempt, Round
from pipeline.execution import results
from pipeline.execution.trial import number

SERIES = ("loss", "learning_rate", "grad_norm", "tokens", "seconds")
"""The numbers of a training line. Tokens and seconds are totals over all starts."""


@dataclass(frozen=True)
class Point:
    """One training step. `wall_time` is in seconds since the epoch; `values` has SERIES, and `gpu_seconds` where arms have GPUs."""

    step: int
    wall_time: float
    values: Mapping[str, float]


def of_arm(folder: Round, arm: str, gpus: int) -> list[Point]:
    """The curve of an arm, in order of its steps; empty before the first one. gpus: the number of GPUs of an arm."""
    attempt = _attempt(folder, arm)
    return of_attempt(attempt, gpus) if attempt else []


def span(folder: Round, arm: str) -> tuple[float, float] | None:
    """When an arm began and when it gave its last sign, in seconds since the epoch; None before its first mark."""
    marks = [mark for attempt in folder.attempts(arm) for mark in read_json_lines(attempt.phases)]
    return (float(marks[0]["at"]), float(marks[-1]["at"])) if marks else None


def _attempt(folder: Round, arm: str) -> Attempt | None:
    """The attempt that trained what is published; before that the newest one that has trained."""
    attempts = [attempt for attempt in folder.attempts(arm) if attempt.progress.exists()]
    try:
        published = results.read_attributes(folder.published(arm))["attempt"]
    except IntegrityError:
        published = None
    last = (
        published if published in [attempt.number for attempt in attempts] else attempts[-1].number if attempts else 0
    )
    upto = [attempt for attempt in reversed(attempts) if attempt.number <= last]
    # One that only judged has a copy of the progress, and its clock says nothing of the steps.
    return next((attempt for attempt in upto if has_trained(attempt)), next(iter(upto), None))


def has_trained(attempt: Attempt) -> bool:
    """Whether a training was started in this attempt, and not only an adapter judged that an earlier one sealed."""
    return any(mark["phase"] == "train_start" for mark in read_json_lines(attempt.phases))


def of_attempt(attempt: Attempt, gpus: int) -> list[Point]:
    """The curve that an attempt has: its own steps, and those that it took over.

    The lines of a start come after its `start` line, so the last of these divides this start's steps from the earlier ones'.

    The worker's clock says when this start began its steps. Where earlier starts were, their files would have to be believed too, so
    their steps are placed directly before it: wall times of those leave out the pauses between starts.
    """
    lines = _lines(attempt) if attempt.progress.exists() else []
    starts = [place for place, line in enumerate(lines) if line["phase"] == "start"]
    last = starts[-1] if starts else 0
    marks = read_json_lines(attempt.phases)
    begun = _began(marks, number(lines[last].get("seconds")) if starts else None)
    before, found = 0.0, {}
    for place, line in enumerate(lines):
        if line["phase"] == "start":
            continue
        if place < last:
            before = line["seconds"]
        found[line["step"]] = line
    return [
        Point(
            step,
            begun + line["seconds"] - before,
            {name: float(line[name]) for name in SERIES} | ({"gpu_seconds": gpus * line["seconds"]} if gpus else {}),
        )
        for step, line in sorted(found.items())
    ]


def _began(marks: Sequence[Mapping[str, Any]], start_up: float | None) -> float:
    """When the last start of an attempt began its steps. start_up: the seconds that the trial says it took to get there."""
    for mark in reversed(marks):
        if mark["phase"] == "train":
            return float(mark["at"])
        if mark["phase"] == "train_start":
            return float(mark["at"]) + max(0.0, start_up or 0.0)
    return float(marks[0]["at"]) if marks else 0.0


def _lines(attempt: Attempt) -> list[dict[str, Any]]:
    """The `start` lines and the valid `train` lines, in order. A trial may write anything, so all others are left out."""
    found = []
    for text in read_bytes(attempt.progress).split(b"\n")[:-1]:
        try:
            line = strict_json.read(text)
        except strict_json.BadJson:
            continue
        if isinstance(line, dict) and (line.get("phase") == "start" or _is_step(line)):
            found.append(line)
    return found


def _is_step(line: Mapping[str, Any]) -> bool:
    whole = [line.get("step"), line.get("tokens")]
    return (
        line.get("phase") == "train"
        and all(number(line.get(name)) is not None for name in SERIES)
        and all(type(value) is int and 0 <= value < 2**53 for value in whole)
    )
