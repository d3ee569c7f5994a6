"""The probit scale, on which difficulty cancels, and how hard the external target is. All numbers are decimals.

Where a set of items is harder, the same effect is another number of points. If a model answers an item right with probability
Phi(skill - difficulty), the probits of two models differ by the difference of their skills on every set, so the tests compare effects

    e_j = probit(accuracy of arm j) - probit(accuracy of the reference on the same items)

and never lifts in points. An accuracy of x right answers among n is taken as (x + 1/2) / (n + 1), which keeps probits finite and almost
unbiased. Variances follow from the items (delta method): one more right answer moves a probit by 1 / (n density). Near a ceiling they
become large, so that a set on which everybody is right shows nothing. An effect becomes points where it is shown or predicted: at the
reference's level on dev for a gap, and on the target for a board score.

The target prints one total, so its families' levels are the reference's levels on fresh items, moved by one offset that reproduces the
reference's printed total (`target_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, lru_cache

from pipeline.stats.counts import Counts
from pipeline.stats.decimal_math import decimal_of, density, exactly, probability, quantile

HEALTHY_SD = Decimal("0.2")  # the standard deviation of a family's slope where nothing is wrong and difficulty is known
with exactly():
    PRINT_VARIANCE = (
        Decimal("0.01") ** 2 / 12 + Decimal("0.004") ** 2
    )  # rounding to 0.01; inference (statistics.md 1.2)
DOUBT = Decimal("0.5")  # the weight of an explanation of the printed total by the difficulty of one family
CLIP = Fraction(1, 10**9)
CLOSE = Decimal("1E-25")
MOST_STEPS = 200
Weighted = tuple[tuple[Decimal, int], ...]
"""A weighted sum of answers to the items of one set: pairs of a weight and the bits of who was right (Counts)."""


@dataclass(frozen=True, eq=False)
class OnProbits:
    """One item set in one round on the probit scale. `on_probits` makes it, once for each Counts."""

    counts: Counts

    @cached_property
    def share(self) -> Fraction:
        """The reference's accuracy, corrected for continuity."""
        return corrected(self.counts.reference, self.counts.num_items)

    @cached_property
    def density(self) -> Decimal:
        """The normal density at the reference's level."""
        return density(quantile(self.share))

    @cached_property
    def information(self) -> Decimal:
        """One over the variance of the reference's level."""
        return information(self.share, self.counts.num_items)

    @cached_property
    def effects(self) -> tuple[Decimal, ...]:
        """Each arm's level minus the reference's."""
        with exactly():
            return tuple(level - quantile(self.share) for level in self._levels)

    @cached_property
    def mean_effect(self) -> Decimal:
        with exactly():
            return sum(self.effects, Decimal(0)) / len(self.effects)

    @cached_property
    def mean_items(self) -> Weighted:
        """The sum of answers that moves as the mean effect does."""
        with exactly():
            arms = [(weight / len(self._weights), arm) for weight, arm in self._weights]
            return (*arms, (-1 / self.density, self.counts.marks))

    @cached_property
    def mean_variance(self) -> Decimal:
        """The variance of the mean effect, increased by the weight of one more disagreement, so that no set seems noiseless."""
        with exactly():
            arms = sum((weight for weight, _ in self._weights), Decimal(0)) / len(self._weights)
            one_item = max(1 / self.density, arms) / self.counts.num_items
            return covariance(self.mean_items, self.mean_items, self.counts.num_items) + one_item**2

    def contrast(self, arm: int) -> tuple[Decimal, Decimal]:
        """An arm's level minus the mean level of the other arms, and the variance of that difference. Needs two arms."""
        others = [number for number in range(self.counts.num_arms) if number != arm]
        with exactly():
            mean = self._levels[arm] - sum((self._levels[k] for k in others), Decimal(0)) / len(others)
            rest = [(-self._weights[k][0] / len(others), self._weights[k][1]) for k in others]
            items = (self._weights[arm], *rest)
            one_item = max(self._weights[arm][0], -sum((weight for weight, _ in rest), Decimal(0)))
            variance = covariance(items, items, self.counts.num_items)
            return mean, variance + (one_item / self.counts.num_items) ** 2

    @cached_property
    def _levels(self) -> tuple[Decimal, ...]:
        return tuple(quantile(corrected(right, self.counts.num_items)) for right in self.counts.right)

    @cached_property
    def _weights(self) -> Weighted:
        """For each arm what one more right answer adds to its level, times the number of items, and its bits."""
        with exactly():
            return tuple((1 / density(level), arm) for level, arm in zip(self._levels, self.counts.arms, strict=True))


@lru_cache(maxsize=4096)
def on_probits(counts: Counts) -> OnProbits:
    """A set on the probit scale. The cache: later rounds and audits need the earlier ones again."""
    return OnProbits(counts)


def corrected(right: int | Fraction, num_items: int) -> Fraction:
    """A share of right answers that is neither 0 nor 1."""
    return Fraction(2 * right + 1) / (2 * (num_items + 1))


