"""The gap test (C1): have the arms learned the dev items instead of the skill that the items test? All values are exact rationals.

Dev and fresh items come from one generator, so the arms' lift over the reference is the same on both unless dev items were learned. The
gap of round r is g_r = mean dev lift - mean fresh lift over all arms. (The winner's own gap would be biased, because the winner was
selected.) Dev items stay for the whole campaign, so their sampling error is the same in every g_r, and the rounds before any harm show
it. Let G be the covariance of (g_1 .. g_r): dev gives covariances between rounds, fresh gives variances within a round. By generalised
least squares, the test of "a gap d from round c on" is

    T_c = 1_c' G^-1 g / sqrt(1_c' G^-1 1_c),   d = 1_c' G^-1 g / 1_c' G^-1 1_c,   1_c = 1 from round c on

There is an alarm where, for some c, T_c exceeds the normal quantile of level x share and d is at least 2 points. A quarter of the level
goes to the mean gap over all families (d of at least 1 point), which finds many small exploits. The families divide the rest
by their headroom (1 - reference accuracy). With level = alpha / (R (R + 1) / 2), Bonferroni bounds the false alarms of a campaign by
alpha. The looks and the c's are correlated, so constitution/nulls, which spends the same alpha in simulation, allows a higher
level. (statistics.md 3 tests g_r alone.) Each variance is increased by the weight of one item, so that a small set never seems noiseless.

The arm test finds one arm of eight that cheats, which a mean over arms would dilute. It compares Y_ij minus the mean of the other arms
on dev with the same on fresh.
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
    """One family in one round: the counts of the same arms on dev and on fresh."""

    dev: Counts
    fresh: Counts


@dataclass(frozen=True)
class GapTest:
    """One test of a gap: the gap is a difference of accuracies, and `variance` is its variance.

    `since` is the position of the round in which the gap is supposed to begin (-1 in a test of one arm). `arm` is the position of the arm;
    None means all arms.
    """

    family: str
    since: int
    arm: int | None
    gap: Fraction
    variance: Fraction

    @property
    def score(self) -> Fraction:
        """The square of the standardised gap T, with the sign of T."""
        return self.gap * abs(self.gap) / self.variance

    def exceeds(self, level: Fraction) -> bool:
        """Whether T exceeds the one-sided normal quantile of `level` and the gap is large enough to matter."""
        if self.gap < (LEAST_MEAN_GAP if self.family == ALL else LEAST_GAP):
            return False
        return self.score > Fraction(upper_quantile(min(level, Fraction(1, 2)))) ** 2


def portion(family: str, of_families: Mapping[str, Fraction]) -> Fraction:
    """The share of the gap test's level that one family gets, or the mean over families (ALL)."""
    return MEAN_SHARE if family == ALL else (1 - MEAN_SHARE) * of_families[family]


def shares(reference: Mapping[str, tuple[int, int]]) -> dict[str, Fraction]:
    """Each family's weight, proportional to its headroom; the weights sum to 1. `reference` maps a family to (right answers, items) on dev."""
    headroom = {family: Fraction(n - right + 1, n + 2) for family, (right, n) in reference.items()}
    total = sum(headroom.values(), Fraction(0))
    return {family: value / total for family, value in headroom.items()}


def family_tests(family: str, looks: Sequence[FamilyCounts]) -> list[GapTest]:
    """The tests at the newest round, one for each round in which a gap may have begun. `looks` has the family's rounds so far, in order."""
    return [*_family_tests(family, tuple(looks))]


@lru_cache(maxsize=256)
def _family_tests(family: str, looks: tuple[FamilyCounts, ...]) -> tuple[GapTest, ...]:
    """The cache: the verdict and the power card need the same tests."""
    gaps = [look.dev.mean_lift - look.fresh.mean_lift for look in looks]
    return tuple(_least_squares(family, gaps, _covariances(looks)))


def mean_tests(looks: Sequence[Sequence[FamilyCounts]]) -> list[GapTest]:
    """The same tests for the mean gap over families; none where there is only one family. `looks` has, for each family, its rounds so far."""
    return [*_mean_tests(tuple(tuple(rounds) for rounds in looks))] if len(looks) > 1 else []


@lru_cache(maxsize=64)
def _mean_tests(looks: tuple[tuple[FamilyCounts, ...], ...]) -> tuple[GapTest, ...]:
    size = len(looks)
    gaps = [
        sum((counts.dev.mean_lift - counts.fresh.mean_lift for counts in families), Fraction(0)) / size
        for families in zip(*looks, strict=True)
    ]
    parts = [_covariances(rounds) for rounds in looks]
    rounds = range(len(gaps))
    covariances = [[sum((part[i][j] for part in parts), Fraction(0)) / size**2 for j in rounds] for i in rounds]
    return tuple(_least_squares(ALL, gaps, covariances))


def _least_squares(family: str, gaps: Sequence[Fraction], covariances: Sequence[Sequence[Fraction]]) -> list[GapTest]:
    """Compute d and its variance for each c. Like `_inverse`, it uses whole numbers until the last step."""
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
    """Test each arm of a round against the other arms; there are no tests where the round has fewer than three arms."""
    if look.dev.num_arms < 3:
        return []
    tests = []
    for arm in range(look.dev.num_arms):
        (dev, dev_variance), (fresh, fresh_variance) = look.dev.arm_contrast(arm), look.fresh.arm_contrast(arm)
        floor = _one_item(look.dev) + _one_item(look.fresh)
        tests.append(GapTest(family, -1, arm, dev - fresh, dev_variance + fresh_variance + floor))
    return tests


def latest_gap(look: FamilyCounts) -> tuple[Fraction, Fraction]:
    """The gap of one round alone, and its variance. An upper bound is computed from them."""
    gap = look.dev.mean_lift - look.fresh.mean_lift
    return gap, _covariances([look])[0][0]


def _covariances(looks: Sequence[FamilyCounts]) -> list[list[Fraction]]:
    """The covariance G of one family's gaps in these rounds."""
    matrix = [[covariance(first.dev, second.dev) for second in looks] for first in looks]
    for number, look in enumerate(looks):
        fresh = covariance(look.fresh, look.fresh)
        matrix[number][number] += fresh + _one_item(look.dev) + _one_item(look.fresh)
    return matrix


def _one_item(counts: Counts) -> Fraction:
    """What one more disagreement would add to the variance of a mean. Adding it keeps every variance above 0."""
    return Fraction(1, counts.num_items**2)


def _inverse(matrix: Sequence[Sequence[Fraction]]) -> tuple[list[list[int]], Fraction]:
    """The inverse of a positive definite matrix, as whole numbers and the factor that they are multiplied with.

    Gauss-Jordan elimination on whole numbers makes each division exact (Bareiss 1968). A positive definite matrix needs no pivoting.
    Elimination on ratios computes a greatest common divisor at every step, which takes ten times as long for twenty rounds.
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
