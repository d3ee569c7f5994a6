"""The rules of claims in floats, for many campaigns at once: what is claimed, and what is shown to be worse.

`pipeline/claims` says what is computed and why, and computes it exactly. tests/studies/test_claim_twin.py shows that both decide alike.
What cannot be evaluated is NaN here. Shapes: C campaigns, R rounds, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from scipy.stats import t as student

from pipeline.campaign.constitution import Constitution
from pipeline.claims.assess_claims import FINAL_ROUND
from pipeline.claims.claim_test import MOST_DEGREES, level_of_round
from studies.simulated import Flags, Floats, Ints

LEAST_VARIANCE = 1e-20  # what is left of 0 in floats
NONE, REFERENCE, AXIS, OVERWRITES, STANDING = range(5)
"""What an arm's run says. NONE: nothing, it has no score or another role. REFERENCE: a0 and repeats of the reference recipe. AXIS: the
standing recipe with one axis moved. OVERWRITES: the same, where the moved axis already has a setting in the standing recipe. STANDING: the
standing recipe unchanged."""


@dataclass(frozen=True)
class Runs:
    """The runs of many campaigns: fresh lifts over the reference adapter, all families together, and their variances over items."""

    kind: Ints  # (C, R, A)
    lift: Floats  # (C, R, A)
    variance: Floats  # (C, R, A)

    def until(self, number: int) -> Runs:
        """The first `number` rounds."""
        return Runs(self.kind[:, :number], self.lift[:, :number], self.variance[:, :number])

    def of(self, *kinds: int) -> Flags:
        """(C, R, A) the runs of these kinds."""
        return np.isin(self.kind, kinds)


@dataclass(frozen=True)
class Contrast:
    """A difference, its variance and the degrees of freedom of that variance, all (C,); NaN where it cannot be evaluated."""

    difference: Floats
    variance: Floats
    degrees: Floats

    def exceeds(self, level: Fraction) -> Flags:
        """(C,) whether the difference is above 0 at this one-sided level."""
        usable = ~np.isnan(self.difference)
        points = quantile(level, np.where(usable, self.degrees, 1))
        square = np.where(usable, self.difference, 0) ** 2
        return np.asarray(usable & (self.difference > 0) & (square > points**2 * np.where(usable, self.variance, 1)))


@dataclass(frozen=True)
class Found:
    """What a campaign says in each round: (C, R) an improvement is claimed, the standing recipe is worse; (C, R, A) an axis arm is worse."""

    claimed: Flags
    worse_standing: Flags
    worse_arms: Flags


def every_round(runs: Runs, confirmation: str, rules: Constitution) -> Found:
    """What is said after each round of campaigns of as many rounds as `runs` has. confirmation: a name of `assess_claims.CONFIRMATIONS`."""
    campaigns, rounds, _ = runs.kind.shape
    claimed, worse_standing = np.zeros((campaigns, rounds), bool), np.zeros((campaigns, rounds), bool)
    worse_arms = np.zeros(runs.kind.shape, bool)
    runs = replace(runs, kind=runs.kind.copy())
    for number in range(1, rounds + 1):
        worse = shown_worse(runs.until(number), rules.worse_level / rounds, float(rules.crash_allowance))
        worse_arms[:, number - 1] = worse
        runs.kind[:, number - 1][worse] = NONE  # it is no measure of how far chance moves a run
        if number == 1 or (confirmation == FINAL_ROUND and number < rounds):
            continue
        is_final = confirmation == FINAL_ROUND
        levels = [
            final if is_final else level_of_round(level, number, rounds)
            for final, level in (
                (rules.final_round_level, rules.claim_level(rounds)),
                (rules.worse_level, rules.worse_level),
            )
        ]
        for said, level, trimmed in ((claimed, levels[0], False), (worse_standing, levels[1], True)):
            said[:, number - 1] = standing_over_reference(runs.until(number), is_final, trimmed).exceeds(level)
    return Found(claimed, worse_standing, worse_arms)


def standing_over_reference(runs: Runs, newest_alone: bool = False, trimmed: bool = False) -> Contrast:
    """The standing runs against all runs of the reference recipe, over the rounds so far.

    newest_alone: only the standing runs of the newest round are compared. trimmed: the lowest standing run is left out and the sign
    reversed, which is the contrast for "shown to be worse".
    """
    every_standing, repeats = runs.of(STANDING), runs.of(REFERENCE)
    in_use = np.arange(runs.kind.shape[1]) == runs.kind.shape[1] - 1 if newest_alone else True
    stands = every_standing & np.reshape(in_use, (1, -1, 1))
    if trimmed:
        stands = stands & ~_lowest(runs.lift, stands)
    arms = runs.of(AXIS) & _any(every_standing)[:, :, None]
    (squares, f), (more_squares, more_f) = (squares_of(runs.lift, each) for each in (arms, every_standing))
    squares, f = squares + more_squares, f + more_f
    by_standing, by_repeats = stands.sum(2), repeats.sum(2)
    k, m = by_standing.sum(1), by_repeats.sum(1)
    centre = _mean(runs.lift, repeats)
    difference = _mean(runs.lift, stands) - centre
    around = np.where(repeats, runs.lift - centre[:, None, None], 0)
    used = (by_standing + by_repeats) > 0
    own = np.where(used, own_noise(runs, stands), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = own.sum(1) / used.sum(1)
        one_arm = np.maximum(squares / f, floor) / k
        one_repeat = np.maximum((around**2).sum((1, 2)) / (m - 1), floor) / m
        unshared = ((by_standing / k[:, None] - by_repeats / m[:, None]) ** 2 * own).sum(1)
        variance = one_arm + one_repeat + unshared
        degrees = np.floor(variance**2 / (one_arm**2 / f + one_repeat**2 / (m - 1)) * (1 + 1e-12))
    usable = (k >= 1) & (m >= 2) & (f >= 1) & (variance > LEAST_VARIANCE)
    difference = -difference if trimmed else difference
    return Contrast(
        *(np.where(usable, each, np.nan) for each in (difference, variance, np.clip(degrees, 1, MOST_DEGREES)))
    )


def shown_worse(runs: Runs, level: Fraction, allowance: float) -> Flags:
    """(C, A) the axis arms of the newest round that are shown to be worse than that round's baseline.

    level: what the arms of one round share, a part for each.
    """
    moved, newest = runs.of(AXIS, OVERWRITES), runs.kind.shape[1] - 1
    number = moved[:, newest].sum(1)
    shown = np.zeros((len(runs.kind), runs.kind.shape[2]), bool)
    for arm in range(shown.shape[1]):
        found = arm_below_baseline(runs, arm, allowance)
        for arms in np.unique(number[moved[:, newest, arm]]):
            shown[:, arm] |= (number == arms) & found.exceeds(level / int(arms))
    return shown


def arm_below_baseline(runs: Runs, arm: int, allowance: float) -> Contrast:
    """How far one axis arm of the newest round is below its baseline beyond the allowance; NaN where the arm is none."""
    others, newest = runs.of(AXIS, OVERWRITES), runs.kind.shape[1] - 1
    usable = others[:, newest, arm].copy()
    others[:, newest, arm] = False
    squares, f = squares_of(runs.lift, others)
    stands, repeats = (runs.of(kind)[:, newest] for kind in (STANDING, REFERENCE))
    baseline = np.where(np.asarray(stands.any(1))[:, None], stands, repeats)
    k = baseline.sum(1)
    used = runs.of(STANDING, REFERENCE).any(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(used, own_noise(runs, runs.of(STANDING)), 0).sum(1) / used.sum(1)
        below = np.where(baseline, runs.lift[:, newest], 0).sum(1) / k - runs.lift[:, newest, arm] - allowance
        variance = np.maximum(squares / f, floor) * (1 + 1 / k)
    usable &= (k >= 1) & (f >= 1) & (variance > 0)
    return Contrast(*(np.where(usable, each, np.nan) for each in (below, variance, f)))


def squares_of(lift: Floats, chosen: Flags) -> tuple[Floats, Ints]:
    """(C,) the sum of squares of the chosen runs' lifts around the mean of their round, and its degrees of freedom."""
    number = chosen.sum(2)
    mean = np.where(chosen, lift, 0).sum(2) / np.maximum(number, 1)
    squares = np.where(chosen, lift - mean[:, :, None], 0) ** 2
    return squares.sum((1, 2)), np.maximum(number - 1, 0).sum(1)


