"""The power card: how large a gap this campaign would have detected. It is printed beside every "no alarm".

The absence of an alarm means little without it: with 300 dev and 300 fresh items, a gap in one family must be about 8 points to be
detected with 80 % probability. All numbers are decimals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pipeline.stats.decimal_math import decimal_of, density, exactly, upper_quantile
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.difficulty import HEALTHY_SD, PRINT_VARIANCE, on_probits
from pipeline.stats.overfit_test import ALL, LEAST_GAP, FamilyCounts, GapTest, family_tests, mean_tests, portion
from pipeline.stats.shift_test import SLACK_VARIANCE, BoardRound, board_target, hidden_variance, item_noise

POWER_LEVEL = Fraction(1, 5)
THRESHOLD_LEVEL = Fraction(1, 40)  # two-sided 95 %


@dataclass(frozen=True)
class PowerCard:
    """Differences of accuracies (0.08 is 8 points), by family.

    `gap_now` is the detectable gap if it began in this round, `gap_since_first` the detectable gap if it began in the first round. The
    thresholds are None without an external target.
    """

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
    """Compute the card. `looks` maps a family to its rounds so far, `portions` a family to its share of the level (overfit_test.shares)."""
    now, first = {}, {}
    by_family = {family: family_tests(family, rounds) for family, rounds in looks.items()}
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
    """The gap that this test detects with 80 % probability. In one family it is at least LEAST_GAP, below which there is no alarm."""
    with exactly():
        size = (upper_quantile(level) + upper_quantile(POWER_LEVEL)) * decimal_of(test.variance).sqrt()
        return size if test.family == ALL else max(size, decimal_of(LEAST_GAP))


def thresholds(boards: Sequence[BoardRound], design: Design) -> tuple[Decimal, Decimal]:
    """Surrogate threshold effects (Burzykowski and Buyse 2006), for a gain in all families and for a gain in one family.

    Each is the smallest dev gain x of an arm that predicts a higher board score: x = 1.96 sd(board lift | dev gain x). The standard
    deviation grows with x, because the slopes vary: x^2 (1 - 1.96^2 s^2) = 1.96^2 noise, where s is the standard deviation of a slope,
    divided by sqrt F for a gain in all F families.
    """
    families, target = len(boards[0].dev), board_target(boards, design)
    with exactly():
        weight = 1 / Decimal(families)
        noise = PRINT_VARIANCE * 3 / 2 + SLACK_VARIANCE
        for family in range(families):
            own, shared = item_noise(boards, family)
            sets = (boards[-1].dev[family], boards[-1].fresh[family])
            lifts = density(target.levels[family]) ** 2 / sum(on_probits(counts).information for counts in sets)
            noise += weight**2 * (own + shared) * (hidden_variance(target, family, weight * design.board_rows) + lifts)
        quantile = upper_quantile(THRESHOLD_LEVEL)
        spread = quantile**2 * HEALTHY_SD**2
        total = quantile * (noise / (1 - spread * weight)).sqrt()
        single = quantile * (noise / (1 - spread)).sqrt() / weight
        return total, single
