"""Test the claim's test: against scipy where it is Welch's, by symmetries, at its level in simulation, and with runs missing."""

import decimal
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.campaign import facts
from pipeline.campaign.errors import ConfigError
from pipeline.claims import assess_claims, student
from pipeline.claims.assess_claims import DOUBLED, FINAL_ROUND, RUNNING, claims_after
from pipeline.claims.claim_test import compare, level_of_round
from pipeline.claims.runs import AXIS, REFERENCE, STANDING, Run, of_kind
from pipeline.stats import decimal_math

RULES = facts.load_constitution()
LEVEL = Fraction(1, 20)


def run(number: int, kind: str, lift: Fraction | float, variance: Fraction = Fraction(0), overwrites=False) -> Run:
    return Run(number, f"{kind}{number}", kind, Fraction(lift), variance, overwrites)


def campaign(lifts: dict[tuple[int, str], list[float]], variance: Fraction = Fraction(0)) -> list[Run]:
    return [
        run(number, kind, Fraction(value), variance) for (number, kind), values in lifts.items() for value in values
    ]


values = st.lists(st.integers(-300, 300).map(lambda n: n / 1000), min_size=2, max_size=6)


@given(values, values)
def test_within_one_round_it_is_welch_s_test(standing, reference):
    """Two standing runs and more, two of the reference, all of one round, no item noise: nothing but Welch's t is left."""
    runs = campaign({(2, STANDING): standing, (2, REFERENCE): reference})
    found = compare(of_kind(runs, STANDING), runs, LEVEL)
    if len(set(standing)) == 1 and len(set(reference)) == 1:
        assert "no run differs" in found.not_evaluated
        return
    k, m = len(standing), len(reference)
    first, second = np.var(standing, ddof=1) / k, np.var(reference, ddof=1) / m
    degrees = (first + second) ** 2 / (first**2 / (k - 1) + second**2 / (m - 1))
    expected = stats.ttest_ind_from_stats(
        np.mean(standing),
        np.std(standing, ddof=1),
        k,
        np.mean(reference),
        np.std(reference, ddof=1),
        m,
        equal_var=False,
    )
    assert float(found.difference) / float(found.variance) ** 0.5 == pytest.approx(expected.statistic, abs=1e-6)
    if abs(degrees - round(degrees)) > 1e-9:
        assert found.degrees == min(30, max(1, int(degrees)))
    critical = float(found.quantile) * float(found.variance) ** 0.5
    if abs(float(found.difference) - critical) > 1e-9:
        assert found.is_shown == (float(found.difference) > critical)


def test_the_luck_of_a_round_s_items_counts_where_the_rounds_are_not_shared_equally():
    item = Fraction(1, 1000)
    base = {(1, REFERENCE): [0.0, 0.02], (2, AXIS): [0.0, 0.01, 0.03]}
    alone = campaign({**base, (2, STANDING): [0.05]}, 2 * item)
    shared = campaign({**base, (2, STANDING): [0.05], (2, REFERENCE): [0.01]}, 2 * item)
    for runs, weights in ((alone, (1, 1)), (shared, (Fraction(2, 3), Fraction(2, 3)))):
        found = compare(of_kind(runs, STANDING), runs, LEVEL)
        m = found.num_reference
        floor = (
            max(Fraction(np.var([0.0, 0.01, 0.03], ddof=1)), item)
            + max(Fraction(np.var([run.lift for run in of_kind(runs, REFERENCE)], ddof=1)), item) / m
        )
        unshared = sum(w**2 for w in weights) * item
        assert float(found.variance) == pytest.approx(float(floor + unshared))


@given(st.integers(1, 50), st.integers(-20, 20))
def test_only_differences_in_units_of_noise_count(scale, shift):
    lifts = {(1, REFERENCE): [0.0, 0.5], (2, AXIS): [0.0, 0.25, 1.0], (2, STANDING): [2.0], (2, REFERENCE): [0.25]}
    one = compare(of_kind(runs := campaign(lifts), STANDING), runs, LEVEL)
    moved = {at: [scale * value + shift for value in each] for at, each in lifts.items()}
    other = compare(of_kind(runs := campaign(moved), STANDING), runs, LEVEL)
    assert (other.difference, other.variance) == (scale * one.difference, scale**2 * one.variance)
    assert (other.is_shown, other.degrees, other.quantile) == (one.is_shown, one.degrees, one.quantile)
    assert other.reach == pytest.approx(scale * one.reach)


def test_an_axis_arm_that_replaces_a_standing_setting_is_no_measure_of_noise():
    runs = campaign({(1, REFERENCE): [0.0, 0.01], (2, STANDING): [0.05], (2, AXIS): [0.0, 0.01]})
    wild = [*runs, run(2, AXIS, -9, overwrites=True)]
    assert compare(of_kind(wild, STANDING), wild, LEVEL) == compare(of_kind(runs, STANDING), runs, LEVEL)


