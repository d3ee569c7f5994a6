"""Reduce the outcome strings of one item set, one family and one round to what every test uses: who was right on which item.

    count(["110T", "0101"], "0100")     arms a0 and a1, then the reference

In a string, 1 is a right answer, 0 a wrong one, and T one that was truncated and counts as wrong. Notation: Y_ij is 1 where arm j is
right on item i, S_i is the sum of Y_ij over the A arms, and Y_i0 is the reference's answer. The items are the sample, so every variance
is taken over items. The arms of a round resemble one another, and this costs the tests nothing (Miller 2411.00640).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

from pipeline.campaign.errors import IntegrityError


@dataclass(frozen=True, eq=False)
class Counts:
    """The right answers of A arms and the reference to n items, as whole numbers in which bit i stands for item i.

    Two objects are equal only if they are the same object, which makes them cheap cache keys: `count` returns the same object for the same
    strings.
    """

    num_items: int
    arms: tuple[int, ...]
    marks: int  # the reference's

    @property
    def num_arms(self) -> int:
        return len(self.arms)

    @cached_property
    def right(self) -> tuple[int, ...]:
        """The number of right answers of each arm."""
        return tuple(arm.bit_count() for arm in self.arms)

    @property
    def reference(self) -> int:
        """The number of right answers of the reference."""
        return self.marks.bit_count()

    @property
    def mean_lift(self) -> Fraction:
        """The mean over arms and items of Y_ij - Y_i0, as a difference of accuracies."""
        return Fraction(sum(self.right), self.num_arms * self.num_items) - Fraction(self.reference, self.num_items)

    def arm_lifts(self) -> tuple[Fraction, ...]:
        """The lift of each arm over the reference, as a difference of accuracies."""
        return tuple(Fraction(right - self.reference, self.num_items) for right in self.right)

    @cached_property
    def own_variance(self) -> Fraction:
        """The variance, for one item, of an arm's answer around the mean answer of all arms (within-item mean square)."""
        if self.num_arms < 2:
            return Fraction(1, 4)
        within = sum(self.right) - Fraction(self._squares, self.num_arms)
        return within / (self.num_items * (self.num_arms - 1))

    @cached_property
    def shared_variance(self) -> Fraction:
        """The variance, for one item, of the lift that all arms share. The arms' own variance is subtracted; the result is at least 0."""
        n, arms = self.num_items, self.num_arms
        with_reference = sum((arm & self.marks).bit_count() for arm in self.arms)
        squares = Fraction(self._squares - 2 * arms * with_reference, arms**2) + self.reference
        total = (squares - n * self.mean_lift**2) / (n - 1)
        return max(Fraction(0), total - self.own_variance / arms)

    @cached_property
    def _squares(self) -> int:
        """The sum over items of S_i^2."""
        return sum((one & other).bit_count() for one in self.arms for other in self.arms)


RIGHT = defaultdict(lambda: "0", {ord("1"): "1"})
"""For str.translate: only 1 is a right answer."""


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
    return Counts(len(reference), tuple(_bits(arm) for arm in arms), _bits(reference))


def _bits(marks: str) -> int:
    """The right answers as a whole number. The last item is bit 0, which is no matter: all strings have one order."""
    return int(marks.translate(RIGHT), 2)
