"""What a decision rests on: an arm's lifts, the noise of retraining, and what the tests say of all rounds so far.

    outcomes of a round -> of_one_round -> Evidence (lifts and noise) -> derive.evidence_of adds the assessment of all rounds, and the family states

Values stay typed until they become JSON: a ratio is a Fraction, any other number a Decimal of twelve significant digits. `to_json` writes
a Decimal as text such as "4.50000000000E-2"; evidence.json and the sealed log hold that text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pipeline.campaign.records import SETS, Arm, FamilyState, Lift, Outcome
from pipeline.stats.decimal_math import digits
from pipeline.stats.lifts import paired_lift, seed_variance
from pipeline.stats.power import PowerCard


@dataclass(frozen=True)
class NamedTest:
    """A gap test whose rounds and arms have names. `since`: the round from which the gap is supposed; `arm` is None for all arms together."""

    family: str
    since: str
    arm: str | None
    gap: Fraction
    variance: Fraction

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gap": str(self.gap), "variance": str(self.variance)}


@dataclass(frozen=True)
class NamedVerdict:
    """`stats.alarms.Verdict` at one round, with rounds and arms by name; see there for the meaning of each field."""

    gap_alarms: tuple[NamedTest, ...]
    gap_suspects: tuple[NamedTest, ...]
    arm_alarms: tuple[NamedTest, ...]
    upper_bounds: Mapping[str, Decimal]
    e_value: Decimal
    carried: Mapping[str, Decimal]
    named: str | None
    board_alarm: bool
    board_suspect: bool
    board_near: bool
    leak_scores: tuple[Decimal, ...]
    leak_alarm: bool
    alarm: bool

    def to_json(self) -> dict[str, Any]:
        tests = {
            name: [test.to_json() for test in getattr(self, name)]
            for name in ("gap_alarms", "gap_suspects", "arm_alarms")
        }
        return {**_texts(asdict(self)), **tests}


@dataclass(frozen=True)
class Finalist:
    """One of the campaign's best arms. `value` as in Assessment, `variance` of its fresh lift over the reference, `alarms`: families in
    which its own dev runs ahead of its fresh."""

    round: str
    arm: str
    value: Decimal
    variance: Fraction
    alarms: tuple[str, ...]


@dataclass(frozen=True)
class Assessment:
    """What the tests said at one look at all rounds so far.

    `rounds`: those that were looked at together. `canaries`: of each family, those that fired. `values`: of each of this round's scored
    arms, what the choice goes by. `old_values`: the same by the objective in which every family's dev counts. `finalists`: the
    campaign's best arms so far, the best first. `power`: the gap that would have been seen.
    """

    rounds: tuple[str, ...]
    verdict: NamedVerdict
    canaries: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Decimal]
    old_values: Mapping[str, Decimal]
    finalists: tuple[Finalist, ...]
    power: PowerCard

    def to_json(self) -> dict[str, Any]:
        return {**_texts(asdict(self)), "verdict": self.verdict.to_json()}


@dataclass(frozen=True)
class Evidence:
    """All that a decision rests on.

    `board`: of each round the printed scores that were known, by arm, as the target printed them. `look` is None where the reference or
    too few arms have a score. `families` and `external`: the states after this look (decision.family_states).
    """

    round: str
    outcomes: tuple[Outcome, ...]
    lifts: tuple[Lift, ...]
    num_replicates: int
    seed_variance: Fraction
    board: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    look: Assessment | None = None
    families: Mapping[str, FamilyState] = field(default_factory=dict)
    external: str = "EXTERNAL-CLEAR"

    def lift(self, arm: str, baseline: str, item_set: str) -> Lift | None:
        wanted = (arm, baseline, item_set)
        return next((lift for lift in self.lifts if (lift.arm, lift.baseline, lift.item_set) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """For evidence.json and its digest in the sealed log; `canonical.encoded` writes the ratios that are left."""
        return {**asdict(replace(self, look=None)), "look": self.look and self.look.to_json()}


def of_one_round(round_name: str, reference: Outcome, outcomes: Sequence[Outcome], plan: Sequence[Arm]) -> Evidence:
    """Evidence of one round alone: every scored arm against the reference and, where one ran, the standing recipe and the control.

    The reference gets the arm name "reference": it was a0 of r0000, and is not this round's a0.
    """
    reference = replace(reference, arm="reference")
    repeats_of = {arm.name: arm.replicate_of for arm in plan}
    standing = [("standing", outcome) for outcome in outcomes if repeats_of[outcome.arm] == "standing"]
    control = [("control", outcome) for outcome in outcomes if repeats_of[outcome.arm] == "control"]
    baselines = dict([("reference", reference), *reversed(standing), *control])
    lifts = tuple(
        paired_lift(outcome, baseline, item_set, name)
        for outcome in outcomes
        for name, baseline in baselines.items()
        for item_set in SETS
        if outcome is not baseline and outcome.scored(item_set) and baseline.scored(item_set)
    )
    groups = [
        [reference] + [run for run in outcomes if repeats_of[run.arm] == "reference"],
        [run for _, run in standing],
    ]
    noise, num_replicates = seed_variance([[run for run in runs if run.scored("fresh")] for runs in groups], "fresh")
    return Evidence(round_name, (reference, *outcomes), lifts, num_replicates, noise)


def _texts(value: Any) -> Any:
    """The same nested values with each Decimal as text."""
    if isinstance(value, Decimal):
        return digits(value)
    if isinstance(value, Mapping):
        return {key: _texts(each) for key, each in value.items()}
    return [_texts(each) for each in value] if isinstance(value, list | tuple) else value