@pytest.mark.parametrize(
    ("lifts", "why"),
    [
        ({(1, REFERENCE): [0.0, 0.1], (2, AXIS): [0.0, 0.1]}, "the standing recipe has no scored run$"),
        (
            {(1, REFERENCE): [0.0], (2, AXIS): [0.0, 0.1], (2, STANDING): [0.1]},
            "1 scored run beside the reference adapter, and two are needed",
        ),
        ({(2, AXIS): [0.0, 0.1], (2, STANDING): [0.1]}, "0 scored run"),
        ({(1, REFERENCE): [0.0, 0.1], (1, AXIS): [0.0, 0.1], (2, STANDING): [0.1]}, "fewer than two axis arms"),
    ],
)
def test_a_campaign_with_runs_missing_says_what_is_missing(lifts, why):
    runs = campaign(lifts)
    found = compare(of_kind(runs, STANDING), runs, LEVEL)
    assert not found.is_shown
    assert re.search(why, found.not_evaluated)


@given(st.integers(2, 20))
def test_the_levels_of_the_rounds_sum_to_the_campaign_s(num_rounds):
    levels = [level_of_round(LEVEL, number, num_rounds) for number in range(2, num_rounds + 1)]
    assert sum(levels) == LEVEL
    assert levels == sorted(levels)


def test_nothing_is_claimed_in_the_first_round_and_a_final_round_is_tested_alone():
    runs = campaign(
        {(1, REFERENCE): [0.0, 0.01], (1, AXIS): [0.0, 0.01, 0.02], (2, STANDING): [0.3], (2, REFERENCE): [0.0]}
    )
    runs += campaign({(2, AXIS): [0.29, 0.3, 0.31]})
    assert claims_after([r for r in runs if r.round == 1], 1, 4, RUNNING, RULES).improvement.not_evaluated
    assert claims_after(runs, 2, 4, RUNNING, RULES).is_claimed
    assert claims_after(runs, 2, 4, DOUBLED, RULES).is_claimed
    early = claims_after(runs, 2, 4, FINAL_ROUND, RULES).improvement
    assert (early.is_shown, early.not_evaluated) == (False, "this campaign tests once, in its last round r0004")
    last = [*runs, *campaign({(4, STANDING): [0.3, 0.31, 0.29, 0.3], (4, REFERENCE): [0.0, 0.01, -0.01, 0.0]})]
    found = claims_after(last, 4, 4, FINAL_ROUND, RULES)
    assert found.is_claimed and (found.improvement.num_standing, found.improvement.num_reference) == (4, 7)
    fallen = [*runs, *campaign({(4, STANDING): [-0.3, -0.31, -0.29, -0.3], (4, REFERENCE): [0.0, 0.01, -0.01, 0.0]})]
    assert claims_after(fallen, 4, 4, FINAL_ROUND, RULES).worse_standing.is_shown


def test_an_unknown_confirmation_is_refused():
    with pytest.raises(ConfigError, match="policy.confirmation = 'often'"):
        assess_claims.check_confirmation("often", 0, 8)
    for name in assess_claims.CONFIRMATIONS:
        for rounds in (0, 2, 8):
            assess_claims.check_confirmation(name, rounds, 8)
    for name, rounds in ((RUNNING, 9), (RUNNING, -1), (FINAL_ROUND, 1)):
        with pytest.raises(ConfigError, match=f"policy.rounds = {rounds}"):
            assess_claims.check_confirmation(name, rounds, 8)


def test_false_claims_stay_below_five_percent_where_no_recipe_does_anything():
    """2,000 campaigns of four rounds in which the standing run of a round is a new run of the same recipe (studies/ has the full worlds)."""
    rng, claimed, num = np.random.default_rng(20), 0, 2000
    draws = np.round(rng.normal(0, 1, (num, 4, 9)) * 10_000).astype(int)
    for campaign_draws in draws:
        runs: list[Run] = []
        is_claimed = False
        for number, lifts in enumerate(campaign_draws, 1):
            kinds = [REFERENCE, *[AXIS] * 6, REFERENCE if number == 1 else STANDING]
            runs += [
                run(number, kind, Fraction(int(lift)), Fraction(1)) for kind, lift in zip(kinds, lifts, strict=False)
            ]
            is_claimed |= claims_after(runs, number, 4, RUNNING, RULES).is_claimed
        claimed += is_claimed
    assert stats.binomtest(claimed, num, 0.05, "greater").pvalue > 0.01
    assert claimed > 0.01 * num  # the test is not merely deaf


def test_a_round_without_the_reference_s_score_is_told_and_nothing_is_claimed():
    runs = campaign(
        {(1, REFERENCE): [0.0, 0.01], (2, STANDING): [0.3], (2, AXIS): [0.29, 0.3, 0.31], (2, REFERENCE): [0.0]}
    )
    assert claims_after(runs, 2, 4, RUNNING, RULES).is_claimed
    found = claims_after(runs, 3, 4, RUNNING, RULES, [3])
    assert not found.is_claimed and "no score on the fresh items of r0003" in found.improvement.not_evaluated


@pytest.mark.parametrize("digits", [6, 60])
def test_the_caller_s_decimals_change_no_digit(digits):
    runs = campaign(
        {(1, REFERENCE): [0.0, 0.01], (2, STANDING): [0.3], (2, AXIS): [0.29, 0.3, 0.31], (2, REFERENCE): [0.0]}
    )
    usual = claims_after(runs, 2, 8, RUNNING, RULES)
    student.student_quantile.cache_clear()
    with decimal.localcontext(decimal.Context(prec=digits, rounding=decimal.ROUND_UP)):
        assert claims_after(runs, 2, 8, RUNNING, RULES) == usual
        assert decimal_math.rounded(Decimal("0.1234567891234500000001")) == Decimal("0.123456789123")