def own_noise(runs: Runs, stands: Flags) -> Floats:
    """(C, R) one run's variance over items: half the mean of the repeats' lifts', of the runs `stands` where a round has no repeat."""
    repeats = runs.of(REFERENCE)
    chosen = np.where(_any(repeats)[:, :, None], repeats, stands)
    return np.asarray(np.where(chosen, runs.variance, 0).sum(2) / np.maximum(chosen.sum(2), 1) / 2)


def quantile(level: Fraction, degrees: Floats) -> Floats:
    """The upper points of Student's t, rounded up to a multiple of 0.0001 as `student.student_quantile` does."""
    known, at = np.unique(degrees, return_inverse=True)
    return np.asarray(np.ceil(student.isf(float(level), known) * 10_000 - 1e-6) / 10_000)[at]


def _lowest(lift: Floats, chosen: Flags) -> Flags:
    """(C, R, A) the lowest of the chosen runs of each campaign; the first of equal ones."""
    flat = np.where(chosen, lift, np.inf).reshape(len(lift), -1)
    at = np.zeros(flat.shape, bool)
    at[np.arange(len(flat)), flat.argmin(1)] = True
    return at.reshape(chosen.shape) & chosen


def _any(chosen: Flags) -> Flags:
    """(C, R) whether a round has such a run."""
    return np.asarray(chosen.any(2))


def _mean(lift: Floats, chosen: Flags) -> Floats:
    return np.asarray(np.where(chosen, lift, 0).sum((1, 2)) / np.maximum(chosen.sum((1, 2)), 1))
