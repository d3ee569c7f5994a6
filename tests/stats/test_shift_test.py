"""Test the board test, the leak test and the choice of slots against scipy's multivariate normal and plain numpy."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from pipeline.stats import alarms, arm_values, difficulty, leak_test, shift_test
from pipeline.stats.critical_values import bounds
from pipeline.stats.decimal_math import decimal_of
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.difficulty import on_probits
from tests.support.ledgers import exact_rounds, ledger

STOPPED = float(shift_test.STOPPED_SD) ** 2


def board_rounds(seed: int) -> tuple[Design, list[shift_test.BoardRound], dict[str, Fraction], list[int | None]]:
    """A random campaign with at least two families and two submissions a round."""
    rng = np.random.default_rng(seed)
    while True:
        design, rounds = ledger(rng)
        if design.families > 1 and design.submissions > 1:
            break
    seen = exact_rounds(rounds)
    families = sorted(seen[0].dev)
    boards = [
        shift_test.BoardRound(
            tuple(each.dev[f] for f in families),
            tuple(each.fresh[f] for f in families),
            each.scores,
            each.reference_score,
        )
        for each in seen
    ]
    return design, boards, {family: Fraction(1, len(families)) for family in families}, [each.ahead for each in seen]


def plain(model: shift_test.BoardModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, F) effects, (N,) residual and (N, N) covariance of the healthy model, as arrays."""
    size = len(model.rounds)
    lower = np.zeros((size, size))
    for i, row in enumerate(model.lower):
        lower[i, : i + 1] = [float(value) for value in row]
    effects = np.array([[float(value) for value in row] for row in model.effects])
    return effects, lower @ np.array([float(value) for value in model.residual]), lower @ lower.T


@pytest.mark.parametrize("seed", range(4))
def test_bayes_factors_are_ratios_of_normal_densities(seed):
    design, boards, _, _ = board_rounds(seed)
    model = shift_test.healthy_model(boards, design.families, design)
    effects, residual, covariance = plain(model)
    rounds, means = np.array(model.rounds), np.array([[float(v) for v in row] for row in model.means])
    healthy = multivariate_normal(np.zeros(len(rounds)), covariance).logpdf(residual)
    for family in range(design.families):
        slope = float(model.slopes[family])
        assert slope >= float(difficulty.HEALTHY_SD) ** 2
        for kind in shift_test.KINDS:
            for since in range(int(kind == "gain"), len(boards)):
                start = means[since - 1, family] if kind == "gain" else 0
                lost = (effects[:, family] - start) * (rounds >= since)
                kept = effects[:, family] - lost
                other = covariance - slope * np.outer(effects[:, family], effects[:, family])
                other = other + slope * np.outer(kept, kept) + STOPPED * np.outer(lost, lost)
                expected = np.exp(multivariate_normal(-lost, other).logpdf(residual) - healthy)
                assert float(shift_test.bayes_factor(model, family, since, kind)) == pytest.approx(expected, rel=1e-8)


def test_e_is_the_mean_of_all_factors_and_one_where_nothing_was_scored():
    design, boards, shares, _ = board_rounds(7)
    found = shift_test.board_test(boards, shares, design)
    model = shift_test.healthy_model(boards, design.families, design)
    total = 0.0
    for family in range(design.families):
        level = [float(shift_test.bayes_factor(model, family, since, "level")) for since in range(len(boards))]
        gain = [float(shift_test.bayes_factor(model, family, since, "gain")) for since in range(1, len(boards))]
        ahead = design.rounds - len(boards)
        total += (
            ((sum(level) + ahead) / design.rounds + (sum(gain) + ahead) / (design.rounds - 1)) / 2 / design.families
        )
    assert float(found.e_value) == pytest.approx(total, rel=1e-12)
    assert float(sum(found.posteriors.values())) == pytest.approx(1)
    silent = shift_test.board_test([replace(each, scores={}) for each in boards], shares, design)
    assert (silent.e_value, silent.carried) == (1, {family: decimal_of(share) for family, share in shares.items()})


def test_near_its_critical_value_e_is_no_alarm_and_flagged():
    found = shift_test.BoardTest(Decimal("4.0000001"), {"roman": Decimal(4)})
    assert not found.exceeds(Decimal(4)) and found.is_near(Decimal(4))
    assert found.exceeds(Decimal("3.9")) and not found.is_near(Decimal("3.9"))


