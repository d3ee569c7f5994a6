"""The arms of a campaign as runs, as experiment trackers have them: settings, a training curve, and scores of decided rounds.

A round that is not decided yet has its arms' curves and no score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
