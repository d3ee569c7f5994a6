"""Who is best: shrunk lifts, weighted with how far each family still counts, and what the board adds. Decimals, no float.

Never the largest dev score: of eight equal models the best one overstates itself by 3 points at 300 items. An arm's value is

    sum_d w_d s_d x_id  +  k_i (residual_i - mean residual)

with x_id its lift in family d: the round's mean (on dev, whose items are the same in every round) and the arm's shrunk deviation from it
(dev and fresh pooled), both from fresh alone where dev is not permitted; s_d = 1 - P(d stopped) at a prior of 0.4; and for arms with
a board score the centred difference to what was printed, by the share k_i of doubt that the score resolves. Centring leaves out what
all of a round's scores have in common: levels of two evaluation stacks differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from pipeline.stats.alarms import RoundCounts, Verdict, board_rounds
from pipeline.stats.decimal_math import decimal_of, dot, exactly
from pipeline.stats.design import Design
from pipeline.stats.shift_test import HEALTHY_SD, PRINT_VARIANCE, item_noise, shrunk
from pipeline.stats.slot_choice import choose_slots

STOPPED_PRIOR = Decimal("0.4")
"""For choosing, not for a verdict: simulated, 0.1 to 0.4 cost nothing in healthy worlds and gain up to 0.06 points under shift."""
Values = list[dict[int, Decimal]]
"""Of each round, arm position -> value."""


def arm_values(
    rounds: Sequence[RoundCounts],
    verdict: Verdict,
    dev_permitted: Mapping[str, bool],
    design: Design,
    use_board: bool = True,
) -> Values:
    """Of every arm of every round, by the newest verdict. use_board=False: EXTERNAL-SUSPECT, or no target."""
    families = sorted(rounds[-1].dev)
    boards = board_rounds(rounds)
    noise = [item_noise(boards, number) for number in range(len(families))]
    values: Values = []
    with exactly():
        weight = 1 / Decimal(len(families))
        slopes = [1 - verdict.shift_posterior(family, STOPPED_PRIOR) for family in families]
        hidden_own = (
            weight**2 * sum((own for own, _ in noise), Decimal(0)) / (weight * design.board_rows)
            if use_board
            else Decimal(0)
        )
        for seen in rounds:
            effects, left = _effects(seen, families, [own for own, _ in noise], dev_permitted, dev_level=True)
            weighted = [[slope * value for slope, value in zip(slopes, each, strict=True)] for each in effects]
            found = {arm: sum(each, Decimal(0)) for arm, each in enumerate(weighted)}
            scored = sorted(seen.scores) if use_board else []
            if len(scored) > 1:
                residual = {arm: seen.scores[arm] - found[arm] for arm in scored}
                centre = sum(residual.values(), Decimal(0)) / len(scored)
                means = [sum(column, Decimal(0)) / len(weighted) for column in zip(*weighted, strict=True)]
                for arm in scored:
                    around = [value - mean for value, mean in zip(weighted[arm], means, strict=True)]
                    doubt = left + HEALTHY_SD**2 * dot(around, around)
                    found[arm] += doubt / (doubt + PRINT_VARIANCE + hidden_own) * (residual[arm] - centre)
            values.append(found)
    return values


def submissions(rounds: Sequence[RoundCounts], design: Design, first: Sequence[int], num: int) -> list[int]:
    """Arm positions of the newest round to score: `first` (the provisional winner, contrasts that a state demands), then D-optimal."""
    families = sorted(rounds[-1].dev)
    boards = board_rounds(rounds)
    own = [item_noise(boards, number)[0] for number in range(len(families))]
    permitted = dict.fromkeys(families, True)
    earlier = [
        _effects(seen, families, own, permitted, dev_level=False)[0][arm]
        for seen in rounds[:-1]
        for arm in sorted(seen.scores)
    ]
    newest, _ = _effects(rounds[-1], families, own, permitted, dev_level=False)
    return choose_slots(dict(enumerate(newest)), earlier, first, num)


def _effects(
    seen: RoundCounts,
    families: Sequence[str],
    own: Sequence[Decimal],
    dev_permitted: Mapping[str, bool],
    dev_level: bool,
) -> tuple[list[list[Decimal]], Decimal]:
    """Of each arm w_d x_id by family, and the variance that is left in their sum. dev_level: the round's mean as dev has it."""
    columns, left = [], Decimal(0)
    with exactly():
        weight = 1 / Decimal(len(families))
        for family, variance in zip(families, own, strict=True):
            dev, fresh = seen.dev[family], seen.fresh[family]
            lifts, mean, kept = shrunk(dev, fresh, variance, dev_permitted[family])
            level = decimal_of(dev.mean_lift) if dev_level and dev_permitted[family] else mean
            columns.append([weight * (level + lift - mean) for lift in lifts])
            items = fresh.num_items + dev.num_items * int(dev_permitted[family])
            left += weight**2 * kept * variance / items
        return [list(row) for row in zip(*columns, strict=True)], left
