"""Paired lifts over a baseline, and the noise of retraining. All values are exact rationals; nothing reads or writes a file.

For arm j and item i of a set, D_ij = Y_ij - Y_i,base, where Y is 0 or 1. The lift is the mean of D_ij over the n items. The items are the
sample, so its variance is sum_i (D_ij - mean)^2 / (n (n-1)) (Miller 2411.00640, paired differences). How much another training seed
changes a score is estimated from runs of one recipe, such as the reference, a0 and its replicates. Their differences also contain the
noise of the items, which is subtracted; the result is at least 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Lift, Outcome
from pipeline.stats.decimal_math import decimal_of, exactly


def paired_lift(
    arm: Outcome, baseline: Outcome, item_set: str, name: str = "reference", families: Sequence[str] | None = None
) -> Lift:
    """The lift of an arm over the baseline called `name`, on the item set "dev" or "fresh"; on some `families` only, where they are given.

    Raises IntegrityError where the two were not scored on the same numbers of items by family.
    """
    (ours, n), (theirs, _) = arm.right(item_set, families), baseline.right(item_set, families)
    sizes = [{family: len(marks) for family, marks in run.outcomes[item_set].items()} for run in (arm, baseline)]
    if sizes[0] != sizes[1]:
        raise IntegrityError(
            f"{arm.arm} and the {name} were scored on different items of {item_set}: {sizes[0]}, {sizes[1]}"
        )
    both = (ours & theirs).bit_count()
    return Lift(arm.arm, name, item_set, n, *_of_pairs(ours.bit_count() - both, theirs.bit_count() - both, n))


@lru_cache(maxsize=4096)
def _of_pairs(won: int, lost: int, n: int) -> tuple[Fraction, Fraction]:
    """The mean and variance of n differences, of which `won` are 1 and `lost` are -1. The cache: every later round asks again."""
    mean = Fraction(won - lost, n)
    squares = won + lost - n * mean**2
    return mean, squares / (n * (n - 1)) if n > 1 else Fraction(1)


def seed_variance(groups: Sequence[Sequence[Outcome]], item_set: str) -> tuple[Fraction, int]:
    """The variance s^2 of a training run's true accuracy under other seeds, and the number of repeats that it was estimated from.

    Each group has runs of one recipe. The difference of a run to the first of its group has the expected square 2 s^2 + item variance.
    Without repeats the result is (0, 0).
    """
    lifts = [paired_lift(run, first, item_set) for first, *others in filter(None, groups) for run in others]
    if not lifts:
        return Fraction(0), 0
    mean_square = sum((lift.mean**2 - lift.variance for lift in lifts), Fraction(0)) / len(lifts)
    return max(Fraction(0), mean_square / 2), len(lifts)


def accuracy(outcome: Outcome, item_set: str) -> Fraction | None:
    """The share of right answers, from 0 to 1; None where the arm has no score on this set."""
    if not outcome.scored(item_set):
        return None
    right, num_items = outcome.right(item_set)
    return Fraction(right.bit_count(), num_items)


def interval(mean: Fraction, variance: Fraction) -> tuple[Fraction, Fraction]:
    """The ends of a lift's 95 % interval (1.96 standard errors). It serves only to be shown; decisions use the exact ratio."""
    with exactly():
        half = Fraction(Decimal("1.96") * decimal_of(variance).sqrt())
    return mean - half, mean + half


def show(value: Fraction) -> str:
    """Write a difference of accuracies with its sign, such as `+8.67 points`."""
    return f"{signed(value)} points"


def amount(value: Fraction) -> str:
    """Write the size of a difference of accuracies, such as `8.67 points`; one that would print as 0 is `less than 0.01 points`."""
    if value and not round(value * 10000):
        return "less than 0.01 points"
    return f"{signed(abs(value))[1:]} points"


def signed(value: Fraction) -> str:
    """Write a difference of accuracies in points, with its sign and two decimals (rounded half to even), such as `+8.67`."""
    hundredths = round(value * 10000)
    return f"{'-' if hundredths < 0 else '+'}{abs(hundredths) // 100}.{abs(hundredths) % 100:02d}"
