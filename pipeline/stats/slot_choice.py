"""Which arms to submit: the winner first, then those that tell most about the families' slopes (Bayesian D-optimal design).

Given what was scored so far, the slopes have a posterior covariance S (prior 0.5^2 I, noise of one score 1.22 points). Scoring an arm
with effects f = (w_d x_id) multiplies det S by 1 / (1 + f' S f / noise), so the next slot goes to the largest f' S f. Decimals,
ties to the lower arm: the same choice anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from pipeline.stats.decimal_math import Matrix, dot, exactly

SLOPE_VARIANCE = Decimal("0.25")
SCORE_VARIANCE = Decimal("0.00015")


def choose_slots(
    effects: Mapping[int, Sequence[Decimal]], scored: Sequence[Sequence[Decimal]], first: Sequence[int], num: int
) -> list[int]:
    """Arms to submit, at most `num`: those of `first`, then D-optimal. effects: arm -> w_d x_id; scored: those of earlier scores."""
    size = len(next(iter(effects.values()), ()))
    with exactly():
        spread = [[SLOPE_VARIANCE * int(i == j) for j in range(size)] for i in range(size)]
        for effect in scored:
            spread = _told(spread, effect)
        chosen: list[int] = []
        while len(chosen) < min(num, len(effects)):
            named = [arm for arm in first if arm in effects and arm not in chosen]
            left = named[:1] or [arm for arm in sorted(effects) if arm not in chosen]
            best = max(left, key=lambda arm: (_uncertainty(spread, effects[arm]), -arm))
            chosen.append(best)
            spread = _told(spread, effects[best])
        return chosen


def _uncertainty(spread: Matrix, effect: Sequence[Decimal]) -> Decimal:
    return dot(effect, [dot(row, effect) for row in spread])


def _told(spread: Matrix, effect: Sequence[Decimal]) -> Matrix:
    """Posterior covariance after one more score (Sherman-Morrison)."""
    along = [dot(row, effect) for row in spread]
    scale = SCORE_VARIANCE + dot(effect, along)
    return [
        [value - a * b / scale for value, b in zip(row, along, strict=True)]
        for row, a in zip(spread, along, strict=True)
    ]
