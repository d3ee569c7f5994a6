"""Test the power card: a gap of the size that it names is found in four of five cases."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import norm

from pipeline.stats import power
from pipeline.stats.critical_values import bounds
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.difficulty import HEALTHY_SD
from pipeline.stats.overfit_test import ALL, FamilyCounts, GapTest, shares
from tests.stats.test_shift_test import board_rounds

CRITICAL = CriticalValues.from_json(bounds(Design()))


def test_a_gap_of_that_size_is_found_with_80_percent():
    variance, level = Fraction(1, 1600), Fraction(1, 500)
    size = float(power.detectable(GapTest("roman", 0, None, Fraction(0), variance), level))
    draws = np.random.default_rng(3).normal(size, float(variance) ** 0.5, 4000)
    found = sum(GapTest("roman", 0, None, Fraction(draw), variance).exceeds(level) for draw in draws)
    assert found / len(draws) == pytest.approx(0.8, abs=0.02)
    assert size == pytest.approx((norm.isf(0.002) + norm.isf(0.2)) * 0.025, rel=1e-4)


def test_the_card_has_every_family_their_mean_and_the_thresholds():
    design, boards, portions, _ = board_rounds(3)
    looks = {family: [FamilyCounts(each.dev[i], each.fresh[i]) for each in boards] for i, family in enumerate(portions)}
    weights = shares({family: (each[0].dev.reference, each[0].dev.num_items) for family, each in looks.items()})
    card = power.power_card(looks, weights, boards, design, CRITICAL)
    assert set(card.gap_now) == set(card.gap_since_first) == {*portions, ALL}
    assert all(card.gap_since_first[family] <= card.gap_now[family] for family in card.gap_now)
    assert card.threshold_total is not None and card.threshold_family is not None
    assert card.threshold_family > card.threshold_total
    without = power.power_card(looks, weights, boards, Design(board_rows=0, submissions=0), CRITICAL)
    assert (without.threshold_total, without.threshold_family) == (None, None)


def test_a_threshold_is_where_the_interval_of_the_board_lift_reaches_zero():
    design, boards, portions, _ = board_rounds(4)
    total, single = power.thresholds(boards, design)
    weight, s2 = Decimal(1) / len(portions), HEALTHY_SD**2
    z2 = Decimal("1.96") ** 2
    noise_total = total**2 / z2 - s2 * weight * total**2
    noise_single = (weight * single) ** 2 / z2 - s2 * (weight * single) ** 2
    assert float(noise_total) == pytest.approx(float(noise_single), rel=1e-3)  # the same score's noise
