"""Which axis the search builds on, and what may be claimed of it: two questions, two tests. Exact arithmetic, no I/O.

A claim is article 7's test: fresh lift > z * sqrt(item variance + 2 * seed variance), that is lift > 0 and lift^2 > z^2 * variance, which needs
no square root. The lift is over the recipe that the axis moved from, the baseline: the reference, or this round's run of the standing
recipe once there is one. What the search builds on needs no claim: an axis whose shrunk value (pipeline.selection: dev, fresh and board
pooled, what dev may not tell left out) exceeds its baseline's is more likely better than worse, and the next round tests it again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from decimal import Decimal
from fractions import Fraction

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm, Lift
from pipeline.decision.evidence import Evidence
from pipeline.stats.decimal_math import decimal_of, exactly

ABOVE, WITHIN, BELOW = "above noise", "within noise", "below noise"


def compare(lift: Lift, seed_variance: Fraction, constitution: Constitution) -> str:
    """ABOVE, BELOW or WITHIN noise, by lift^2 against z^2 times its variance."""
    variance = lift.variance + 2 * seed_variance
    if lift.mean**2 <= Fraction(constitution.z) ** 2 * variance:
        return WITHIN
    return ABOVE if lift.mean > 0 else BELOW


def limit_of(lift: Lift, seed_variance: Fraction, constitution: Constitution) -> Fraction:
    """What a lift must exceed to be above noise, for people: z times the root, to 34 digits."""
    with exactly():
        return Fraction(constitution.z * decimal_of(lift.variance + 2 * seed_variance).sqrt())


def baseline_of(arms: Mapping[str, Arm]) -> str:
    """What this round's axes moved from: "standing", or "reference" as long as nothing else stands."""
    return "standing" if any(arm.replicate_of == "standing" for arm in arms.values()) else "reference"


def baseline_value(values: Mapping[str, Decimal], arms: Mapping[str, Arm], baseline: str) -> Fraction:
    """Mean value of this round's runs of the baseline; the reference's own run, from which all values count, is one of the reference's."""
    runs = [Fraction(values[name]) for name, arm in arms.items() if arm.replicate_of == baseline and name in values]
    runs += [Fraction(0)] if baseline == "reference" or not runs else []
    return sum(runs, Fraction(0)) / len(runs)


def gaining(
    values: Mapping[str, Decimal],
    arms: Mapping[str, Arm],
    baseline: str,
    verdicts: Mapping[str, str],
    rules: Constitution,
) -> dict[str, Fraction]:
    """Axis arms worth more than their baseline by article 7's margin, and by how much. values: of a look, by one objective or the other.

    verdicts: of each scored axis arm, as `compare` says; who is below noise gains nothing. An arm without a value (it lacks a dev score)
    gains only what may be claimed.
    """
    base = baseline_value(values, arms, baseline)
    over = {name: Fraction(values[name]) - base for name in verdicts if name in values}
    found = {name: gain for name, gain in over.items() if gain > rules.promotion_margin and verdicts[name] != BELOW}
    return found | {name: Fraction(0) for name, said in verdicts.items() if said == ABOVE and name not in over}


def best(gains: Mapping[str, Fraction], evidence: Evidence, baseline: str, closed: Collection[str] = ()) -> str | None:
    """The arm that gains most, ties by fresh lift and then the lower arm; none of `closed`."""

    def by(arm: str) -> tuple[Fraction, Fraction]:
        lift = evidence.lift(arm, baseline, "fresh")
        return gains[arm], lift.mean if lift else Fraction(0)

    return max((arm for arm in gains if arm not in closed), key=by, default=None)


def alarmed(evidence: Evidence) -> dict[str, str]:
    """Arms whose own dev runs ahead of their fresh, each with its family."""
    return {test.arm or "": test.family for test in evidence.look.verdict.arm_alarms} if evidence.look else {}


def tie_distance(rules: Constitution) -> Fraction:
    """Standard errors, squared, within which two finalists are a tie."""
    return Fraction(Decimal(rules.articles["7"]["tie_standard_errors"])) ** 2
