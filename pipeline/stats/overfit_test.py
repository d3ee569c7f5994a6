"""C1, the audit of dev against fresh: have the arms learned the dev items, rather than what they test? Exact rationals, no float.

Dev and fresh items come from one generator, so the arms' lift over the reference is the same on both unless dev items were learned. The
gap of round r is g_r = mean dev lift - mean fresh lift over all arms (never the winner's alone: that is selected). Dev items stay
for the campaign, so their luck is in every g_r and can be seen in the rounds before any harm: with G the covariance of
(g_1 .. g_r), dev covariances between rounds and fresh variances within, the test of "a gap d from round c on" is

    T_c = 1_c' G^-1 g / sqrt(1_c' G^-1 1_c),   d = 1_c' G^-1 g / 1_c' G^-1 1_c,   1_c = 1 from round c on

(generalised least squares). Alarm where some c has T_c above the normal quantile of level x share and d >= 2 points. A quarter of the level
goes to the mean gap of all families (d >= 1 point: many small exploits), the rest to single families by their headroom (1 -
reference accuracy). With level = alpha / (R (R + 1) / 2) the campaign's false alarms are at most
alpha by Bonferroni; looks and c's are correlated, so that the level of constitution/nulls, which spends the same alpha as simulated, is
higher. statistics.md 3 tests g_r alone. The one item's worth that is added to each variance keeps small sets honest.

The arm test is for one cheat among eight, which a mean over arms dilutes: Y_ij minus the mean of the other arms, dev against fresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from operator import mul

from pipeline.stats.counts import Counts, covariance
from pipeline.stats.decimal_math import upper_quantile

LEAST_GAP = Fraction(1, 50)
LEAST_MEAN_GAP = Fraction(1, 100)
MEAN_SHARE = Fraction(1, 4)
ALL = "all families"


@dataclass(frozen=True)
class FamilyCounts:
    """One family in one round: the same arms on dev and on fresh."""

    dev: Counts
    fresh: Counts


@dataclass(frozen=True)
class GapTest:
    """One test: gap and its variance, both exact; `since` is the round from which it is supposed, `arm` the arm (None: all arms)."""

    family: str
    since: int
    arm: int | None
    gap: Fraction
    variance: Fraction

    @property
    def score(self) -> Fraction:
        """T |T|: the square of the standardised gap, with its sign."""
        return self.gap * abs(self.gap) / self.variance

    def exceeds(self, level: Fraction) -> bool:
        """T above the one-sided normal quantile of `level`, and the gap large enough to matter."""
        if self.gap < (LEAST_MEAN_GAP if self.family == ALL else LEAST_GAP):
            return False
        return self.score > Fraction(upper_quantile(min(level, Fraction(1, 2)))) ** 2


def portion(family: str, of_families: Mapping[str, Fraction]) -> Fraction:
    """Of the gap test's level: of one family, or of the mean over ALL."""
    return MEAN_SHARE if family == ALL else (1 - MEAN_SHARE) * of_families[family]


def shares(reference: Mapping[str, tuple[int, int]]) -> dict[str, Fraction]:
    """Weight of each family, 1 in all: its headroom. reference: family -> (right, items) on dev."""
    headroom = {family: Fraction(n - right + 1, n + 2) for family, (right, n) in reference.items()}
    total = sum(headroom.values(), Fraction(0))
    return {family: value / total for family, value in headroom.items()}


def family_tests(family: str, looks: Sequence[FamilyCounts]) -> list[GapTest]:
    """The tests of the newest look, one for each round from which a gap may be."""
    return [*_family_tests(family, tuple(looks))]


@lru_cache(maxsize=256)
def _family_tests(family: str, looks: tuple[FamilyCounts, ...]) -> tuple[GapTest, ...]:
    """Asked for by the verdict and by the power card."""
    gaps = [look.dev.mean_lift - look.fresh.mean_lift for look in looks]
    return tuple(_least_squares(family, gaps, _covariances(looks)))


