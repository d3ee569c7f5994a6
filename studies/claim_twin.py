"""The rules of claims in floats, for many campaigns at once: improvement, "shown to be worse", and the canaries.

`pipeline/claims` and `pipeline/stats/canaries.py` say what is computed and why, and compute it exactly. tests/studies/test_claim_twin.py
shows that both decide alike. What cannot be evaluated is NaN here. Shapes: C campaigns, R rounds, A arms, F families.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from pipeline.stats import canaries as exact
from studies.simulated import Flags, Floats, Ints

NONE, REFERENCE, AXIS, OVERWRITES, STANDING = range(5)
"""What an arm's run says. NONE: nothing, it has no score or another role. REFERENCE: a0 and repeats of the reference recipe. AXIS: the
standing recipe with one axis moved. OVERWRITES: the same, where the moved axis already has a setting in the standing recipe. STANDING: the
standing recipe unchanged."""
MOST_DF = 30
LEAST_REPEATS = 4
ALLOWANCE = 0.10  # what an arm must be worse by beyond noise, because one run in many crashes without a sign


@dataclass(frozen=True)
class Runs:
    """The runs of many campaigns: paired fresh lifts over the reference adapter, all families together, and their item variances."""

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
    df: Floats

    def exceeds(self, level: float) -> Flags:
        """(C,) whether the difference is above 0 at this one-sided level."""
        usable = ~np.isnan(self.difference)
        quantile = student.isf(level, np.where(usable, self.df, 1))
        square = np.where(usable, self.difference, 0) ** 2
        return np.asarray(usable & (self.difference > 0) & (square > quantile**2 * np.where(usable, self.variance, 1)))


def level_of(round_number: int, rounds: int, alpha: float) -> float:
    """The part of `alpha` that round `round_number` spends: in proportion to the rounds after the first."""
    return alpha * 2 * (round_number - 1) / (rounds * (rounds - 1))


def standing_over_reference(runs: Runs, trimmed: bool = False) -> Contrast:
    """All standing runs against all runs of the reference recipe, over the rounds so far.

    `trimmed` leaves out the lowest standing run and reverses the sign: it is the contrast for "shown to be worse".
    """
    stands, repeats = runs.of(STANDING), runs.of(REFERENCE)
    has_standing = stands.any(2)
    if trimmed:
        stands = stands & ~_lowest(runs.lift, stands)
    parts = [spread_of(runs.lift, runs.of(AXIS) & has_standing[:, :, None]), spread_of(runs.lift, runs.of(STANDING))]
    f = parts[0][1] + parts[1][1]
    spread = (parts[0][0] + parts[1][0]) / np.maximum(f, 1)
    by_standing, by_repeats = stands.sum(2), repeats.sum(2)
    k, m = by_standing.sum(1), by_repeats.sum(1)
    repeats_mean = _mean(runs.lift, repeats)
    difference = _mean(runs.lift, stands) - repeats_mean
    around = np.where(repeats, runs.lift - repeats_mean[:, None, None], 0)
    own = own_noise(runs)
    with np.errstate(divide="ignore", invalid="ignore"):
        repeats_spread = (around**2).sum((1, 2)) / (m - 1)
        used = (by_standing + by_repeats) > 0
        floor = np.where(used, own, 0).sum(1) / used.sum(1)
        a, b = np.maximum(spread, floor), np.maximum(repeats_spread, floor)
        shares = by_standing / k[:, None] - by_repeats / m[:, None]
        shared = (shares**2 * np.where(used, own, 0)).sum(1)
        variance = a / k + b / m + shared
        df = np.clip(np.floor(variance**2 / ((a / k) ** 2 / f + (b / m) ** 2 / (m - 1))), 1, MOST_DF)
    usable = (k >= 1) & (m >= 2) & (f >= 1)
    sign = -1 if trimmed else 1
    return Contrast(*(np.where(usable, each, np.nan) for each in (sign * difference, variance, df)))


def axis_arms(runs: Runs) -> Contrast:
    """(C, A) how far each axis arm of the newest round is below that round's baseline, beyond the allowance; NaN for other arms."""
    moved, newest = runs.of(AXIS, OVERWRITES), runs.kind.shape[1] - 1
    found = [_axis_arm(runs, moved, newest, arm) for arm in range(runs.kind.shape[2])]
    return Contrast(*(np.stack(each, 1) for each in zip(*found, strict=True)))


