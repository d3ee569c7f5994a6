"""How long an arm still takes: by its own recent speed, else by what the round's ended arms took, else by the forecast. Never by a guess.

An arm goes through four groups of phases (execution/trial.py): start-up, training, decoding and the rest. What is left of the running
one follows from the arm's own speed where steps or items are counted; of the others it is what they are expected to take, less what
the arm has spent on them. Where a group is known from nowhere, only the running phase's rest is told, as the least that is left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Attempt, Round
from pipeline.execution.trial import GROUPS, group_seconds
from pipeline.reporting import progress_tail
from pipeline.reporting.status import ArmStatus, num_items

OWN, ENDED, FORECAST = "own speed", "ended arms", "forecast"
"""What a time rests on. A sum rests on the last of these that one of its parts rests on."""
SOURCES = (OWN, ENDED, FORECAST)
ALL_ENDED = "every arm has ended"
LATE, LATE_SECONDS = 1.5, 10.0  # a phase that lasts longer than this factor and so much more is not as expected
ENOUGH = 0.1  # of the items: the time of the first ones is mostly that in which the program that decodes starts
WORKS = ("starting", "running", "unknown")
WAITS = ("waiting", "queued", "requeued", "interrupted")
NEEDED = (
    "start-up",
    "training",
    "decoding",
    "rest",
)  # the groups of which each arm has some; an agent's own work cannot be forecast


@dataclass(frozen=True)
class Left:
    """Seconds that are left. by: one of SOURCES. of: "arm" until it ends, or the running phase's group alone, such as "training"."""

    seconds: float
    by: str
    of: str = "arm"


@dataclass(frozen=True)
class Expected:
    """What an arm of the round takes: seconds by group of phases, and of the whole. by: ENDED or FORECAST.

    after_steps: the part of the training that comes after its last step, in which the trial writes its adapter and ends.
    """

    groups: Mapping[str, float]
    by: str
    after_steps: float = 0.0

    @property
    def whole(self) -> float:
        return sum(self.groups[name] for name in NEEDED)


def expected(folder: Round, rows: Sequence[ArmStatus]) -> Expected | None:
    """What an arm of this round takes by those of its arms that have a score, else by the forecast; None where neither is there."""
    ended = [folder.attempts(row.arm) for row in rows if row.state == "completed" and row.round == folder.name]
    spent = [each for attempts in ended if (each := _spent(attempts))]
    if spent:
        groups = {name: mean(each[name] for each in spent) for name in NEEDED}
        newest = [progress_tail.newest(attempts[-1].progress)[0] for attempts in ended if attempts]
        trained = [step.seconds for step in newest if step]
        return Expected(groups, ENDED, max(0.0, groups["training"] - mean(trained)) if trained else 0.0)
    try:
        frozen: dict[str, Any] = read_json(folder.forecast)
        return Expected({name: frozen["arm"][name] / 1000 for name in NEEDED}, FORECAST)
    except (PipelineError, KeyError, TypeError):
        return None


def of_arm(folder: Round, row: ArmStatus, typical: Expected | None) -> Left | None:
    """What is left of an arm that works; None where nothing is known of it, and for an arm that does not work."""
    if row.state not in WORKS:
        return None
    attempts = folder.attempts(row.arm)
    marks = read_json_lines(attempts[-1].phases) if attempts else []
    group = next((name for name, phases in GROUPS.items() if row.phase in phases), "start-up" if not marks else "rest")
    own = _by_own_speed(row, attempts[-1]) if attempts else None
    if own is not None:  # the worker marks when training and decoding began only once they have ended
        group = "training" if is_training(row) else "decoding"
    if row.phase == "agent" or typical is None:
        return Left(own, OWN, group) if own is not None else None
    wanted = _of_role(folder, row, typical.groups)
    spent = group_seconds(marks) if marks else dict.fromkeys(GROUPS, 0.0)
    if marks:
        elapsed = max(0.0, time.time() - marks[-1]["at"])  # the clocks of two machines may differ
        if own is not None and is_training(row):  # the phase began before the first step
            last, _ = progress_tail.newest(attempts[-1].progress)
            spent["start-up"] += max(0.0, elapsed - (last.seconds if last else 0.0))
        else:
            spent[group] += elapsed
    is_judging = row.phase in ("check", "seal", "items", "generate_start", "generate", "score", "publish")
    if own is None and spent[group] > LATE * wanted[group] + LATE_SECONDS:
        return None  # it takes longer than expected, so what was expected tells nothing
    over = ["training"] if is_judging else []
    has_decoded = row.phase in ("generate", "score", "publish")
    over += ["start-up"] if has_decoded or (own is not None and group == "decoding") else []
    over += ["decoding"] if has_decoded else []
    left = {name: 0.0 if name in over else max(0.0, wanted[name] - spent[name]) for name in NEEDED}
    if own is not None:
        left[group] = own + (typical.after_steps if group == "training" else 0.0)
    others = [name for name in NEEDED if name != group and left[name] > 0]
    return Left(sum(left.values()), typical.by if others or own is None else OWN)


