"""What a decision rests on: each arm's lifts, the noise of retraining, and what the tests say about all rounds so far.

`of_one_round` makes the lifts and the noise from the outcomes of one round; `derive.evidence_of` adds the assessment of all rounds and the
family states. Values stay typed until they become JSON: a ratio is a Fraction, any other number a Decimal of twelve significant digits.
`to_json` writes a Decimal as text such as "4.50000000000E-2"; evidence.json and the sealed log hold that text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pipeline.campaign.records import SETS, Arm, FamilyState, Lift, Outcome
from pipeline.claims.assess_claims import Claims
from pipeline.stats.decimal_math import digits
from pipeline.stats.lifts import paired_lift, seed_variance
from pipeline.stats.power import PowerCard


@dataclass(frozen=True)
class NamedTest:
    """A gap test with the names of its round and arm: `overfit_test.GapTest` has positions instead.

    `since` is the round in which the gap is supposed to begin. `arm` is None for all arms together. `gap` is a difference of accuracies.
    """

    family: str
    since: str
    arm: str | None
    gap: Fraction
    variance: Fraction

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, with ratios as text such as "1/30"."""
        return {**asdict(self), "gap": str(self.gap), "variance": str(self.variance)}


@dataclass(frozen=True)
class NamedVerdict:
    """`stats.alarms.Verdict` with the names of rounds and arms, where each field is explained. `named` is its `named_family`."""

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
    """One of the campaign's best arms.

    `value` is the one of `Assessment`, `variance` is that of its fresh lift over the reference, and `alarms` names the families in which
    its own dev runs ahead of its fresh.
    """

    round: str
    arm: str
    value: Decimal
    variance: Fraction
    alarms: tuple[str, ...]


@dataclass(frozen=True)
class Assessment:
    """What the tests say at one look, over all rounds so far.

    rounds: the rounds that took part, in order.
    canaries: the names of the canaries that fired, by family. Those that compare with repeats of the reference recipe need four;
        `num_repeats` is the number that the campaign has.
    values: what each scored arm of the newest round is worth (`stats.arm_values`), as a difference of accuracies. The choice goes by it.
    old_values: the same values under the old objective, in which every family's dev counts.
    finalists: the campaign's best arms so far, the best first.
    power: the gaps that would have been detected.
    """

    rounds: tuple[str, ...]
    verdict: NamedVerdict
    canaries: Mapping[str, tuple[str, ...]]
    num_repeats: int
    values: Mapping[str, Decimal]
    old_values: Mapping[str, Decimal]
    finalists: tuple[Finalist, ...]
    power: PowerCard

    def to_json(self) -> dict[str, Any]:
        return {**_texts(asdict(self)), "verdict": self.verdict.to_json()}


@dataclass(frozen=True)
class Evidence:
    """Everything that a decision rests on.

    outcomes: the reference's outcome, then one for each arm of the round.
    seed_variance: the variance of a run's true accuracy under other training seeds, estimated from `num_replicates` repeats.
    claims: the improvement that is claimed, and what is shown to be worse, from all runs of the campaign so far.
    board: the known scores by round and arm, as the target printed them.
    look: None where the reference has no score or too few arms have one.
    families, external: the states after this look (`family_states`).
    """

    round: str
    outcomes: tuple[Outcome, ...]
    lifts: tuple[Lift, ...]
    num_replicates: int
    seed_variance: Fraction
    claims: Claims = field(default_factory=Claims)
    board: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    look: Assessment | None = None
    families: Mapping[str, FamilyState] = field(default_factory=dict)
    external: str = "EXTERNAL-CLEAR"

    def lift(self, arm: str, baseline: str, item_set: str) -> Lift | None:
        """An arm's lift over the baseline "reference", "standing" or "control" on "dev" or "fresh"; None where either has no score."""
        wanted = (arm, baseline, item_set)
        return next((lift for lift in self.lifts if (lift.arm, lift.baseline, lift.item_set) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """The content of evidence.json. Its digest is in the sealed log. `canonical.encoded` writes the ratios that are left as text."""
        return {**asdict(replace(self, look=None)), "look": self.look and self.look.to_json()}


def of_one_round(round_name: str, reference: Outcome, outcomes: Sequence[Outcome], plan: Sequence[Arm]) -> Evidence:
    """The evidence of one round alone: the lifts of every scored arm over the reference, the standing recipe and the control.

    The standing recipe and the control count where this round ran them. The reference gets the arm name "reference", because it was a0 of
    r0000 and is not this round's a0. Raises IntegrityError where two arms were scored on different items.
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
    """Copy nested values, with each Decimal as text."""
    if isinstance(value, Decimal):
        return digits(value)
    if isinstance(value, Mapping):
        return {key: _texts(item) for key, item in value.items()}
    return [_texts(item) for item in value] if isinstance(value, list | tuple) else value