def information(share: Fraction, num_items: int) -> Decimal:
    """One over the variance of the probit of an accuracy `share` that was measured on so many items."""
    with exactly():
        return num_items * density(quantile(share)) ** 2 / decimal_of(share * (1 - share))


def covariance(one: Weighted, other: Weighted, num_items: int) -> Decimal:
    """The covariance of the means of two weighted sums over the same items."""
    with exactly():
        products, ours, theirs = Decimal(0), Decimal(0), Decimal(0)
        for weight, bits in one:
            row = Decimal(0)
            for factor, others in other:
                row += factor * (bits & others).bit_count()
            products += weight * row
            ours += weight * bits.bit_count()
        for factor, others in other:
            theirs += factor * others.bit_count()
        return (products - ours * theirs / num_items) / (num_items * (num_items - 1))


@dataclass(frozen=True, eq=False)
class Target:
    """How hard the target is for the reference. Equal only to itself, as Counts are, so that it is a cheap cache key.

    `levels` has the probit of the reference's accuracy by family. `variance` is that of what all levels have in common. `slopes` has, by
    family, the variance of the slope with which effects arrive where nothing is wrong.
    """

    levels: tuple[Decimal, ...]
    variance: Decimal
    slopes: tuple[Decimal, ...]

    @cached_property
    def shares(self) -> tuple[Decimal, ...]:
        """The reference's accuracy by family."""
        return tuple(map(probability, self.levels))

    @cached_property
    def densities(self) -> tuple[Decimal, ...]:
        """The normal density at each level."""
        return tuple(map(density, self.levels))

    def lift(self, family: int, effect: Decimal) -> Decimal:
        """What an effect in probits is worth on the target, as a difference of accuracies."""
        with exactly():
            return probability(self.levels[family] + effect) - self.shares[family]


def fresh_target(fresh: Sequence[Sequence[Counts]]) -> Target:
    """The target of a campaign without a printed score: fresh items. `fresh` has the rounds of each family."""
    return _fresh_target(tuple(map(tuple, fresh)))


@lru_cache(maxsize=64)
def _fresh_target(fresh: tuple[tuple[Counts, ...], ...]) -> Target:
    shares = [corrected(sum(one.reference for one in of), sum(one.num_items for one in of)) for of in fresh]
    return Target(tuple(map(quantile, shares)), Decimal(0), (HEALTHY_SD**2,) * len(shares))


def target_of(fresh: Sequence[Sequence[Counts]], printed: Decimal | None, rows: int) -> Target:
    """The target whose scorer printed `printed` for the reference, over `rows` items; fresh items where it printed nothing."""
    return _target_of(tuple(map(tuple, fresh)), printed, rows)


@lru_cache(maxsize=64)
def _target_of(fresh: tuple[tuple[Counts, ...], ...], printed: Decimal | None, rows: int) -> Target:
    """The cache: every test of a look needs the same target, and what is computed for it has it as its key."""
    if printed is None:
        return _fresh_target(fresh)
    levels = _fresh_target(fresh).levels
    with exactly():
        known = [sum((on_probits(counts).information for counts in of), Decimal(0)) for of in fresh]
    return moved(levels, known, printed, rows)


def moved(fresh: Sequence[Decimal], known: Sequence[Decimal], printed: Decimal, rows: int) -> Target:
    """Move the reference's levels on fresh items by one offset, so that their mean accuracy is the printed total.

    `known` is the information of each level. Two rival explanations of the total widen the slope of a family: that it alone is easier or
    harder, which weighs less the larger the difference would be, and that it alone is as hard as fresh items. Each adds DOUBT times the
    square of the relative error that it would mean for the family's predicted lifts.
    """
    with exactly():
        size = len(fresh)
        total = decimal_of(corrected(Fraction(printed) * rows, rows))
        offset = Decimal(0)
        for _ in range(MOST_STEPS):
            miss = total - _mean([probability(level + offset) for level in fresh])
            step = miss / _mean([density(level + offset) for level in fresh])
            step = max(-Decimal(1), min(Decimal(1), step))
            offset += step
            if abs(step) < CLOSE:
                break
        levels = [level + offset for level in fresh]
        unexplained = (total - _mean([probability(level) for level in fresh])) * size
        slopes, sampling = [], []
        for before, level, precision in zip(fresh, levels, known, strict=True):
            here = density(level)
            alone = quantile(max(CLIP, min(1 - CLIP, Fraction(probability(before) + unexplained))))
            likely = (-((alone - before) ** 2) / 2).exp()
            rivals = (density(before) / here - 1) ** 2 + likely * (density(alone) / here - 1) ** 2
            slopes.append(HEALTHY_SD**2 + DOUBT * rivals)
            sampling.append(probability(level) * probability(-level) * size / rows + here**2 / precision)
        common = PRINT_VARIANCE / 2 + sum(sampling, Decimal(0)) / size**2
        return Target(tuple(levels), common / _mean([density(level) for level in levels]) ** 2, tuple(slopes))


def _mean(values: Sequence[Decimal]) -> Decimal:
    return sum(values, Decimal(0)) / len(values)
