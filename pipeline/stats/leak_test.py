"""C3, the leak test: does the board run ahead of fresh items? Then the board itself has been learned, and is no target. Decimals.

Residual of a round's provisional winner: its printed lift minus what its own fresh items predict. The winner must not have been chosen by
board or fresh score, so it is the one that is ahead on dev. A constant shift from round c on is fitted by generalised least
squares, as in `gaptest`; alarm where some c has its standardised shift above the normal quantile of `level`. Power is .2 to .5 at
four rounds (docs/evidence.md): a silent leak test says little.
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
    """Standardised shifts, one for each round (of those with a scored winner) from which the board may be ahead."""

    scores: tuple[Decimal, ...]

    def exceeds(self, level: Fraction) -> bool:
        return any(score > upper_quantile(level) for score in self.scores)


def leak_test(rounds: Sequence[BoardRound], winners: Sequence[int | None], design: Design) -> LeakTest:
    """winners: of each round the arm ahead on dev, None where it was not scored."""
    pairs = [(seen, arm) for seen, arm in zip(rounds, winners, strict=True) if arm is not None and arm in seen.scores]
    if not pairs:
        return LeakTest(())
    families = range(len(rounds[0].dev))
    with exactly():
        weight = 1 / Decimal(len(families))
        hidden = weight * design.board_rows
        noise = [item_noise(rounds, family) for family in families]
        effects = [[weight * decimal_of(seen.fresh[d].arm_lifts()[arm]) for d in families] for seen, arm in pairs]
        residual = [
            seen.scores[arm] - sum(effect, Decimal(0)) for (seen, arm), effect in zip(pairs, effects, strict=True)
        ]
        common = PRINT_VARIANCE / 2 + sum((weight**2 * shared / hidden for _, shared in noise), Decimal(0))
        covariance: Matrix = []
        for i, (seen, _) in enumerate(pairs):
            row = [common + HEALTHY_SD**2 * dot(effects[i], other) for other in effects]
            row[i] += PRINT_VARIANCE + SLACK_VARIANCE
            for d, (own, shared) in enumerate(noise):
                row[i] += weight**2 * (own / hidden + (own + shared) / seen.fresh[d].num_items)
            covariance.append(row)
        lower = cholesky(covariance)
        e = whiten(lower, residual)
        scores = []
        for since in range(len(pairs)):
            ahead = whiten(lower, [Decimal(int(i >= since)) for i in range(len(pairs))])
            scores.append(dot(ahead, e) / dot(ahead, ahead).sqrt())
        return LeakTest(tuple(scores))
