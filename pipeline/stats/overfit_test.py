"""The gap test (C1): have the arms learned the dev items instead of the skill that the items test?

Dev and fresh items come from one generator, so the arms' effect over the reference, in probits (pipeline.stats.difficulty), is the same on
both unless dev items were learned, whether or not one of the sets is harder. The gap of round r is

    g_r = density(reference's level on dev) (mean effect on dev - mean effect on fresh)

over all arms: the difference in points that it makes on dev. (The winner's own gap would be biased, because the winner was selected.) Dev
items stay for the whole campaign, so their sampling error is the same in every g_r, and the rounds before any harm show it. Let G be the
covariance of (g_1 .. g_r): dev gives covariances between rounds, fresh gives variances within a round. By generalised least squares, the
test of "a gap d from round c on" is

    T_c = 1_c' G^-1 g / sqrt(1_c' G^-1 1_c),   d = 1_c' G^-1 g / 1_c' G^-1 1_c,   1_c = 1 from round c on

There is an alarm where, for some c, T_c exceeds the normal quantile of level x share and d is at least 2 points. A quarter of the level
goes to the mean gap over all families (d of at least 1 point), which finds many small exploits. The families divide the rest
by their headroom (1 - reference accuracy). With level = alpha / (R (R + 1) / 2), Bonferroni bounds the false alarms of a campaign by
alpha. The looks and the c's are correlated, so constitution/nulls, which spends the same alpha in simulation, allows a higher
level. (statistics.md 3 tests g_r alone.) Each variance is increased by the weight of one item, so that a small set never seems noiseless.

The arm test finds one arm of eight that cheats, which a mean over arms would dilute. It compares the level of an arm minus the mean level
of the other arms on dev with the same on fresh. Sums are decimals; a test's gap and variance are rounded to twelve digits, as records hold
them, and compared as rationals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from pipeline.campaign.errors import IntegrityError
from pipeline.stats.counts import Counts
from pipeline.stats.decimal_math import cholesky_row, dot, exactly, rounded, upper_quantile
from pipeline.stats.difficulty import covariance, on_probits

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


@lru_cache(maxsize=128)
def _family_tests(family: str, looks: tuple[FamilyCounts, ...]) -> tuple[GapTest, ...]:
    """The cache: the verdict and the power card need the same tests."""
    return _family_fit(looks).tests(family)


def mean_tests(looks: Sequence[Sequence[FamilyCounts]]) -> list[GapTest]:
    """The same tests for the mean gap over families; none where there is only one family. `looks` has, for each family, its rounds so far."""
    return [*_mean_tests(tuple(tuple(rounds) for rounds in looks))] if len(looks) > 1 else []


@lru_cache(maxsize=16)
def _mean_tests(looks: tuple[tuple[FamilyCounts, ...], ...]) -> tuple[GapTest, ...]:
    return _mean_fit(looks).tests(ALL)


@dataclass(frozen=True)
class _Fit:
    """Generalised least squares of the gaps of some rounds. One more round extends it, because its rounds do not change G of those before.

    lower: the Cholesky factor of G. gaps: whitened with it. steps: for each c, 1_c whitened, from its first entry that is not 0 on; then
    1_c' G^-1 1_c and 1_c' G^-1 g.
    """

    lower: tuple[list[Decimal], ...] = ()
    gaps: tuple[Decimal, ...] = ()
    steps: tuple[tuple[tuple[Decimal, ...], Decimal, Decimal], ...] = ()

    def extended(self, gap: Decimal, covariances: Sequence[Decimal]) -> _Fit:
        """The fit with one more round. `covariances`: the new row of G, up to its diagonal. Raises ValueError as `cholesky`."""
        row = cholesky_row(self.lower, covariances)
        with exactly():
            e = (gap - dot(row[:-1], self.gaps)) / row[-1]
            steps = []
            for since, (step, information, projection) in enumerate((*self.steps, ((), Decimal(0), Decimal(0)))):
                new = (1 - dot(row[since:-1], step)) / row[-1]
                steps.append(((*step, new), information + new * new, projection + new * e))
        return _Fit((*self.lower, row), (*self.gaps, e), tuple(steps))

    def tests(self, family: str) -> tuple[GapTest, ...]:
        """d and its variance for each c."""
        with exactly():
            return tuple(
                _test(family, since, None, projection / information, 1 / information)
                for since, (_, information, projection) in enumerate(self.steps)
            )


@lru_cache(maxsize=64)
def _family_fit(looks: tuple[FamilyCounts, ...]) -> _Fit:
    """The cache: the next look extends this fit."""
    if not looks:
        return _Fit()
    return _family_fit(looks[:-1]).extended(_gap(looks[-1]), _covariances(looks))


@lru_cache(maxsize=16)
def _mean_fit(looks: tuple[tuple[FamilyCounts, ...], ...]) -> _Fit:
    """The cache: the next look extends this fit. `looks` has, for each family, its rounds so far."""
    if not looks[0]:
        return _Fit()
    before = _mean_fit(tuple(rounds[:-1] for rounds in looks))
    with exactly():
        gap = sum((_gap(rounds[-1]) for rounds in looks), Decimal(0)) / len(looks)
        parts = zip(*map(_covariances, looks), strict=True)
        covariances = [sum(of_round, Decimal(0)) / len(looks) ** 2 for of_round in parts]
    return before.extended(gap, covariances)


def arm_tests(family: str, look: FamilyCounts) -> list[GapTest]:
    """Test each arm of a round against the other arms; there are no tests where the round has fewer than three arms."""
    return [*_arm_tests(family, look)]


@lru_cache(maxsize=512)
def _arm_tests(family: str, look: FamilyCounts) -> tuple[GapTest, ...]:
    """The cache: the verdict and the finalists need the same tests."""
    if look.dev.num_arms < 3:
        return ()
    dev, fresh, tests = on_probits(look.dev), on_probits(look.fresh), []
    with exactly():
        for arm in range(look.dev.num_arms):
            (on_dev, dev_variance), (on_fresh, fresh_variance) = dev.contrast(arm), fresh.contrast(arm)
            gap, variance = dev.density * (on_dev - on_fresh), dev.density**2 * (dev_variance + fresh_variance)
            tests.append(_test(family, -1, arm, gap, variance))
    return tuple(tests)


def _test(family: str, since: int, arm: int | None, gap: Decimal, variance: Decimal) -> GapTest:
    return GapTest(family, since, arm, Fraction(rounded(gap)), Fraction(rounded(variance)))


def latest_gap(look: FamilyCounts) -> tuple[Decimal, Decimal]:
    """The gap of one round alone, and its variance. An upper bound is computed from them."""
    return _gap(look), _variance(look)


def _gap(look: FamilyCounts) -> Decimal:
    dev = on_probits(look.dev)
    with exactly():
        return dev.density * (dev.mean_effect - on_probits(look.fresh).mean_effect)


@lru_cache(maxsize=64)
def _covariances(looks: tuple[FamilyCounts, ...]) -> tuple[Decimal, ...]:
    """The last row of the covariance G of one family's gaps. The cache: the family's fit and the mean's need it."""
    *earlier, newest = looks
    return (*(_dev_covariance(newest.dev, look.dev) for look in earlier), _variance(newest))


def _variance(look: FamilyCounts) -> Decimal:
    """The variance of a family's gap in one round."""
    dev, fresh = on_probits(look.dev), on_probits(look.fresh)
    with exactly():
        return dev.density**2 * (dev.mean_variance + fresh.mean_variance)


def _dev_covariance(one: Counts, other: Counts) -> Decimal:
    """Raises IntegrityError where the rounds have different numbers of items."""
    if other.num_items != one.num_items:
        raise IntegrityError(
            f"Two rounds have {other.num_items} and {one.num_items} items, so they were not scored on the same item set"
        )
    first, second = on_probits(one), on_probits(other)
    with exactly():
        return first.density * second.density * covariance(first.mean_items, second.mean_items, one.num_items)
