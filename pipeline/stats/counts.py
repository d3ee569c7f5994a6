"""Reduce the outcome strings of one item set, one family and one round to the integers that every test uses.

    count(["110T", "0101"], "0100")     arms a0 and a1, then the reference

In a string, 1 is a right answer, 0 a wrong one, and T one that was truncated and counts as wrong. Notation: Y_ij is 1 where arm j is
right on item i, S_i is the sum of Y_ij over the A arms, and Y_i0 is the reference's answer. The items are the sample, so every variance
is taken over items. The arms of a round resemble one another, and this costs the tests nothing (Miller 2411.00640).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import compress
from operator import mul

from pipeline.campaign.errors import IntegrityError


@dataclass(frozen=True, eq=False)
class Counts:
    """The sums that every test needs, for A arms and n items.

    `right` and `with_others` have one entry for each arm; `lifts` has one for each item, S_i - A Y_i0, from -A to A. Two objects are equal
    only if they are the same object, which makes them cheap cache keys: `count` returns the same object for the same strings.
    """

    right: tuple[int, ...]  # sum_i Y_ij of each arm
    with_others: tuple[int, ...]  # sum_i Y_ij S_i of each arm
    squares: int  # sum_i S_i^2
    reference: int  # sum_i Y_i0
    lifts: tuple[int, ...]

    @property
    def num_items(self) -> int:
        return len(self.lifts)

    @property
    def num_arms(self) -> int:
        return len(self.right)

    @property
    def mean_lift(self) -> Fraction:
        """The mean over arms and items of Y_ij - Y_i0, as a difference of accuracies."""
        return Fraction(sum(self.lifts), self.num_arms * self.num_items)

    def arm_lifts(self) -> tuple[Fraction, ...]:
        """The lift of each arm over the reference, as a difference of accuracies."""
        return tuple(Fraction(right - self.reference, self.num_items) for right in self.right)

    @cached_property
    def own_variance(self) -> Fraction:
        """The variance, for one item, of an arm's answer around the mean answer of all arms (within-item mean square)."""
        if self.num_arms < 2:
            return Fraction(1, 4)
        within = sum(self.right) - Fraction(self.squares, self.num_arms)
        return within / (self.num_items * (self.num_arms - 1))

    @cached_property
    def shared_variance(self) -> Fraction:
        """The variance, for one item, of the lift that all arms share. The arms' own variance is subtracted; the result is at least 0."""
        total = covariance(self, self) * self.num_items
        return max(Fraction(0), total - self.own_variance / self.num_arms)

    def arm_contrast(self, arm: int) -> tuple[Fraction, Fraction]:
        """Mean over the items of the arm's answer minus the mean answer of the other arms, and the variance of that mean. Needs two arms."""
        n, arms = self.num_items, self.num_arms
        total = arms * self.right[arm] - sum(self.right)
        squares = arms**2 * self.right[arm] - 2 * arms * self.with_others[arm] + self.squares
        mean = Fraction(total, (arms - 1) * n)
        variance = (Fraction(squares, (arms - 1) ** 2) - n * mean**2) / (n * (n - 1))
        return mean, variance


def count(arms: Sequence[str], reference: str) -> Counts:
    """Count right answers. `arms` has one outcome string for each arm, `reference` is the reference's, all with the items in one order.

    Raises IntegrityError where there is no arm, the strings differ in length, or they have fewer than two items.
    """
    return _count(tuple(arms), reference)


@lru_cache(maxsize=4096)
def _count(arms: tuple[str, ...], reference: str) -> Counts:
    """The cache: every later round and every audit evaluates the earlier rounds again."""
    lengths = sorted({len(reference), *map(len, arms)})
    if len(lengths) != 1 or lengths[0] < 2 or not arms:
        raise IntegrityError(
            f"The outcome strings of {len(arms)} arms and the reference have {lengths} items and cannot be paired",
            "At least one arm is needed, and all strings must have the same length of at least two items",
        )
    marks = [[mark == "1" for mark in arm] for arm in arms]
    base = [mark == "1" for mark in reference]
    totals = [sum(item) for item in zip(*marks, strict=True)]
    return Counts(
        right=tuple(sum(arm) for arm in marks),
        with_others=tuple(sum(compress(totals, arm)) for arm in marks),
        squares=sum(total * total for total in totals),
        reference=sum(base),
        lifts=tuple(total - len(arms) * mark for total, mark in zip(totals, base, strict=True)),
    )


@lru_cache(maxsize=65536)
def covariance(one: Counts, other: Counts) -> Fraction:
    """Covariance of the mean lifts of two rounds on the same items. Of a round with itself, it is the variance of its mean lift.

    Raises IntegrityError where the rounds have different numbers of items.
    """
    n = one.num_items
    if other.num_items != n:
        raise IntegrityError(
            f"Two rounds have {n} and {other.num_items} items, so they were not scored on the same item set"
        )
    products = sum(map(mul, one.lifts, other.lifts))
    centred = products - Fraction(sum(one.lifts) * sum(other.lifts), n)
    return centred / (one.num_arms * other.num_arms * n * (n - 1))
