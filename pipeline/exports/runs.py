"""The arms of a campaign as runs, as experiment trackers have them: settings, a training curve, and scores of decided rounds.

A round that is not decided yet has its arms' curves and no score. Besides, what their attempts took, by cause.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Attempt
from pipeline.decision.history import REFERENCE
from pipeline.exports import curves, tables
from pipeline.exports.curves import Point
from pipeline.exports.reading import FIRST, Reading
from pipeline.reporting.status import gpus_of_an_arm

SCORES = ("dev_accuracy", "fresh_accuracy", "board_score", "dev_lift", "fresh_lift", "gpu_seconds")
"""The columns of the table of arms that a run has as scores."""


@dataclass(frozen=True)
class Run:
    """One arm of one round. `settings` has every setting of its recipe as text, `scores` those of SCORES that are known.

    `tags` says what it is: round, arm, role, axis, what moved, status, what the decision said, and the log head.
    `began` and `ended` are in seconds since the epoch; 0 where nobody marked them.
    """

    round: str
    arm: str
    settings: Mapping[str, str]
    scores: Mapping[str, float]
    tags: Mapping[str, str]
    curve: tuple[Point, ...]
    began: float
    ended: float

    @property
    def name(self) -> str:
        return f"{self.round}-{self.arm}"

    @property
    def number(self) -> int:
        """The number of the round, from 0."""
        return int(self.round[1:])

    def id_in(self, campaign: str) -> str:
        """An id of 32 hex digits that is the same in every export of the campaign."""
        return hashlib.sha256(f"{campaign}/{self.round}/{self.arm}".encode()).hexdigest()[:32]


def of_campaign(reading: Reading) -> Iterator[Run]:
    """Every arm of r0000 and of each planned round that is asked for, in order; an arm that never began is left out."""
    _, arms, _ = tables.of_campaign(reading)
    rows = {(row["round"], row["arm"]): row for row in arms.rows()}
    for name in (FIRST, *sorted({*reading.decided, *reading.left_out})):
        folder = reading.round(name)
        recipe = flat({"recipe": reading.config(name)["recipe"]})
        for label, arm in tables.runs(reading, name):
            row = rows.get((name, label), {})
            spans = curves.span(folder, label)
            curve = curves.of_arm(folder, label, gpus_of_an_arm(folder.config)) if label != REFERENCE else []
            scores = {score: float(row[score]) for score in SCORES if row.get(score) is not None}
            if not curve and spans is None and row.get("dev_accuracy") is None and row.get("fresh_accuracy") is None:
                continue
            facts = {
                "campaign": reading.name, "round": name, "arm": label, "role": arm.role, "axis": arm.axis or "", "seed": str(arm.seed),
                "moved": "=".join(part for part in tables.moved(arm) if part), "replicate_of": arm.replicate_of or "",
                "status": row.get("status", "not decided"), "decision": row.get("decision_says") or "", "log_head": str(reading.anchor),
            }  # fmt: skip
            began, ended = spans or (0.0, 0.0)
            settings = {**recipe, **dict(arm.overrides)} if arm.role != "base" else {}
            yield Run(
                name,
                label,
                settings,
                scores,
                facts,
                tuple(curve),
                began,
                max(ended, *(p.wall_time for p in curve), 0.0),
            )


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with values as text; a list is one value."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def causes(reading: Reading) -> dict[tuple[str, str, int], tuple[str, Mapping[str, Any]]]:
    """(round, arm, attempt) -> what that ended attempt was for, and its newest record: a role, `failed: diverged`, or `started again`."""
    roles = {(name, arm.name): arm.role for name, plan in reading.history.plans.items() for arm in plan.arms}
    newest = {
        (record["round"], record["arm"], record["attempt"]): record
        for record in reading.records
        if record["event"] == "attempt"
    }
    last: dict[tuple[str, str], int] = {}
    for name, arm, number in newest:
        last[name, arm] = max(number, last.get((name, arm), 0))
    found = {}
    for (name, arm, number), record in newest.items():
        if record["status"] != "completed":
            cause = f"failed: {record['exit_class']}"
        elif number < last[name, arm]:
            cause = "started again"
        else:
            cause = roles.get((name, arm), REFERENCE)
        found[name, arm, number] = (cause, record)
    return found


def gpu_hours(reading: Reading, upto: str = "r9999") -> dict[str, float]:
    """GPU-hours by what they were spent on: of ended attempts by the log, and of those that were cut short by the marks of their workers.

    upto: the last round that counts.
    """
    known, hours = causes(reading), dict[str, float]()
    for (name, _, _), (cause, record) in known.items():
        if name <= upto:
            hours[cause] = hours.get(cause, 0.0) + record["gpu_seconds"] / 3600
    if cut := _cut_short(reading, known.keys(), upto):
        hours["cut short"] = cut
    return dict(sorted(hours.items()))


def _cut_short(reading: Reading, logged: Collection[tuple[str, str, int]], upto: str) -> float:
    """GPU-hours of attempts that left no result, from their first mark to their last mark or training step."""
    seconds = 0.0
    for name in (name for name in reading.shown if name <= upto):
        folder = reading.round(name)
        gpus = gpus_of_an_arm(folder.config)
        for arm in reading.history.plans[name].arms:
            for attempt in folder.attempts(arm.name):
                marks = read_json_lines(attempt.phases)
                if marks and (name, arm.name, attempt.number) not in logged:
                    curve = curves.of_attempt(attempt, gpus) if curves.has_trained(attempt) else []
                    seconds += gpus * (
                        max([marks[-1]["at"], *(point.wall_time for point in curve[-1:])]) - marks[0]["at"]
                    )
    return seconds / 3600


def clock_hours(reading: Reading, upto: str = "r9999") -> dict[str, float]:
    """Hours of ended attempts by cause from the marks of their workers, which nobody signed: what a site without GPUs knows of its cost.

    upto: the last round that counts. The reference that the meta stage judged left no marks.
    """
    hours: dict[str, float] = {}
    for (name, arm, number), (cause, _) in causes(reading).items():
        attempt = Attempt(reading.round(name).folder / arm / f"attempt_{number:02d}")
        marks = read_json_lines(attempt.phases) if name <= upto and attempt.phases.exists() else []
        if marks:
            hours[cause] = hours.get(cause, 0.0) + (marks[-1]["at"] - marks[0]["at"]) / 3600
    return dict(sorted(hours.items()))
