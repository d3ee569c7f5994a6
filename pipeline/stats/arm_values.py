"""What each arm is worth: its shrunk lifts, weighted with how far each family still counts, plus what the board adds.

The value is never the largest dev score: of eight equal models, the best seems 3 points better than it is at 300 items. An arm's value is

    sum_d w_d s_d x_id  +  k_i (residual_i - mean residual)

Here x_id is the lift that the arm's effect in family d is worth on the target (pipeline.stats.difficulty), or on fresh items where there is
no target. It is the sum of the round's mean, taken from dev, whose items are the same in every round, and the arm's shrunk deviation from
it, taken from dev and fresh pooled. Where dev is not permitted, both come from fresh alone. The factor s_d = 1 - P(d stopped), at a prior
of 0.4. The second term exists for arms with a board score: the residual is the printed score minus the first term, and k_i is the share of
the doubt that the score resolves. Subtracting the mean removes what all scores of a round have in common, because two evaluation stacks
differ in their level. Values are decimals, as differences of accuracies (0.0322 is 3.22 points).

Which arms to submit (`submissions`): first those that the caller demands, then those that reveal most about the families' slopes (Bayesian
D-optimal design). Given the scores so far, the slopes have a posterior covariance S. The prior is 0.5^2 I, and the noise of one score has a
standard deviation of 1.22 points. Scoring an arm with effects f = (w_d x_id) multiplies det S by 1 / (1 + f' S f / noise), so the next
slot goes to the arm with the largest f' S f. Ties go to the lower arm, so the choice is the same on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache

from pipeline.stats.alarms import RoundCounts, Verdict, board_rounds
from pipeline.stats.counts import Counts
from pipeline.stats.decimal_math import Matrix, dot, exactly
from pipeline.stats.design import Design
from pipeline.stats.difficulty import HEALTHY_SD, PRINT_VARIANCE, Target, fresh_target, on_probits
from pipeline.stats.shift_test import board_target, hidden_variance, item_noise, shrunk

SLOPE_VARIANCE = Decimal("0.25")
SCORE_VARIANCE = Decimal("0.00015")
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
    own = [item_noise(boards, number)[0] for number in range(len(families))]
    target = board_target(boards, design) if use_board else _fresh_items(rounds, families)
    values: Values = []
    with exactly():
        weight = 1 / Decimal(len(families))
        slopes = [1 - verdict.shift_posterior(family, STOPPED_PRIOR) for family in families]
        hidden_own = Decimal(0)
        if use_board:
            rows = weight * design.board_rows
            hidden_own = sum((weight**2 * x * hidden_variance(target, d, rows) for d, x in enumerate(own)), Decimal(0))
        for counts in rounds:
            effects, left = _effects(counts, families, target, own, dev_permitted, dev_level=True)
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
    """The positions of at most `num` arms of the newest round to submit: those of `first`, then by D-optimality."""
    families = sorted(rounds[-1].dev)
    boards = board_rounds(rounds)
    own = [item_noise(boards, number)[0] for number in range(len(families))]
    target, permitted = _fresh_items(rounds, families), dict.fromkeys(families, True)
    earlier: list[list[Decimal]] = []
    for counts in rounds[:-1]:
        if counts.scores:
            effects, _ = _effects(counts, families, target, own, permitted, dev_level=False)
            earlier += [effects[arm] for arm in sorted(counts.scores)]
    newest, _ = _effects(rounds[-1], families, target, own, permitted, dev_level=False)
    return choose_slots(dict(enumerate(newest)), earlier, first, num)


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


def _fresh_items(rounds: Sequence[RoundCounts], families: Sequence[str]) -> Target:
    return fresh_target([[counts.fresh[family] for counts in rounds] for family in families])


def _effects(
    counts: RoundCounts,
    families: Sequence[str],
    target: Target,
    own: Sequence[Decimal],
    dev_permitted: Mapping[str, bool],
    dev_level: bool,
) -> tuple[list[list[Decimal]], Decimal]:
    """The effects w_d x_id by arm and family, and the variance that is left in an arm's sum.

    With `dev_level`, the round's mean lift is taken from dev where dev is permitted. `own` has the first number of `item_noise`, by family.
    """
    columns, left = [], Decimal(0)
    with exactly():
        weight = 1 / Decimal(len(families))
        for number, (family, noise) in enumerate(zip(families, own, strict=True)):
            dev, fresh = counts.dev[family], counts.fresh[family]
            lifts, level, variance = shrunk(dev, fresh, target, number, noise, dev_permitted[family])
            shift = Decimal(0)
            if dev_level and dev_permitted[family]:
                shift = _mean_on_dev(dev, target, number) - level
            columns.append([weight * (lift + shift) for lift in lifts])
            left += weight**2 * variance
        return [list(row) for row in zip(*columns, strict=True)], left


@lru_cache(maxsize=4096)
def _mean_on_dev(dev: Counts, target: Target, family: int) -> Decimal:
    """The mean of what the arms' effects on dev are worth on the target."""
    with exactly():
        lifts = [target.lift(family, effect) for effect in on_probits(dev).effects]
        return sum(lifts, Decimal(0)) / len(lifts)


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
