"""Test what is shown to be worse: against scipy's t, with the allowance for collapses, and never from a run's own spread."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.claims.runs import AXIS, REFERENCE, STANDING, Run, of_kind
from pipeline.claims.worse_test import worse_arms, worse_standing

LEVEL, ALLOWANCE = Fraction(1, 20), Fraction(1, 10)


def runs_of(number: int, kind: str, lifts: list[float], variance: Fraction = Fraction(0)) -> list[Run]:
    return [Run(number, f"{kind}{n}", kind, Fraction(lift), variance) for n, lift in enumerate(lifts)]


@given(st.lists(st.integers(-400, 400).map(lambda n: n / 1000), min_size=3, max_size=7))
def test_an_arm_is_compared_by_student_s_t_of_the_other_arms(lifts):
    reference = [0.0, 0.02]
    found = worse_arms(runs_of(1, AXIS, lifts) + runs_of(1, REFERENCE, reference), 1, LEVEL, 4, ALLOWANCE)
    for number, lift in enumerate(lifts):
        others = np.delete(lifts, number)
        if len(set(others)) == 1:  # equal runs without item noise say nothing about chance
            assert f"{AXIS}{number}" not in found
            continue
        critical = stats.t.isf(0.05 / (len(lifts) * 4), len(others) - 1) * (np.var(others, ddof=1) * 1.5) ** 0.5
        arm = found[f"{AXIS}{number}"]
        assert float(arm.difference) == pytest.approx(lift - 0.01)
        assert float(arm.reach) == pytest.approx(0.1 + critical, rel=1e-3, abs=1e-9)
        if abs(float(arm.difference + arm.reach)) > 1e-3:
            assert arm.is_shown == (float(arm.difference) < -(0.1 + critical))


def test_the_baseline_is_the_round_s_standing_run_and_earlier_rounds_add_to_the_variance():
    first = runs_of(1, AXIS, [0.0, 0.01, 0.02, 0.03]) + runs_of(1, REFERENCE, [0.0, 0.01])
    second = runs_of(2, AXIS, [0.2, 0.21, -0.4]) + runs_of(2, STANDING, [0.2]) + runs_of(2, REFERENCE, [0.0])
    found = worse_arms(first + second, 2, LEVEL, 4, ALLOWANCE)
    assert float(found["axis2"].difference) == pytest.approx(-0.6)
    assert [arm for arm, each in found.items() if each.is_shown] == ["axis2"]
    alone = worse_arms(second, 2, LEVEL, 4, ALLOWANCE)["axis2"]
    assert alone.reach > found["axis2"].reach  # one degree of freedom in place of four


def test_item_noise_is_the_least_that_noise_can_be():
    equal = runs_of(1, AXIS, [0.0, 0.0, 0.0, -0.2], Fraction(1, 500)) + runs_of(1, REFERENCE, [0.0], Fraction(1, 500))
    critical = stats.t.isf(0.05 / 16, 2) * (2 / 1000) ** 0.5
    found = worse_arms(equal, 1, LEVEL, 4, ALLOWANCE)["axis3"]
    assert float(found.reach) == pytest.approx(0.1 + critical, rel=1e-3)
    assert not found.is_shown


@pytest.mark.parametrize(
    "runs",
    [
        [],
        runs_of(1, AXIS, [0.0, 0.1, -0.9]),
        runs_of(1, REFERENCE, [0.0, 0.1]),
        runs_of(1, AXIS, [-0.9]) + runs_of(1, REFERENCE, [0.0, 0.1]),
        runs_of(1, AXIS, [-0.9, 0.0]) + runs_of(1, REFERENCE, [0.0, 0.1]),
        runs_of(1, AXIS, [0.0, 0.0, 0.0]) + runs_of(1, REFERENCE, [0.0, 0.0]),
    ],
)
def test_with_too_few_runs_nothing_is_shown(runs):
    assert worse_arms(runs, 1, LEVEL, 4, ALLOWANCE) == {}


def test_one_bad_run_of_the_standing_recipe_shows_nothing():
    common = runs_of(1, REFERENCE, [0.0, 0.01, 0.02]) + runs_of(2, AXIS, [0.0, 0.01, 0.02])
    collapsed = [*common, *runs_of(2, STANDING, [0.01, -0.9])]
    assert not worse_standing(of_kind(collapsed, STANDING), collapsed, LEVEL).is_shown
    bad = [*common, *runs_of(2, STANDING, [-0.9]), *runs_of(3, STANDING, [-0.9]), *runs_of(4, STANDING, [-0.9])]
    assert worse_standing(of_kind(bad, STANDING), bad, LEVEL).is_shown
    single = [*common, *runs_of(2, STANDING, [-0.9])]
    assert "fewer than two scored runs" in worse_standing(of_kind(single, STANDING), single, LEVEL).not_evaluated
