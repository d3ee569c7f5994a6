"""What is shown to be worse: one axis arm against the recipe that it moved from, and the standing recipe against the reference.

An axis arm is one run. It is shown to be worse where

    D + allowance < -t sqrt(A (1 + 1 / k'))

D is its lift minus the mean of the k' runs of its baseline in the same round; A is the variance of one run, from the *other* axis arms of
this and earlier rounds, each round around its own mean, and at least one run's item variance. The level is the campaign's divided by all
axis arms of all rounds. The allowance (article 7) is for runs that collapse for no reason of their setting: no test can tell a bad setting
from a crash by one run, and a campaign whose runs lose more than the allowance by chance needs a second seed. The standing recipe is
compared as `claim_test` does, with the sign reversed and its lowest run left out. All numbers are exact rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.claims.claim_test import Comparison, compare
from pipeline.claims.runs import AXIS, REFERENCE, STANDING, Run, item_variances, mean_lift, mean_of, of_kind, squares
from pipeline.claims.student import student_quantile
from pipeline.stats.decimal_math import decimal_of, exactly


@dataclass(frozen=True)
class ArmComparison:
    """One axis arm against its baseline. `difference` and `reach` are differences of accuracies.

    `is_shown` says that the arm is shown to be worse: the difference is further below 0 than `reach`, the allowance included. `reach` is
    rounded to 34 digits and serves only to be shown.
    """

    difference: Fraction
    reach: Fraction
    is_shown: bool


def worse_arms(
    runs: Sequence[Run], round_number: int, level: Fraction, num_rounds: int, allowance: Fraction
) -> dict[str, ArmComparison]:
    """Compare each scored axis arm of a round with its baseline, where that has a run and two other axis arms give a variance.

    `runs` has all runs of the campaign, without those that an earlier round showed to be worse. Later rounds do not count. `level` is the
    campaign's.
    """
    runs = [run for run in runs if run.round <= round_number]
    axes = of_kind(runs, AXIS)
    here = [run for run in axes if run.round == round_number]
    baseline = of_kind(runs, STANDING, [round_number]) or of_kind(runs, REFERENCE, [round_number])
    if not here or not baseline:
        return {}
    floor = mean_of(item_variances(runs))
    earlier, earlier_degrees = squares([run for run in axes if run.round < round_number])
    found = {}
    for arm in here:
        total, degrees = squares([run for run in here if run is not arm])
        total, degrees = earlier + total, earlier_degrees + degrees
        if not degrees:
            continue
        variance = max(total / degrees, floor) * (1 + Fraction(1, len(baseline)))
        if not variance:
            continue  # no other run differs from another in any answer, so that nothing tells how far chance reaches
        quantile = Fraction(student_quantile(level / (len(here) * num_rounds), degrees))
        difference = arm.lift - mean_lift(baseline)
        beyond = -(difference + allowance)
        with exactly():
            reach = allowance + Fraction(decimal_of(quantile) * decimal_of(variance).sqrt())
        found[arm.arm] = ArmComparison(difference, reach, beyond > 0 and beyond**2 > quantile**2 * variance)
    return found


def worse_standing(standing: Sequence[Run], runs: Sequence[Run], level: Fraction) -> Comparison:
    """Compare the standing runs, without the lowest of them, with the reference recipe's. It takes two standing runs."""
    if len(standing) < 2:
        return Comparison(
            num_standing=len(standing), not_evaluated="the standing recipe has fewer than two scored runs"
        )
    lowest = min(standing, key=lambda run: run.lift)
    return compare([run for run in standing if run is not lowest], runs, level, sign=-1)
