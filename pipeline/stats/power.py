"""The power card: what this campaign would have seen, printed beside every "no alarm". Decimals.

A silent test means little without it: at 300 + 300 items a gap in one family must be about 8 points to be seen with 80 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pipeline.stats.decimal_math import decimal_of, exactly, upper_quantile
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.overfit_test import ALL, LEAST_GAP, FamilyCounts, GapTest, family_tests, mean_tests, portion
from pipeline.stats.shift_test import HEALTHY_SD, PRINT_VARIANCE, SLACK_VARIANCE, BoardRound, item_noise

POWER_LEVEL = Fraction(1, 5)
THRESHOLD_LEVEL = Fraction(1, 40)  # two-sided 95 %


@dataclass(frozen=True)
class PowerCard:
    """Accuracies (0.08 = 8 points). `gap_now`: a gap that began in this round, `gap_since_first`: one that was there all along."""

    gap_now: Mapping[str, Decimal]
    gap_since_first: Mapping[str, Decimal]
    threshold_total: Decimal | None  # surrogate threshold effect: a dev gain of all families that predicts a board move
    threshold_family: Decimal | None  # the same gain in one family alone


def power_card(
    looks: Mapping[str, Sequence[FamilyCounts]],
    portions: Mapping[str, Fraction],
    boards: Sequence[BoardRound],
    design: Design,
    critical: CriticalValues,
) -> PowerCard:
    """looks: family -> its rounds so far; portions: the families' weights (gaptest.shares)."""
    now, first = {}, {}
    by_family = {family: family_tests(family, each) for family, each in looks.items()}
    if len(looks) > 1:
        by_family[ALL] = mean_tests([*looks.values()])
    for family, tests in by_family.items():
        level = min(critical.gap_level * portion(family, portions), Fraction(1, 2))
        now[family] = detectable(tests[-1], level)
        first[family] = detectable(tests[0], level)
    if not (design.board_rows and design.submissions):
        return PowerCard(now, first, None, None)
    total, single = thresholds(boards, design)
    return PowerCard(now, first, total, single)


def detectable(test: GapTest, level: Fraction) -> Decimal:
    """The gap that this test finds with 80 %, and never less than what it must be to count."""
    with exactly():
        size = (upper_quantile(level) + upper_quantile(POWER_LEVEL)) * decimal_of(test.variance).sqrt()
        return size if test.family == ALL else max(size, decimal_of(LEAST_GAP))


def thresholds(boards: Sequence[BoardRound], design: Design) -> tuple[Decimal, Decimal]:
    """Surrogate threshold effects (Burzykowski and Buyse 2006): x with x = 1.96 sd(board lift | dev gain x), for one arm's score.

    The slopes' spread grows with x, so that x^2 (1 - 1.96^2 s^2) = 1.96^2 noise, s the slope's sd (over all families: / sqrt F).
    """
    families = len(boards[0].dev)
    with exactly():
        weight = 1 / Decimal(families)
        hidden = weight * design.board_rows
        noise = PRINT_VARIANCE * 3 / 2 + SLACK_VARIANCE
        for family in range(families):
            own, shared = item_noise(boards, family)
            items = boards[-1].dev[family].num_items + boards[-1].fresh[family].num_items
            noise += weight**2 * (own + shared) * (1 / hidden + 1 / Decimal(items))
        quantile = upper_quantile(THRESHOLD_LEVEL)
        spread = quantile**2 * HEALTHY_SD**2
        total = quantile * (noise / (1 - spread * weight)).sqrt()
        single = quantile * (noise / (1 - spread)).sqrt() / weight
        return total, single
