"""What a round is doing, from its files alone: no scheduler is asked, nothing is imported that takes time.

    arm  role     state      phase     step     loss   seconds
    a0   anchor   completed  published 300/300  0.21   48

Phases are the marks that a worker writes (`phases.jsonl`); training progress is the trial's own, shown but never believed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.layout import Attempt, Campaign, Round, read_json_lines
from pipeline.trial import progress_lines

GROUPS = {
    "start-up": ("claim", "mount", "probe", "train_start", "generate_start"),
    "training": ("train",),
    "decoding": ("generate",),
    "rest": ("check", "seal", "items", "score", "publish"),
}


@dataclass(frozen=True)
class ArmStatus:
    """One line of the table. `state` is waiting, running, interrupted, completed or failed; `detail` says why it failed."""

    round: str
    arm: str
    role: str
    state: str
    phase: str
    step: str
    loss: str
    seconds: float
    attempt: int | None
    detail: str


def round_status(campaign: Campaign, folder: Round) -> list[ArmStatus]:
    """Every arm of one round."""
    return [_arm_status(folder, arm.name, arm.role) for arm in folder.frozen_plan().arms]


def _arm_status(folder: Round, arm: str, role: str) -> ArmStatus:
    attempts = folder.attempts(arm)
    if not attempts:
        return ArmStatus(folder.name, arm, role, "waiting", "", "", "", 0.0, None, "")
    attempt = attempts[-1]
    marks = read_json_lines(attempt.phases)
    last: dict[str, Any] = marks[-1] if marks else {"phase": "claim", "at": time.time()}
    state, detail = "running", ""
    if last["phase"] in ("completed", "failed"):
        state, detail = last["phase"], last.get("detail", "")
    elif attempt.interrupted.exists():
        state = "interrupted"
    end = last["at"] if state != "running" else time.time()
    step, loss = _progress(attempt)
    began = marks[0]["at"] if marks else end
    return ArmStatus(
        folder.name, arm, role, state, last["phase"], step, loss, round(end - began, 1), attempt.number, detail
    )


def _progress(attempt: Attempt) -> tuple[str, str]:
    """("step/of", "loss") of the newest training line; empty before the first, "?" for what makes no sense."""
    lines = progress_lines(attempt, "train")
    try:
        return (
            (f"{int(lines[-1]['step'])}/{int(lines[-1]['num_steps'])}", f"{float(lines[-1]['loss']):.3f}")
            if lines
            else ("", "")
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return "?", "?"


def breakdown(rounds: Iterable[Round]) -> dict[str, float]:
    """Seconds of all newest attempts by group of phases: where the time of a round went."""
    totals = dict.fromkeys(GROUPS, 0.0)
    for folder in rounds:
        for arm in folder.frozen_plan().arms:
            for attempt in folder.attempts(arm.name)[-1:]:
                marks = read_json_lines(attempt.phases)
                for mark, following in zip(marks, marks[1:], strict=False):
                    group = next((name for name, phases in GROUPS.items() if mark["phase"] in phases), "rest")
                    totals[group] += following["at"] - mark["at"]
    return totals


def table(rows: Iterable[ArmStatus]) -> Any:
    """A rich table of arms, for `status` and the live view."""
    from rich.table import Table

    colours = {"completed": "green", "failed": "red", "running": "cyan", "interrupted": "yellow", "waiting": "dim"}
    view = Table(box=None, pad_edge=False)
    for column in ("round", "arm", "role", "state", "phase", "step", "loss", "seconds", "detail"):
        view.add_column(column, justify="right" if column in ("step", "loss", "seconds") else "left")
    for row in rows:
        state = f"[{colours[row.state]}]{row.state}[/]"
        view.add_row(
            row.round, row.arm, row.role, state, row.phase, row.step, row.loss, f"{row.seconds:.0f}", row.detail
        )
    return view


def as_json(rows: Iterable[ArmStatus]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