def mean_tests(looks: Sequence[Sequence[FamilyCounts]]) -> list[GapTest]:
    """As `family_tests`, of the mean gap over families; none where there is one family. looks: by family, then round."""
    return [*_mean_tests(tuple(tuple(each) for each in looks))] if len(looks) > 1 else []


@lru_cache(maxsize=64)
def _mean_tests(looks: tuple[tuple[FamilyCounts, ...], ...]) -> tuple[GapTest, ...]:
    size = len(looks)
    gaps = [
        sum((each.dev.mean_lift - each.fresh.mean_lift for each in now), Fraction(0)) / size
        for now in zip(*looks, strict=True)
    ]
    parts = [_covariances(each) for each in looks]
    rounds = range(len(gaps))
    covariances = [[sum((part[i][j] for part in parts), Fraction(0)) / size**2 for j in rounds] for i in rounds]
    return tuple(_least_squares(ALL, gaps, covariances))


def _least_squares(family: str, gaps: Sequence[Fraction], covariances: Sequence[Sequence[Fraction]]) -> list[GapTest]:
    """In whole numbers until the last step, as `_inverse`."""
    inverse, unit = _inverse(covariances)
    shared = lcm(*(gap.denominator for gap in gaps))
    whole = [int(gap * shared) for gap in gaps]
    tests = []
    for since in range(len(gaps)):
        weights = [sum(row[since:]) for row in inverse]
        information = sum(weights[since:])
        gap = Fraction(sum(map(mul, weights, whole)), information * shared)
        tests.append(GapTest(family, since, None, gap, 1 / (information * unit)))
    return tests


def arm_tests(family: str, look: FamilyCounts) -> list[GapTest]:
    """Each arm of the newest look against the others of its round; none where it has fewer than three arms."""
    if look.dev.num_arms < 3:
        return []
    tests = []
    for arm in range(look.dev.num_arms):
        (dev, dev_variance), (fresh, fresh_variance) = look.dev.arm_contrast(arm), look.fresh.arm_contrast(arm)
        floor = _one_item(look.dev) + _one_item(look.fresh)
        tests.append(GapTest(family, -1, arm, dev - fresh, dev_variance + fresh_variance + floor))
    return tests


def latest_gap(look: FamilyCounts) -> tuple[Fraction, Fraction]:
    """Gap and variance of one round alone: what an upper bound is made from."""
    gap = look.dev.mean_lift - look.fresh.mean_lift
    return gap, _covariances([look])[0][0]


def _covariances(looks: Sequence[FamilyCounts]) -> list[list[Fraction]]:
    matrix = [[covariance(one.dev, other.dev) for other in looks] for one in looks]
    for number, look in enumerate(looks):
        fresh = covariance(look.fresh, look.fresh)
        matrix[number][number] += fresh + _one_item(look.dev) + _one_item(look.fresh)
    return matrix


def _one_item(counts: Counts) -> Fraction:
    """What one more disagreement would add to the variance of a mean; with it no set of items is without noise."""
    return Fraction(1, counts.num_items**2)


def _inverse(matrix: Sequence[Sequence[Fraction]]) -> tuple[list[list[int]], Fraction]:
    """The inverse as whole numbers, and the unit that they count.

    Gauss-Jordan on whole numbers (Bareiss 1968: each division is exact), without pivoting, which a positive definite matrix does not need.
    With ratios the same elimination takes a greatest common divisor at every step: ten times as long for twenty rounds.
    """
    size, scale = len(matrix), lcm(*(value.denominator for row in matrix for value in row))
    rows = [
        [*(int(value * scale) for value in row), *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)
    ]
    before = 1
    for i in range(size):
        pivot = rows[i][i]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [(pivot * a - factor * b) // before for a, b in zip(rows[j], rows[i], strict=True)]
        before = pivot
    return [row[size:] for row in rows], Fraction(scale, before)
