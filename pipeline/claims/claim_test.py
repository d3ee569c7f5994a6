"""May an improvement be claimed of what the search stood on? A test of the standing runs against the runs of the reference recipe.

    S   the k runs of the standing recipe in rounds 2 .. r
    B   the m runs of the reference recipe in rounds 1 .. r: a0 and its repeats, not the reference adapter, which cancels
    D   mean lift of S - mean lift of B

    A   the variance of one run, with f degrees of freedom: from the axis arms of the rounds that have a standing run (without the
        arms that replace a standing setting) and from the standing runs of a round with several, each around their round's mean
    b2  the variance of one run, from B, with m - 1 degrees of freedom
    v_q one run's item variance in round q; A and b2 are at least its mean over the rounds

    V = A / k + b2 / m + sum over rounds q of (k_q / k - m_q / m)^2 v_q

The last term is the luck of a round's fresh items, which does not cancel where S and B do not share their rounds equally. The degrees of
freedom are Welch's, rounded down, from 1 to 30. An improvement is claimed where D > 0 and D^2 > t^2 V, with t the upper point of
Student's t at this round's level. The levels of rounds 2 .. R grow with the round and sum to the campaign's level, which is above 5 %
because the looks are correlated; simulations show that at most 5 % of campaigns make a false claim (docs/evidence.md). What
is claimed: the recipes that the search stood on in rounds 2 .. r are, averaged over their runs, better than the reference recipe. It says
nothing about one setting alone. All numbers are exact rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.claims.runs import AXIS, REFERENCE, STANDING, Run, item_variances, mean_lift, mean_of, of_kind, squares
from pipeline.claims.student import student_quantile
from pipeline.stats.decimal_math import decimal_of, exactly

MOST_DEGREES = 30


@dataclass(frozen=True)
class Comparison:
    """The standing runs against the reference recipe's, as differences of accuracies.

    `rounds` has the rounds of the standing runs. `quantile` is the point of Student's t, a multiple of 0.0001. `not_evaluated` is a clause
    that says why there is no comparison; the numbers are then 0.
    """

    difference: Fraction = Fraction(0)
    variance: Fraction = Fraction(0)
    degrees: int = 0
    quantile: Fraction = Fraction(0)
    num_standing: int = 0
    num_reference: int = 0
    rounds: tuple[int, ...] = ()
    not_evaluated: str = ""

    @property
    def is_shown(self) -> bool:
        """Whether the difference is above 0 by more than noise reaches."""
        return self.difference > 0 and self.difference**2 > self.quantile**2 * self.variance

    @property
    def reach(self) -> Fraction:
        """The difference that noise reaches, rounded to 34 digits. It serves only to be shown."""
        with exactly():
            return Fraction(decimal_of(self.quantile) * decimal_of(self.variance).sqrt())


def level_of_round(level: Fraction, round_number: int, num_rounds: int) -> Fraction:
    """The part of a campaign's level that one round spends. The parts of rounds 2 .. `num_rounds` grow linearly and sum to the level."""
    return level * 2 * (round_number - 1) / (num_rounds * (num_rounds - 1))


def compare(standing: Sequence[Run], runs: Sequence[Run], level: Fraction, sign: int = 1) -> Comparison:
    """Compare the `standing` runs S with the reference recipe's runs among `runs`, which has all runs of the campaign so far.

    `sign` is 1 to ask whether the standing recipe is better, -1 to ask whether it is worse.
    """
    reference, every_standing = of_kind(runs, REFERENCE), of_kind(runs, STANDING)
    rounds = {run.round for run in every_standing}
    groups = [run for run in of_kind(runs, AXIS, rounds) if not run.overwrites], every_standing
    of_arms, arm_degrees = (sum(parts) for parts in zip(*map(squares, groups), strict=True))
    k, m = len(standing), len(reference)
    if why := _missing(k, m, arm_degrees):
        return Comparison(num_standing=k, num_reference=m, not_evaluated=why)
    items = item_variances([*standing, *reference])
    floor = mean_of(items)
    centre = mean_lift(reference)
    of_reference = sum(((run.lift - centre) ** 2 for run in reference), Fraction(0)) / (m - 1)
    one_arm, one_reference = max(of_arms / arm_degrees, floor) / k, max(of_reference, floor) / m
    unshared = sum(
        ((_share(standing, number) - _share(reference, number)) ** 2 * variance for number, variance in items.items()),
        Fraction(0),
    )
    variance = one_arm + one_reference + unshared
    if not variance:  # every run answers every item alike, so that nothing tells how far chance reaches
        return Comparison(num_standing=k, num_reference=m, not_evaluated="no run differs from another in any answer")
    welch = variance**2 / (one_arm**2 / arm_degrees + one_reference**2 / (m - 1))
    degrees = min(MOST_DEGREES, max(1, welch.numerator // welch.denominator))
    quantile = Fraction(student_quantile(level, degrees))
    at = tuple(sorted({run.round for run in standing}))
    return Comparison(sign * (mean_lift(standing) - centre), variance, degrees, quantile, k, m, at)


def _missing(k: int, m: int, degrees: int) -> str:
    """Why S and B cannot be compared; an empty string where they can."""
    if not k:
        return "the standing recipe has no scored run"
    if m < 2:
        return f"the reference recipe has {m} scored run{'' if m == 1 else 's'} beside the reference adapter, and two are needed"
    return "" if degrees else "fewer than two axis arms have a score in the rounds with a standing run"


def _share(runs: Sequence[Run], number: int) -> Fraction:
    return Fraction(sum(run.round == number for run in runs), len(runs))
