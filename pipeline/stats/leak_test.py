"""The leak test (C3): do board scores run ahead of fresh items? If they do, the board itself has been learned and is no target any more.

For each round it takes the residual of the provisional winner: its printed lift minus the lift that its fresh items predict. The
winner must not have been chosen by board or fresh scores, so it is the arm that is ahead on dev. Generalised least squares fits a
constant shift from round c on, as in `overfit_test`. There is an alarm where, for some c, the standardised shift exceeds the normal
quantile of `level`. The power is .2 to .5 at four rounds (docs/evidence.md), so the absence of an alarm says little. All numbers are decimals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pipeline.stats.decimal_math import Matrix, cholesky, decimal_of, dot, exactly, upper_quantile, whiten
from pipeline.stats.design import Design
from pipeline.stats.shift_test import HEALTHY_SD, PRINT_VARIANCE, SLACK_VARIANCE, BoardRound, item_noise


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
    families = range(len(rounds[0].dev))
    with exactly():
        weight = 1 / Decimal(len(families))
        hidden = weight * design.board_rows
        noise = [item_noise(rounds, family) for family in families]
        effects = [[weight * decimal_of(data.fresh[d].arm_lifts()[arm]) for d in families] for data, arm in pairs]
        residual = [
            data.scores[arm] - sum(effect, Decimal(0)) for (data, arm), effect in zip(pairs, effects, strict=True)
        ]
        common = PRINT_VARIANCE / 2 + sum((weight**2 * shared / hidden for _, shared in noise), Decimal(0))
        covariance: Matrix = []
        for i, (data, _) in enumerate(pairs):
            row = [common + HEALTHY_SD**2 * dot(effects[i], other) for other in effects]
            row[i] += PRINT_VARIANCE + SLACK_VARIANCE
            for d, (own, shared) in enumerate(noise):
                row[i] += weight**2 * (own / hidden + (own + shared) / data.fresh[d].num_items)
            covariance.append(row)
        lower = cholesky(covariance)
        e = whiten(lower, residual)
        scores = []
        for since in range(len(pairs)):
            ahead = whiten(lower, [Decimal(int(i >= since)) for i in range(len(pairs))])
            scores.append(dot(ahead, e) / dot(ahead, ahead).sqrt())
        return LeakTest(tuple(scores))
