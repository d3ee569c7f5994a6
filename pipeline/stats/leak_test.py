"""The leak test (C3): do board scores run ahead of fresh items? If they do, the board itself has been learned and is no target any more.

For each round it takes the residual of the provisional winner: its printed lift minus the lift that its fresh items predict
at the reference's level on the board (pipeline.stats.difficulty). The
winner must not have been chosen by board or fresh scores, so it is the arm that is ahead on dev. Generalised least squares fits a
constant shift from round c on, as in `overfit_test`. There is an alarm where, for some c, the standardised shift exceeds the normal
quantile of `level`. The power is .2 to .5 at four rounds (docs/evidence.md), so the absence of an alarm says little. All numbers are decimals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pipeline.stats.decimal_math import cholesky, density, dot, exactly, upper_quantile, whiten
from pipeline.stats.design import Design
from pipeline.stats.difficulty import PRINT_VARIANCE, on_probits
from pipeline.stats.shift_test import (
    SLACK_VARIANCE,
    BoardRound,
    board_target,
    hidden_variance,
    item_noise,
    slope_covariance,
)


@dataclass(frozen=True)
class LeakTest:
    """The standardised shifts, one for each round with a scored winner, in which the board may have begun to run ahead."""

    scores: tuple[Decimal, ...]

    def exceeds(self, level: Fraction) -> bool:
        """Whether some shift exceeds the one-sided normal quantile of `level`."""
        return any(score > upper_quantile(level) for score in self.scores)


def leak_test(rounds: Sequence[BoardRound], winners: Sequence[int | None], design: Design) -> LeakTest:
    """Compute the shifts. `winners` has, for each round, the position of the arm that is ahead on dev, or None."""
    pairs = [(data, arm) for data, arm in zip(rounds, winners, strict=True) if arm is not None and arm in data.scores]
    if not pairs:
        return LeakTest(())
    families, target = range(len(rounds[0].dev)), board_target(rounds, design)
    with exactly():
        weight = 1 / Decimal(len(families))
        hidden = [hidden_variance(target, d, weight * design.board_rows) for d in families]
        noise = [item_noise(rounds, family) for family in families]
        effects = [
            [weight * target.lift(d, on_probits(data.fresh[d]).effects[arm]) for d in families] for data, arm in pairs
        ]
        residual = [
            data.scores[arm] - sum(effect, Decimal(0)) for (data, arm), effect in zip(pairs, effects, strict=True)
        ]
        common = PRINT_VARIANCE / 2 + sum((weight**2 * noise[d][1] * hidden[d] for d in families), Decimal(0))
        covariance = [[common + value for value in row] for row in slope_covariance(effects, target)]
        for i, (data, _) in enumerate(pairs):
            covariance[i][i] += PRINT_VARIANCE + SLACK_VARIANCE
            for d, (own, shared) in enumerate(noise):
                fresh = density(target.levels[d]) ** 2 / on_probits(data.fresh[d]).information
                covariance[i][i] += weight**2 * (own * hidden[d] + (own + shared) * fresh)
        lower = cholesky(covariance)
        e = whiten(lower, residual)
        scores = []
        for since in range(len(pairs)):
            ahead = whiten(lower, [Decimal(int(i >= since)) for i in range(len(pairs))])
            scores.append(dot(ahead, e) / dot(ahead, ahead).sqrt())
        return LeakTest(tuple(scores))