def _axis_arm(runs: Runs, moved: Flags, newest: int, arm: int) -> tuple[Floats, Floats, Floats]:
    others = moved.copy()
    others[:, newest, arm] = False
    squares, f = spread_of(runs.lift, others)
    stands, repeats = (runs.of(kind)[:, newest] for kind in (STANDING, REFERENCE))
    baseline = np.where(stands.any(1)[:, None], stands, repeats)
    k = baseline.sum(1)
    own = own_noise(runs)
    used = runs.of(STANDING, REFERENCE).any(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(used, own, 0).sum(1) / used.sum(1)
        below = np.where(baseline, runs.lift[:, newest], 0).sum(1) / k - runs.lift[:, newest, arm]
        variance = np.maximum(squares / f, floor) * (1 + 1 / k)
    usable = moved[:, newest, arm] & (k >= 1) & (f >= 1)
    df = np.maximum(f, 1)
    below, variance, df = (np.where(usable, each, np.nan) for each in (below - ALLOWANCE, variance, df))
    return below, variance, df


def spread_of(lift: Floats, chosen: Flags) -> tuple[Floats, Ints]:
    """(C,) the sum of squares of the chosen runs' lifts around the mean of their round, and its degrees of freedom."""
    number = chosen.sum(2)
    mean = np.where(chosen, lift, 0).sum(2) / np.maximum(number, 1)
    squares = np.where(chosen, lift - mean[:, :, None], 0) ** 2
    f = np.maximum(number - 1, 0).sum(1)
    return squares.sum((1, 2)), f


def own_noise(runs: Runs) -> Floats:
    """(C, R) the item variance of one run alone: half the mean of the repeats' lifts', of the standing runs' where a round has no repeat."""
    repeats, stands = runs.of(REFERENCE), runs.of(STANDING)
    chosen = np.where(repeats.any(2)[:, :, None], repeats, stands)
    return np.asarray(np.where(chosen, runs.variance, 0).sum(2) / np.maximum(chosen.sum(2), 1) / 2)


def _lowest(lift: Floats, chosen: Flags) -> Flags:
    """(C, R, A) the lowest of the chosen runs of each campaign that has at least two; the first of equal ones."""
    flat = np.where(chosen, lift, np.inf).reshape(len(lift), -1)
    at = np.zeros(flat.shape, bool)
    at[np.arange(len(flat)), flat.argmin(1)] = True
    return at.reshape(chosen.shape) & chosen


def _mean(lift: Floats, chosen: Flags) -> Floats:
    return np.asarray(np.where(chosen, lift, 0).sum((1, 2)) / np.maximum(chosen.sum((1, 2)), 1))


def canaries(runs: Runs, right: Ints, truncated: Ints, reference: Ints, item_variance: Floats, items: int) -> Flags:
    """(C, F, 3) whether drift, truncation and the worst family fire at the newest round.

    right, truncated and item_variance: (C, R, A, F) of the fresh items; reference: (C, R, F) right answers; items: of one family.
    """
    repeats, newest = runs.of(REFERENCE), runs.kind.shape[1] - 1
    others = (runs.kind[:, newest] != NONE) & ~repeats[:, newest]
    lift = (right - reference[:, :, None]) / items
    lag = lift.mean(3, keepdims=True) - lift
    share = truncated / items
    number = repeats.sum((1, 2))
    chosen = repeats[..., None]
    mean_share = np.where(chosen, share, 0).sum((1, 2)) / np.maximum(number, 1)[:, None]
    total = mean_share * (number * items)[:, None]
    p = (total + 1) / (number * items + 2)[:, None]
    item_floor = np.where(chosen, item_variance, 0).sum((1, 2)) / np.maximum(number, 1)[:, None]
    fired = [drifts(reference, items)] + [
        _fires(values, repeats, others, floor) for values, floor in ((share, p * (1 - p) / items), (lag, item_floor))
    ]
    return np.stack(fired, 2)


def drifts(reference: Ints, items: int) -> Flags:
    """(C, F) whether the reference's accuracy on the newest fresh items differs from that on all earlier ones."""
    earlier = reference.shape[1] - 1
    if not earlier:
        return np.zeros(reference[:, 0].shape, bool)
    before, now = reference[:, :-1].sum(1), reference[:, -1]
    pooled = (before + now) / (items * (earlier + 1))
    change = now / items - before / (items * earlier)
    variance = pooled * (1 - pooled) * (1 / items + 1 / (items * earlier))
    return np.asarray(change**2 > float(exact.DRIFT_SCORE) ** 2 * variance)


def _fires(values: Floats, repeats: Flags, others: Flags, floor: Floats) -> Flags:
    """(C, F) whether the mean of the newest round's other arms is above the prediction interval of the repeats."""
    number, chosen = repeats.sum((1, 2)), repeats[..., None]
    centre = np.where(chosen, values, 0).sum((1, 2)) / np.maximum(number, 1)[:, None]
    squares = np.where(chosen, values - centre[:, None, None], 0) ** 2
    variance = np.maximum(squares.sum((1, 2)) / np.maximum(number - 1, 1)[:, None], floor)
    rest = others.sum(1)
    value = np.where(others[..., None], values[:, -1], 0).sum(1) / np.maximum(rest, 1)[:, None]
    quantile = np.array([float(point) for point in exact.STUDENT])[np.clip(number - 2, 0, len(exact.STUDENT) - 1)]
    reach = quantile[:, None] ** 2 * variance * (1 + 1 / np.maximum(number, 1))[:, None]
    usable = (number >= LEAST_REPEATS) & (rest > 0)
    return np.asarray(usable[:, None] & (value > centre) & ((value - centre) ** 2 > reach))
