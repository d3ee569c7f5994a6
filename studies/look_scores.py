"""What the tests say of many campaigns at one look, as arrays: scores, the levels at which they would alarm, and the alarms.

Shapes: C campaigns, F families.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from scipy.special import ndtr, ndtri

from pipeline.stats.alarms import NAMED
from pipeline.stats.overfit_test import MEAN_SHARE
from pipeline.stats.shift_test import GUARD
from studies.simulated import Flags, Floats, Ints


@dataclass(frozen=True)
class LookScores:
    """Standardised scores of one look. A gap of less than two points scores minus infinity, because it can never alarm."""

    shares: Floats  # (C, F) of the level, by headroom
    gap_scores: Floats  # (C, F) the largest over the rounds in which the gap may have begun
    mean_scores: Floats  # (C,) of the mean gap over families
    arm_scores: Floats  # (C, F) the largest over arms
    e_value: Floats  # (C,) of the board test
    carried: Floats  # (C, F) how much of E each family carries
    leak_scores: Floats  # (C,)

    def gap(self, level: float) -> Flags:
        """(C, F) gap alarms. If the mean gap over families is too large, all families of the campaign alarm."""
        mean = self.mean_scores > _quantile(np.asarray(level * float(MEAN_SHARE)))
        return np.asarray((self.gap_scores > _quantile(level * float(1 - MEAN_SHARE) * self.shares)) | mean[:, None])

    def arm(self, level: float) -> Flags:
        """(C, F) alarms of single arms against the others of their round."""
        return np.asarray(self.arm_scores > _quantile(level * self.shares))

    def board(self, value: Decimal) -> Flags:
        """(C,) campaigns whose E exceeds the critical value."""
        return np.asarray(self.e_value > float(value) * (1 + float(GUARD)))

    def leak(self, level: float) -> Flags:
        """(C,) leak alarms."""
        return np.asarray(self.leak_scores > _quantile(np.asarray(level)))

    def named(self) -> Ints:
        """(C,) the number of the family that carries half of E, -1 where no family does."""
        best = self.carried.argmax(1)
        enough = self.carried.max(1) >= float(NAMED) * self.e_value
        return np.where(enough, best, -1)

    def gap_level(self) -> Floats:
        """(C,) the level at which the gap test would just alarm."""
        alone = _level_of_shares(self.gap_scores, float(1 - MEAN_SHARE) * self.shares)
        return np.minimum(alone, ndtr(-self.mean_scores) / float(MEAN_SHARE))

    def arm_level(self) -> Floats:
        """(C,) the level at which the arm test would just alarm."""
        return _level_of_shares(self.arm_scores, self.shares)

    def leak_level(self) -> Floats:
        """(C,) the level at which the leak test would just alarm."""
        return np.asarray(ndtr(-self.leak_scores))


def _level_of_shares(scores: Floats, shares: Floats) -> Floats:
    """(C,) the least tail probability over families, each divided by the family's share of the level."""
    return np.asarray((ndtr(-scores) / shares).min(1))


def _quantile(level: Floats) -> Floats:
    """Upper normal quantiles, rounded up to 0.0001 as decimal_math.upper_quantile rounds them."""
    return np.asarray(np.ceil(-ndtri(np.minimum(level, 0.5)) * 10000 - 1e-9) / 10000)