def of_round(rows: Sequence[ArmStatus], left: Sequence[Left | None], typical: Expected | None) -> Left | str:
    """Seconds until the last arm ends, or why nobody can tell. An arm that waits here starts when another one ends.

    left: of each of `rows`.
    """
    works = [(row, each) for row, each in zip(rows, left, strict=True) if row.state in WORKS]
    waits = [row for row in rows if row.state in WAITS]
    if not works and not waits:
        return ALL_ENDED
    if unknown := [row.arm for row, each in works if each is None or each.of != "arm"]:
        return f"nothing tells yet how long {unknown[0]} will take"
    if waits and typical is None:
        return f"nothing tells yet how long {waits[0].arm} will take"
    if queued := [row.arm for row in waits if row.job]:
        return f"Slurm has not started {queued[0]}"
    if waits and not works:
        return f"{waits[0].arm} has not begun"
    known = [each for each in left if each is not None]
    free = [each.seconds for each in known]
    heapq.heapify(free)
    last = max(free)
    for _ in waits:
        assert typical is not None
        end = heapq.heappop(free) + typical.whole
        last = max(last, end)
        heapq.heappush(free, end)
    by = [each.by for each in known] + ([typical.by] if waits and typical else [])
    return Left(last, max(by, key=SOURCES.index))


def is_training(row: ArmStatus) -> bool:
    """Whether the arm makes steps now. The worker's mark says so only once they are made; until then its trial's lines do."""
    return row.state in WORKS and row.phase in ("train_start", "train") and row.step is not None


def _by_own_speed(row: ArmStatus, attempt: Attempt) -> float | None:
    """Seconds that are left of the running phase by its own recent speed; None where that is not known."""
    if is_training(row):
        last, _ = progress_tail.newest(attempt.progress)
        speed = last and progress_tail.seconds_per_step(attempt.progress, last)
        left = max(0, last.num_steps - last.step) * speed if last and speed else None
        return left if left is None or left <= progress_tail.LONGEST else None
    if row.phase == "generate_start":
        found = progress_tail.items(attempt)
        if found and found.of_start and found.seconds and found.done >= ENOUGH * (row.num_items or 0):
            return max(0, (row.num_items or 0) - found.done) * found.seconds / found.of_start
    return None


def _of_role(folder: Round, row: ArmStatus, groups: Mapping[str, float]) -> dict[str, float]:
    """What a row's arm takes: the base trains nothing, and those of r0000 are judged on dev alone."""
    found = dict(groups)
    if not folder.number:
        both = num_items(folder.campaign.round("r0001")) if folder.campaign.round("r0001").plan.exists() else 0
        found["decoding"] *= min(1.0, num_items(folder) / both) if both else 1.0
    if row.role == "base":
        found["training"], found["start-up"] = 0.0, found["start-up"] / 2
    return found


def _spent(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Seconds by group of phases over all attempts of an arm; {} where it has no marks."""
    marks = [read_json_lines(attempt.phases) for attempt in attempts]
    each = [group_seconds(of) for of in marks if of]
    return {name: sum(group[name] for group in each) for name in NEEDED} if each else {}