def test_shrinkage_keeps_the_order_and_the_mean():
    design, boards, _, _ = board_rounds(2)
    dev, fresh, target = boards[0].dev[0], boards[0].fresh[0], shift_test.board_target(boards, design)
    noise, _ = shift_test.item_noise(boards, 0)
    values, mean, left = shift_test.shrunk(dev, fresh, target, 0, noise)
    a, b = on_probits(dev), on_probits(fresh)
    pooled = [(x * a.information + y * b.information) / (a.information + b.information)
              for x, y in zip(a.effects, b.effects, strict=True)]  # fmt: skip
    raw = [float(target.lift(0, effect)) for effect in pooled]
    assert left > 0
    assert float(sum(values)) / len(values) == pytest.approx(float(mean)) == pytest.approx(sum(raw) / len(raw))
    assert sorted(range(len(raw)), key=lambda i: raw[i]) == sorted(range(len(raw)), key=lambda i: values[i])
    alone, *_ = shift_test.shrunk(dev, fresh, target, 0, noise, use_dev=False)
    assert float(sum(alone)) == pytest.approx(sum(float(target.lift(0, effect)) for effect in b.effects))


def test_the_residuals_are_printed_scores_less_what_the_boards_level_predicts():
    design, boards, _, _ = board_rounds(3)
    model, target = shift_test.healthy_model(boards, design.families, design), shift_test.board_target(boards, design)
    effects, residual, covariance = plain(model)
    printed = [float(each.scores[arm]) for each in boards for arm in sorted(each.scores)]
    assert residual == pytest.approx(np.array(printed) - effects.sum(1), abs=1e-12)
    slopes, levels = (np.array([float(value) for value in each]) for each in (target.slopes, target.levels))
    bent = effects @ levels
    by_slopes = effects * slopes @ effects.T + float(target.variance) * np.outer(bent, bent)
    rest = covariance - by_slopes
    assert np.linalg.eigvalsh(rest).min() > float(shift_test.SLACK_VARIANCE)
    assert rest - np.diag(np.diag(rest)) == pytest.approx((rest - np.diag(np.diag(rest))).T, abs=1e-15)


def test_a_board_that_runs_ahead_is_found_whatever_came_before():
    design, boards, _, ahead = board_rounds(5)
    level = Fraction(1, 1000)
    assert not leak_test.leak_test(boards, ahead, design).exceeds(level)
    leaky = [
        replace(each, scores={arm: score + Decimal("0.4") for arm, score in each.scores.items()}) for each in boards
    ]
    assert leak_test.leak_test(leaky, ahead, design).exceeds(level)
    assert leak_test.leak_test(leaky, [None] * len(boards), design).scores == ()


def test_slots_are_the_greedy_choice_of_the_smallest_determinant():
    rng = np.random.default_rng(4)
    effects = {arm: [Decimal(float(value)) for value in rng.normal(0, 0.01, 3)] for arm in range(6)}
    scored = [effects[5]]
    chosen = arm_values.choose_slots(effects, scored, [2], 4)
    assert chosen[0] == 2 and len(set(chosen)) == 4
    told = [np.array([float(value) for value in effect]) for effect in (effects[5], effects[2])]
    for arm in chosen[1:]:
        best = max(
            sorted(set(effects) - set(chosen[: chosen.index(arm)])),
            key=lambda other: information([*told, np.array([float(v) for v in effects[other]])]),
        )
        assert arm == best
        told.append(np.array([float(value) for value in effects[arm]]))


def information(effects: list[np.ndarray]) -> float:
    precision = np.eye(3) / float(arm_values.SLOPE_VARIANCE) + sum(np.outer(f, f) for f in effects) / float(
        arm_values.SCORE_VARIANCE
    )
    return float(np.linalg.slogdet(precision)[1])


def test_slots_never_exceed_the_arms_and_skip_what_is_not_there():
    effects = {arm: [Decimal(arm)] for arm in (3, 4)}
    assert arm_values.choose_slots(effects, [], [7, 4], 5) == [4, 3]
    assert arm_values.choose_slots({}, [], [1], 2) == []


def test_before_a_score_nobody_is_named():
    """E is 1 then, and its shares are the prior's: one family's can be a half, or all of it."""
    design, rounds = ledger(np.random.default_rng([0, 5097]))
    assert design.submissions == 0
    critical = CriticalValues.from_json(bounds(design) | {"board_alarm": "1", "board_suspect": "1"})
    verdict = alarms.verdict(exact_rounds(rounds)[:1], design, critical)
    assert max(verdict.board.posteriors.values()) == Decimal("0.5") and verdict.named_family is None


def test_critical_values_of_the_board_are_at_least_what_e_begins_with():
    with pytest.raises(ValueError, match="at least 1"):
        CriticalValues.from_json(bounds(Design()) | {"board_suspect": "0.9"})
