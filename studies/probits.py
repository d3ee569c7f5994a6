"""Accuracies on the probit scale, where a set that is easier or harder moves all models alike: the numpy twin of
pipeline.stats.difficulty.

Shapes: C campaigns, F families, A arms, M items of a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtr, ndtri

from pipeline.stats import difficulty
from studies.simulated import CountArrays, Floats, Ints

HEALTHY_VARIANCE = float(difficulty.HEALTHY_SD) ** 2
PRINT_VARIANCE = float(difficulty.PRINT_VARIANCE)
DOUBT = float(difficulty.DOUBT)
STEPS, LEAST_SHARE = 40, 1e-9


@dataclass(frozen=True)
class OnProbits:
    """One item set in one round on the probit scale."""

    counts: CountArrays

    @cached_property
    def share(self) -> Floats:
        """(C, F) the reference's accuracy, corrected for continuity."""
        return corrected(self.counts.reference, self.counts.num_items)

    @cached_property
    def density(self) -> Floats:
        """(C, F) the normal density at the reference's level."""
        return density(ndtri(self.share))

    @cached_property
    def information(self) -> Floats:
        """(C, F) one over the variance of the reference's level."""
        return np.asarray(self.counts.num_items * self.density**2 / (self.share * (1 - self.share)))

    @cached_property
    def levels(self) -> Floats:
        """(C, F, A) the arms' levels."""
        return np.asarray(ndtri(corrected(self.counts.right, self.counts.num_items)))

    @cached_property
    def effects(self) -> Floats:
        """(C, F, A) the arms' levels minus the reference's."""
        return np.asarray(self.levels - ndtri(self.share)[..., None])

    @cached_property
    def weights(self) -> Floats:
        """(C, F, A) what one more right answer of an arm adds to its level, times the number of items."""
        return 1 / density(self.levels)


@dataclass(frozen=True)
class Target:
    """How hard the target is: (C, F) the reference's level, (C,) the variance of what is common to the families' levels, and (C, F) the
    variances of the slopes with which effects arrive where nothing is wrong."""

    level: Floats
    variance: Floats
    slopes: Floats


def target_of(fresh: Floats, information: Floats, printed: Floats, rows: int) -> Target:
    """The target of a printed total. fresh, information: (C, F) the reference's level on fresh items; printed: (C,). difficulty.target_of says
    more."""
    weight, total, offset = 1 / fresh.shape[1], corrected(printed * rows, rows), np.zeros((len(fresh), 1))
    for _ in range(STEPS):
        miss = total - ndtr(fresh + offset).mean(1)
        offset += np.clip(miss / density(fresh + offset).mean(1), -1, 1)[:, None]
    level = fresh + offset
    here = density(level)
    alone = ndtr(fresh) + ((total - ndtr(fresh).mean(1)) / weight)[:, None]
    alone = ndtri(np.clip(alone, LEAST_SHARE, 1 - LEAST_SHARE))
    likely = np.exp(-((alone - fresh) ** 2) / 2)
    rivals = (density(fresh) / here - 1) ** 2 + likely * (density(alone) / here - 1) ** 2
    sampling = ndtr(level) * ndtr(-level) / (weight * rows) + here**2 / information
    variance = (PRINT_VARIANCE / 2 + weight**2 * sampling.sum(1)) / here.mean(1) ** 2
    return Target(level, variance, HEALTHY_VARIANCE + DOUBT * rivals)


def corrected(right: Ints | Floats, num_items: int) -> Floats:
    """A share of right answers that is neither 0 nor 1 (counts.corrected)."""
    return np.asarray((right + 0.5) / (num_items + 1))


def density(level: Floats) -> Floats:
    """The normal density."""
    return np.asarray(np.exp(-level * level / 2) / (2 * np.pi) ** 0.5)


def lifts_at(target: Floats, effects: Floats) -> Floats:
    """(C, F, A) what effects (C, F, A) in probits are worth in accuracy where the reference has the levels `target` (C, F)."""
    return np.asarray(ndtr(target[..., None] + effects) - ndtr(target)[..., None])


def arm_lifts(counts: CountArrays) -> Floats:
    """(C, F, A) lifts over the reference, in accuracy."""
    return np.asarray((counts.right - counts.reference[..., None]) / counts.num_items)


def influence(on: OnProbits, unit: Floats) -> Floats:
    """(C, F, M) what each item adds to the mean effect of the arms, centred, in units of 1 / `unit` (C, F) probits."""
    arms = on.weights.shape[2]
    items = (on.weights[:, :, None] / arms @ on.counts.answers)[:, :, 0]
    items = items - on.counts.marks / on.density[..., None]
    return np.asarray(unit[..., None] * (items - items.mean(2, keepdims=True)))


def covariance(one: Floats, other: Floats) -> Floats:
    n = one.shape[2]
    return np.einsum("cfm,cfm->cf", one, other) / (n * (n - 1))


def one_item(on: OnProbits, unit: Floats) -> Floats:
    """(C, F) what one more disagreement would add to the variance of the mean effect."""
    return np.asarray((unit * np.maximum(1 / on.density, on.weights.mean(2)) / on.counts.num_items) ** 2)


def noise(on: OnProbits) -> Floats:
    """(3, C, F) variances for one item: of an arm's own part, of the shared part of lifts, and p (1 - p) of the reference."""
    counts, n, arms = on.counts, on.counts.num_items, on.counts.right.shape[2]
    if arms < 2:
        own = np.full(on.share.shape, 0.25)
    else:
        own = (counts.right.sum(2) - counts.both.sum((2, 3)) / arms) / (n * (arms - 1))
    lifts = counts.answers.mean(2, dtype=np.float64) - counts.marks
    return np.stack([own, np.maximum(0, lifts.var(2, ddof=1) - own / arms), on.share * (1 - on.share)])


def contrasts(on: OnProbits) -> tuple[Floats, Floats]:
    """(C, F, A) each arm's level minus the mean level of the others, and the variance of that difference over items."""
    n, arms, weights = on.counts.num_items, on.levels.shape[2], on.weights
    mean = (arms * on.levels - on.levels.sum(2, keepdims=True)) / (arms - 1)
    weighted = on.counts.both * weights[..., None] * weights[:, :, None]
    own = arms * weights * on.counts.right
    total = own - own.sum(2, keepdims=True) / arms
    squares = arms * arms * np.einsum("cfaa->cfa", weighted) - 2 * arms * weighted.sum(3)
    squares = squares + weighted.sum((2, 3))[..., None]
    variance = (squares - total * total / n) / (n * (n - 1) * (arms - 1) ** 2)
    others = (weights.sum(2, keepdims=True) - weights) / (arms - 1)
    return mean, variance + (np.maximum(weights, others) / n) ** 2
