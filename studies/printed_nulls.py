"""Draw what a board would have printed beside a table's own dev scores if nothing were wrong, and take the largest E of each draw.

There are two nulls: every family's slope is 1, or slopes are .6 to 1.4 and another evaluation stack moves scores by .7 points.
Shapes: C draws, N scored lines, F families.
"""

from __future__ import annotations

import numpy as np

from pipeline.stats.difficulty import HEALTHY_SD
from pipeline.stats.shift_test import KINDS, SLACK_VARIANCE, BoardModel
from studies.rule_twin import bayes_factors
from studies.simulated import Floats

SEED = 20261124
NULLS = {"healthy": (0.0, 0.0), "het": (0.2, 0.007)}  # sd of the slopes, sd of the evaluation stack


def largest_e(model: BoardModel, num_rounds: int, num: int) -> dict[str, Floats]:
    """Return for each null the sorted (C,) largest E over rounds. model: the healthy model of the whole table."""
    effects = np.array([[float(value) for value in row] for row in model.effects])
    means = np.array([[float(value) for value in row] for row in model.means])
    lower = np.zeros((len(effects), len(effects)))
    for i, row in enumerate(model.lower):
        lower[i, : i + 1] = [float(value) for value in row]
    found: dict[str, Floats] = {}
    for position, (name, (slope_sd, stack_sd)) in enumerate(NULLS.items()):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((SEED, position))))
        residual = _residuals(rng, effects, lower, slope_sd, stack_sd, num)
        most = np.zeros(num)
        for upto in range(1, num_rounds + 1):
            most = np.maximum(
                most, _e_values(np.array(model.rounds), effects, means, lower, residual, upto, num_rounds)
            )
        found[name] = np.sort(most)
    return found


def _residuals(
    rng: np.random.Generator, effects: Floats, lower: Floats, slope_sd: float, stack_sd: float, num: int
) -> Floats:
    """(C, N) printed minus predicted scores. The noise is the test's covariance without its allowances for slopes and evaluation stack."""
    size, families = effects.shape
    slopes = np.clip(rng.normal(1, slope_sd, (num, families)), 0.6, 1.4)
    allowed = float(HEALTHY_SD) ** 2 * effects @ effects.T + float(SLACK_VARIANCE) * np.eye(size)
    noise = np.linalg.cholesky(lower @ lower.T - allowed)
    errors = rng.standard_normal((num, size)) @ noise.T + rng.normal(0, stack_sd, (num, size))
    return np.asarray((slopes - 1) @ effects.T + errors)


def _e_values(
    rounds: Floats, effects: Floats, means: Floats, lower: Floats, residual: Floats, upto: int, num_rounds: int
) -> Floats:
    """(C,) E from the lines of the first `upto` rounds. All families weigh the same."""
    known = rounds < upto
    if not known.any():
        return np.ones(len(residual))
    white = np.linalg.inv(lower[np.ix_(known, known)])
    e, total = (residual[:, known] @ white.T)[..., None], np.zeros(len(residual))
    for kind in KINDS:
        first = int(kind == "gain")
        if num_rounds == first:
            total += 1
            continue
        opened = np.zeros(len(residual))
        for since in range(first, upto):
            start = means[since - 1] if kind == "gain" else 0
            lost = (effects[known] - start) * (rounds[known] >= since)[:, None]
            v, u = (white @ part for part in (lost, effects[known] - lost))
            opened += bayes_factors(e, v[None], u[None]).mean(1)
        total += (opened + num_rounds - upto) / (num_rounds - first)
    return total / len(KINDS)
