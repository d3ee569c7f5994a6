"""The canaries of `pipeline/stats/canaries.py` in floats, for many campaigns at once. tests/studies/test_claim_twin.py shows that both fire alike.

Shapes: C campaigns, R rounds, A arms, F families.
"""

from __future__ import annotations

import numpy as np

from pipeline.stats import canaries as exact
from studies.claims.claim_twin import NONE, REFERENCE, Runs
from studies.simulated import Flags, Floats, Ints


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
    usable = (number >= exact.LEAST_REPEATS) & (rest > 0)
    return np.asarray(usable[:, None] & (value > centre) & ((value - centre) ** 2 > reach))
