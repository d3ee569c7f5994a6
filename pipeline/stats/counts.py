"""Outcome strings -> the integers that every test rests on: one item set, one family, one round.

    count(["110T", "0101"], "0100")     arms a0 and a1, then the reference; 1 right, 0 wrong, T truncated and so wrong

Y_ij is 1 where arm j is right on item i, S_i = sum_j Y_ij over the A arms, Y_i0 the reference. Items are the sampling unit: all
variances are over items, so that it costs nothing that the arms of a round resemble one another (Miller 2411.00640).
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
    """Sufficient integers. `lifts[i]` is S_i - A Y_i0, from -A to A. Known by identity: `count` gives the same strings the same object."""

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
        """Of an arm over the reference, all arms taken together."""
        return Fraction(sum(self.lifts), self.num_arms * self.num_items)

    def arm_lifts(self) -> tuple[Fraction, ...]:
        return tuple(Fraction(right - self.reference, self.num_items) for right in self.right)

    @cached_property
    def own_variance(self) -> Fraction:
        """Per item, of one arm's answer around the mean of the arms (within-item mean square)."""
        if self.num_arms < 2:
            return Fraction(1, 4)
        within = sum(self.right) - Fraction(self.squares, self.num_arms)
        return within / (self.num_items * (self.num_arms - 1))

    @cached_property
    def shared_variance(self) -> Fraction:
        """Per item, of the lift that all arms have in common; the arms' own part is taken out (floor 0)."""
        total = covariance(self, self) * self.num_items
        return max(Fraction(0), total - self.own_variance / self.num_arms)

    def arm_contrast(self, arm: int) -> tuple[Fraction, Fraction]:
        """Mean and variance of the mean of Y_ij minus the mean answer of the other arms. Needs two arms."""
        n, arms = self.num_items, self.num_arms
        total = arms * self.right[arm] - sum(self.right)
        squares = arms**2 * self.right[arm] - 2 * arms * self.with_others[arm] + self.squares
        mean = Fraction(total, (arms - 1) * n)
        variance = (Fraction(squares, (arms - 1) ** 2) - n * mean**2) / (n * (n - 1))
        return mean, variance


def count(arms: Sequence[str], reference: str) -> Counts:
    """Raises IntegrityError when the strings are not equally long, or shorter than two items."""
    return _count(tuple(arms), reference)


@lru_cache(maxsize=4096)
def _count(arms: tuple[str, ...], reference: str) -> Counts:
    """A campaign's rounds are looked at again in every later round, and in an audit in all of them: each is counted once."""
    lengths = sorted({len(reference), *map(len, arms)})
    if len(lengths) != 1 or lengths[0] < 2 or not arms:
        raise IntegrityError(f"{len(arms)} arms and a reference with {lengths} items cannot be paired")
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
    """Of the mean lifts of two rounds on the same items (of a round with itself: the variance of its mean lift)."""
    n = one.num_items
    if other.num_items != n:
        raise IntegrityError(f"rounds with {n} and {other.num_items} items were not scored on the same set")
    products = sum(map(mul, one.lifts, other.lifts))
    centred = products - Fraction(sum(one.lifts) * sum(other.lifts), n)
    return centred / (one.num_arms * other.num_arms * n * (n - 1))
