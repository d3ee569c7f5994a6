"""Which axis the search builds on, and which values it sets aside. Nothing here claims anything; claims have a test of their own (`claims`).

The search builds on an axis if its shrunk value (`stats.arm_values`) exceeds its baseline's, which is the recipe that the axis moved from: the
reference, or this round's run of the standing recipe once there is one. Such an axis is more likely better than worse, and the next round
tests it again. An axis whose fresh lift over the baseline is below -z * sqrt(item variance + 2 * seed variance) is set aside. It is computed
as lift^2 > z^2 * variance, which needs no square root. This is a rule of thumb on one run and has no error rate. The arithmetic is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from fractions import Fraction

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm, Lift
from pipeline.decision.evidence import Evidence
from pipeline.stats.decimal_math import decimal_of, exactly

VALUE, MAX_DEV = "value", "max_dev"
CHOICES = {
    VALUE: "the axis of largest shrunk value is kept, and the arm of largest value goes out",
    MAX_DEV: "the axis of largest dev lift is kept, and the arm of largest dev lift goes out, whatever the tests say; for comparison only",
}
"""What a campaign keeps (article 7). A person chooses at `init` (policy.choice), and the choice is frozen."""
ABOVE, WITHIN, BELOW = "above noise", "within noise", "below noise"


def compare(lift: Lift, seed_variance: Fraction, constitution: Constitution) -> str:
    """Whether a lift is ABOVE, WITHIN or BELOW noise: compare lift^2 with z^2 times its variance, retraining noise included."""
    variance = lift.variance + 2 * seed_variance
    if lift.mean**2 <= Fraction(constitution.z) ** 2 * variance:
        return WITHIN
    return ABOVE if lift.mean > 0 else BELOW


def limit_of(lift: Lift, seed_variance: Fraction, constitution: Constitution) -> Fraction:
    """The lift, as a difference of accuracies, beyond which an arm is above noise. It is rounded to 34 digits and serves only to be shown."""
    with exactly():
        return Fraction(constitution.z * decimal_of(lift.variance + 2 * seed_variance).sqrt())


def baseline_of(arms: Mapping[str, Arm]) -> str:
    """The baseline of this round's axes: "standing", or "reference" while nothing was kept yet."""
    return "standing" if any(arm.replicate_of == "standing" for arm in arms.values()) else "reference"


def baseline_value(values: Mapping[str, Decimal], arms: Mapping[str, Arm], baseline: str) -> Fraction:
    """The mean value of this round's runs of the baseline. Values are measured from the reference's own run, which counts as one with 0."""
    runs = [Fraction(values[name]) for name, arm in arms.items() if arm.replicate_of == baseline and name in values]
    runs += [Fraction(0)] if baseline == "reference" or not runs else []
    return sum(runs, Fraction(0)) / len(runs)


def baseline_in_words(values: Mapping[str, Decimal], arms: Mapping[str, Arm], baseline: str) -> str:
    """What `baseline_value` is the value of, such as "the reference recipe's runs (a0, a7 and the reference adapter)"."""
    runs = [name for name, arm in arms.items() if arm.replicate_of == baseline and name in values]
    if not runs:
        return "the reference adapter"
    runs += ["the reference adapter"] if baseline == "reference" else []
    return f"the {baseline} recipe's {'run' if len(runs) == 1 else 'runs'} ({' and '.join(filter(None, (', '.join(runs[:-1]), runs[-1])))})"


def gaining(
    values: Mapping[str, Decimal],
    arms: Mapping[str, Arm],
    baseline: str,
    verdicts: Mapping[str, str],
    rules: Constitution,
) -> dict[str, Fraction]:
    """The axis arms that are worth more than their baseline by article 7's margin, and by how much (a difference of accuracies).

    `values` has the arms' values by the present or the old objective, `verdicts` each scored axis arm's result of `compare`. An arm below
    noise has no gain. An arm without a value, because it has no dev score, has the gain 0 if it is above noise and none otherwise.
    """
    base = baseline_value(values, arms, baseline)
    over = {name: Fraction(values[name]) - base for name in verdicts if name in values}
    gains = {name: gain for name, gain in over.items() if gain > rules.promotion_margin and verdicts[name] != BELOW}
    return gains | {name: Fraction(0) for name, verdict in verdicts.items() if verdict == ABOVE and name not in over}


def best(
    gains: Mapping[str, Fraction], evidence: Evidence, baseline: str, excluded: Collection[str] = ()
) -> str | None:
    """The arm with the largest gain that is not excluded; None where there is none. Ties go to the larger fresh lift, then to the first arm."""

    def by(arm: str) -> tuple[Fraction, Fraction]:
        lift = evidence.lift(arm, baseline, "fresh")
        return gains[arm], lift.mean if lift else Fraction(0)

    return max((arm for arm in gains if arm not in excluded), key=by, default=None)


def by_dev(evidence: Evidence, names: Iterable[str], baseline: str) -> dict[str, Fraction]:
    """The arms by their dev lift over a baseline, the largest first; arms without one are left out. Ties keep the order of `names`."""
    lifts = {name: evidence.lift(name, baseline, "dev") for name in names}
    means = {name: lift.mean for name, lift in lifts.items() if lift}
    return dict(sorted(means.items(), key=lambda pair: -pair[1]))


def axes_by_dev(evidence: Evidence, arms: Mapping[str, Arm]) -> dict[str, Fraction]:
    """The axis arms by their dev lift over their baseline, the largest first.

    An arm that an agent edited is a run of no setting, so it is never among them (article 16).
    """
    edited = {outcome.arm for outcome in evidence.outcomes if outcome.edited}
    moved = (name for name, arm in arms.items() if arm.role == "axis" and name not in edited)
    return by_dev(evidence, moved, baseline_of(arms))


def ahead_on_dev(evidence: Evidence, arms: Mapping[str, Arm]) -> dict[str, Fraction]:
    """The axis arms that are ahead of their baseline on dev, and by how much, the first to be kept with policy.choice=max_dev."""
    return {name: mean for name, mean in axes_by_dev(evidence, arms).items() if mean > 0}


def alarmed(evidence: Evidence) -> dict[str, str]:
    """The arms whose own dev runs ahead of their fresh, each with a family in which it does."""
    return {test.arm or "": test.family for test in evidence.look.verdict.arm_alarms} if evidence.look else {}


def tie_distance(rules: Constitution) -> Fraction:
    """The square of the number of standard errors within which two finalists are a tie."""
    return Fraction(Decimal(rules.articles["7"]["tie_standard_errors"])) ** 2
