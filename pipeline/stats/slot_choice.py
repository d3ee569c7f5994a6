"""Which arms to submit: first those that the caller demands, then those that reveal most about the families' slopes (Bayesian D-optimal design).

Given the scores so far, the slopes have a posterior covariance S. The prior is 0.5^2 I, and the noise of one score has a standard
deviation of 1.22 points. Scoring an arm with effects f = (w_d x_id) multiplies det S by 1 / (1 + f' S f / noise), so the next slot goes
to the arm with the largest f' S f. The numbers are decimals and ties go to the lower arm, so the choice is the same on any machine.
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
    """Choose at most `num` arms in order: those of `first`, then by D-optimality.

    `effects` maps an arm to its effects w_d x_id by family. `scored` has the effects of the arms that were scored earlier.
    """
    size = len(next(iter(effects.values()), ()))
    with exactly():
        spread = [[SLOPE_VARIANCE * int(i == j) for j in range(size)] for i in range(size)]
        for effect in scored:
            spread = _posterior(spread, effect)
        chosen: list[int] = []
        while len(chosen) < min(num, len(effects)):
            demanded = [arm for arm in first if arm in effects and arm not in chosen]
            left = demanded[:1] or [arm for arm in sorted(effects) if arm not in chosen]
            best = max(left, key=lambda arm: (_uncertainty(spread, effects[arm]), -arm))
            chosen.append(best)
            spread = _posterior(spread, effects[best])
        return chosen


def _uncertainty(spread: Matrix, effect: Sequence[Decimal]) -> Decimal:
    """f' S f, the variance of the arm's predicted score."""
    return dot(effect, [dot(row, effect) for row in spread])


def _posterior(spread: Matrix, effect: Sequence[Decimal]) -> Matrix:
    """The posterior covariance after one more score (Sherman-Morrison)."""
    along = [dot(row, effect) for row in spread]
    scale = SCORE_VARIANCE + dot(effect, along)
    return [
        [value - a * b / scale for value, b in zip(row, along, strict=True)]
        for row, a in zip(spread, along, strict=True)
    ]
