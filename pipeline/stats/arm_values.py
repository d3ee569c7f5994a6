"""What each arm is worth: its shrunk lifts, weighted with how far each family still counts, plus what the board adds.

The value is never the largest dev score: of eight equal models, the best seems 3 points better than it is at 300 items. An arm's value is

    sum_d w_d s_d x_id  +  k_i (residual_i - mean residual)

Here x_id is the arm's lift in family d. It is the sum of the round's mean, taken from dev, whose items are the same in every round, and the
arm's shrunk deviation from it, taken from dev and fresh pooled. Where dev is not permitted, both come from fresh alone. The factor
s_d = 1 - P(d stopped), at a prior of 0.4. The second term exists for arms with a board score: the residual is the printed score minus
the first term, and k_i is the share of the doubt that the score resolves. Subtracting the mean removes what all scores of a round have
in common, because two evaluation stacks differ in their level. Values are decimals, as differences of accuracies (0.0322 is 3.22 points).
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
"""This prior serves to choose arms, not to give a verdict. In simulations, priors of 0.1 to 0.4 cost nothing in healthy worlds and gain up to
0.06 points under shift."""
Values = list[dict[int, Decimal]]
"""For each round, a map from an arm's position to its value."""


def arm_values(
    rounds: Sequence[RoundCounts],
    verdict: Verdict,
    dev_permitted: Mapping[str, bool],
    design: Design,
    use_board: bool = True,
) -> Values:
    """The value of every arm of every round, by the newest verdict.

    `dev_permitted` says, for each family, whether its dev score counts. `use_board` is False without a target and where it is EXTERNAL-SUSPECT.
    """
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
        for counts in rounds:
            effects, left = _effects(counts, families, [own for own, _ in noise], dev_permitted, dev_level=True)
            weighted = [[slope * value for slope, value in zip(slopes, of_arm, strict=True)] for of_arm in effects]
            of_round = {arm: sum(of_arm, Decimal(0)) for arm, of_arm in enumerate(weighted)}
            scored = sorted(counts.scores) if use_board else []
            if len(scored) > 1:
                residual = {arm: counts.scores[arm] - of_round[arm] for arm in scored}
                centre = sum(residual.values(), Decimal(0)) / len(scored)
                means = [sum(column, Decimal(0)) / len(weighted) for column in zip(*weighted, strict=True)]
                for arm in scored:
                    around = [value - mean for value, mean in zip(weighted[arm], means, strict=True)]
                    doubt = left + HEALTHY_SD**2 * dot(around, around)
                    of_round[arm] += doubt / (doubt + PRINT_VARIANCE + hidden_own) * (residual[arm] - centre)
            values.append(of_round)
    return values


def submissions(rounds: Sequence[RoundCounts], design: Design, first: Sequence[int], num: int) -> list[int]:
    """The positions of at most `num` arms of the newest round to submit: those of `first`, then by D-optimality (`slot_choice`)."""
    families = sorted(rounds[-1].dev)
    boards = board_rounds(rounds)
    own = [item_noise(boards, number)[0] for number in range(len(families))]
    permitted = dict.fromkeys(families, True)
    earlier = [
        _effects(counts, families, own, permitted, dev_level=False)[0][arm]
        for counts in rounds[:-1]
        for arm in sorted(counts.scores)
    ]
    newest, _ = _effects(rounds[-1], families, own, permitted, dev_level=False)
    return choose_slots(dict(enumerate(newest)), earlier, first, num)


def _effects(
    counts: RoundCounts,
    families: Sequence[str],
    own: Sequence[Decimal],
    dev_permitted: Mapping[str, bool],
    dev_level: bool,
) -> tuple[list[list[Decimal]], Decimal]:
    """The effects w_d x_id by arm and family, and the variance that is left in an arm's sum.

    With `dev_level`, the round's mean lift is taken from dev where dev is permitted. `own` has the own variance for one item, by family.
    """
    columns, left = [], Decimal(0)
    with exactly():
        weight = 1 / Decimal(len(families))
        for family, variance in zip(families, own, strict=True):
            dev, fresh = counts.dev[family], counts.fresh[family]
            lifts, mean, factor = shrunk(dev, fresh, variance, dev_permitted[family])
            level = decimal_of(dev.mean_lift) if dev_level and dev_permitted[family] else mean
            columns.append([weight * (level + lift - mean) for lift in lifts])
            items = fresh.num_items + dev.num_items * int(dev_permitted[family])
            left += weight**2 * factor * variance / items
        return [list(row) for row in zip(*columns, strict=True)], left
