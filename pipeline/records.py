"""The nouns of a campaign: frozen values that stages hand to one another through files, and nothing else.

    Policy --plan--> Plan of Arms --worker--> Outcome (one an arm) --evidence--> Evidence --decide--> Decision --> next Policy

Numbers that a decision rests on are exact: counts are integers, ratios `fractions.Fraction`, axis values decimal strings; no
record holds a float, a time or a host, so that the same inputs give the same bytes anywhere (docs/contract.md, contract 24).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

NUM_ARMS = 8
ROLES = ("anchor", "replicate", "axis", "contrast", "repair", "control", "reference", "base")
"""`reference` and `base` stand in r0000 alone: the a0 recipe trained once, and the image as it is, evaluated without training."""

Setting = tuple[str, str]
"""One override: a dotted configuration key and its value as a string, such as ("recipe.learning_rate", "0.0071")."""


def with_setting(settings: tuple[Setting, ...], setting: Setting) -> tuple[Setting, ...]:
    """Settings in which `setting` replaces what stood under its key, moved to the end."""
    return tuple(other for other in settings if other[0] != setting[0]) + (setting,)


@dataclass(frozen=True)
class Arm:
    """One of the eight: which recipe, under which seed, and why it is in the plan.

    `overrides` apply to the reference recipe, in order. `axis` names the axis that an `axis` arm moves; its moved setting is
    the last override. `replicate_of` names the recipe that this arm repeats: "reference" or "standing".
    """

    index: int
    role: str
    seed: int
    overrides: tuple[Setting, ...] = ()
    axis: str | None = None
    replicate_of: str | None = None

    @property
    def name(self) -> str:
        return f"a{self.index}"


@dataclass(frozen=True)
class Plan:
    """What a round will do, frozen before anything is submitted; jobs get its sha256 as an argument and compare."""

    campaign: str
    round: str
    image_digest: str
    constitution_digest: str
    code_digest: str
    config_digest: str
    arms: tuple[Arm, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises ValueError, KeyError or TypeError for what is not a plan of this schema."""
        fields = dict(data)
        if fields.pop("schema", None) != 1:
            raise ValueError(f"schema {data.get('schema')!r} is not 1")
        arms = tuple(
            Arm(**{**arm, "overrides": tuple((key, value) for key, value in arm["overrides"])})
            for arm in fields.pop("arms")
        )
        return cls(arms=arms, **fields)


@dataclass(frozen=True)
class Axis:
    """One thing a campaign may vary. `kind` is log, linear, int or choice; low and high are decimal strings."""

    name: str
    key: str
    kind: str
    low: str = ""
    high: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What passes from round to round, and the only thing that does: settings, never weights."""

    standing: tuple[Setting, ...]
    axes: tuple[Axis, ...]
    dead_ends: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one arm came to, as the decision sees it.

    `outcomes[set][family]` is a string with one character an item in item-id order: 1 right, 0 wrong, T truncated (and so wrong).
    A failed arm has no sets at all: a crash has no score. `status` is completed, failed or absent.
    """

    arm: str
    role: str
    status: str
    exit_class: str
    result_digest: str = ""
    adapter_digest: str = ""
    outcomes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def scored(self, item_set: str) -> bool:
        return self.status == "completed" and bool(self.outcomes.get(item_set))

    def correct(self, item_set: str) -> list[int]:
        """1 or 0 an item, families in name order; the order in which two arms of one set are paired."""
        families = self.outcomes[item_set]
        return [int(mark == "1") for family in sorted(families) for mark in families[family]]


@dataclass(frozen=True)
class Lift:
    """Score of an arm minus that of its baseline on the same items, with the variance of that difference (both exact).

    `baseline` is "reference", or "standing" for a lift over this round's run of the standing recipe.
    `variance` is that of the item mean: sum of squared deviations of the paired differences / (n (n-1)).
    """

    arm: str
    baseline: str
    item_set: str
    num_items: int
    mean: Fraction
    variance: Fraction


@dataclass(frozen=True)
class Evidence:
    """All that a decision rests on: lifts on every set, and the noise of retraining one recipe under other seeds."""

    round: str
    outcomes: tuple[Outcome, ...]
    lifts: tuple[Lift, ...]
    num_replicates: int
    seed_variance: Fraction

    def lift(self, arm: str, baseline: str, item_set: str) -> Lift | None:
        wanted = (arm, baseline, item_set)
        return next((lift for lift in self.lifts if (lift.arm, lift.baseline, lift.item_set) == wanted), None)


@dataclass(frozen=True)
class Decision:
    """What the round changed. `kept` is the promoted arm or None; `reasons` name the article of every step."""

    round: str
    state: str
    kept: str | None
    standing: tuple[Setting, ...]
    dead_ends: tuple[Setting, ...]
    reasons: tuple[str, ...]
