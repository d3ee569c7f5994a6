"""Test the gap test: against numpy's least squares and Welch's test, its invariances, and what it finds."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, ttest_ind

from pipeline.campaign.errors import IntegrityError
from pipeline.stats import overfit_test
from pipeline.stats.counts import Counts, count
from pipeline.stats.overfit_test import ALL, FamilyCounts, GapTest
from tests.stats.test_counts import text
from tests.stats.test_difficulty import levels, moves


def effects(answers: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(M,) what each item adds to the arms' mean effect in probits; the mean over items is the effect."""
    items = moves(answers).mean(0) - moves(reference)
    return np.asarray(items - items.mean() + (levels(answers) - levels(reference)).mean())


def most(answers: Counts) -> float:
    """The largest weight of one answer, arms' mean or the reference's, in probits times items."""
    n = answers.num_items
    weight = [1 / norm.pdf(norm.ppf((right + 0.5) / (n + 1))) for right in (*answers.right, answers.reference)]
    return max(float(np.mean(weight[:-1])), weight[-1])


def looks(
    rng: np.random.Generator, rounds: int, arms: int = 4, items: int = 30, gap: float = 0
) -> tuple[list[FamilyCounts], list[tuple[np.ndarray, np.ndarray]]]:
    """Looks at one family and, of each, the effect that every dev and fresh item has, in points on dev; their means are the effects."""
    ease, reference = rng.random(items), rng.random(items) < 0.5
    made, lifts = [], []
    for _ in range(rounds):
        dev = rng.random((arms, items)) < ease * (1 - gap) + gap
        fresh, fresh_reference = rng.random((arms, items + 5)) < 0.5, rng.random(items + 5) < 0.5
        made.append(
            FamilyCounts(count([*map(text, dev)], text(reference)), count([*map(text, fresh)], text(fresh_reference)))
        )
        unit = norm.pdf(levels(reference))
        lifts.append(tuple(unit * effects(*pair) for pair in ((dev, reference), (fresh, fresh_reference))))
    return made, lifts


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_gaps_are_fitted_by_generalised_least_squares(rounds, seed):
    made, lifts = looks(np.random.default_rng(seed), rounds)
    dev, fresh = (np.array([pair[i] for pair in lifts]) for i in (0, 1))
    gaps = dev.mean(1) - fresh.mean(1)
    covariance = np.atleast_2d(np.cov(dev)) / dev.shape[1] + np.diag(fresh.var(1, ddof=1) / fresh.shape[1])
    unit = norm.pdf(norm.ppf((made[0].dev.reference + 0.5) / (made[0].dev.num_items + 1)))
    for number, look in enumerate(made):
        floors = [most(each) / each.num_items for each in (look.dev, look.fresh)]
        covariance[number, number] += unit**2 * (floors[0] ** 2 + floors[1] ** 2)
    for test in overfit_test.family_tests("roman", made):
        ones = (np.arange(rounds) >= test.since).astype(float)
        information = ones @ np.linalg.solve(covariance, ones)
        assert float(test.gap) == pytest.approx(ones @ np.linalg.solve(covariance, gaps) / information, abs=1e-9)
        assert float(test.variance) == pytest.approx(1 / information, rel=1e-9)


def test_one_look_is_welchs_test_but_for_the_one_item():
    made, lifts = looks(np.random.default_rng(3), 1, items=400)
    (test,) = overfit_test.family_tests("roman", made)
    expected = ttest_ind(*lifts[0], equal_var=False).statistic
    assert float(test.gap) / float(test.variance) ** 0.5 == pytest.approx(expected, rel=0.01)
    assert [float(value) for value in overfit_test.latest_gap(made[0])] == pytest.approx(
        [float(test.gap), float(test.variance)]
    )


@given(st.integers(0, 10**6))
def test_the_same_items_have_no_gap(seed):
    look = looks(np.random.default_rng(seed), 1)[0][0]
    tests = overfit_test.family_tests("roman", [FamilyCounts(look.dev, look.dev)]) + overfit_test.arm_tests(
        "roman", FamilyCounts(look.dev, look.dev)
    )
    assert {test.gap for test in tests} == {0}
    assert not any(test.exceeds(Fraction(1, 2)) for test in tests)


@given(st.fractions(-1, 1), st.fractions(Fraction(1, 10**6), 1), st.fractions(Fraction(1, 10**6), Fraction(1, 2)))
def test_a_test_exceeds_where_its_tail_is_below_the_level(gap, variance, level):
    found = GapTest("roman", 0, None, gap, variance).exceeds(level)
    z = float(gap) / float(variance) ** 0.5
    if gap < overfit_test.LEAST_GAP or norm.sf(z) > float(level) * 1.001:
        assert not found
    elif norm.sf(max(z - 1.1e-4, 0)) < float(level) * 0.999:
        assert found


def test_a_gap_of_one_point_counts_only_as_the_mean_of_all_families():
    gap, variance = Fraction(3, 200), Fraction(1, 10**6)
    assert not GapTest("roman", 0, None, gap, variance).exceeds(Fraction(1, 100))
    assert GapTest(ALL, 0, None, gap, variance).exceeds(Fraction(1, 100))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_shares_are_headroom_and_one_in_all(right):
    shares = overfit_test.shares({f"f{i}": (n, 50) for i, n in enumerate(right)})
    assert sum(shares.values()) == 1 and min(shares.values()) > 0
    assert sum(overfit_test.portion(family, shares) for family in [*shares, ALL]) == 1
    assert sorted(range(len(right)), key=lambda i: -shares[f"f{i}"]) == sorted(
        range(len(right)), key=lambda i: right[i]
    )


def test_the_mean_of_families_is_the_mean_of_their_gaps():
    rng = np.random.default_rng(5)
    three = [looks(rng, 1)[0] for _ in range(3)]
    (test,) = overfit_test.mean_tests(three)
    singles = [overfit_test.latest_gap(each[0]) for each in three]
    assert float(test.gap) == pytest.approx(float(sum(gap for gap, _ in singles)) / 3)
    assert float(test.variance) == pytest.approx(float(sum(variance for _, variance in singles)) / 9)
    assert overfit_test.mean_tests(three[:1]) == []


def test_learned_dev_items_alarm_and_fresh_ones_do_not():
    rng = np.random.default_rng(1)
    learned = looks(rng, 3, arms=8, items=200, gap=0.5)[0]
    assert overfit_test.family_tests("roman", learned)[0].exceeds(Fraction(1, 1000))  # there from the first round on
    swapped = [FamilyCounts(each.fresh, each.fresh) for each in learned]
    assert not any(test.exceeds(Fraction(1, 1000)) for test in overfit_test.family_tests("roman", swapped))


def test_one_cheating_arm_is_found_and_named():
    rng = np.random.default_rng(2)
    ease = [rng.random(300) for _ in range(2)]
    sets = [rng.random((8, 300)) < each for each in ease]
    sets[0][5] |= rng.random(300) < 0.5
    look = FamilyCounts(*(count([*map(text, answers)], text(answers[0])) for answers in sets))
    assert [test.arm for test in overfit_test.arm_tests("roman", look) if test.exceeds(Fraction(1, 10_000))] == [5]
    few = FamilyCounts(count(["10", "01"], "11"), count(["10", "01"], "11"))
    assert overfit_test.arm_tests("roman", few) == []


def test_other_items_are_no_second_look():
    rounds = [count(["110", "100"], "010"), count(["11", "10"], "01")]
    with pytest.raises(IntegrityError, match="3 and 2 items"):
        overfit_test.family_tests("roman", [FamilyCounts(each, each) for each in rounds])


@pytest.mark.parametrize("easier", [-1.0, 1.0])
def test_an_easier_set_is_no_gap(easier):
    """Effects of .4 probits in each of 8 arms on dev and on fresh, of which dev is easier or harder: 9 points on fresh, 2 or 16 on dev."""
    rng = np.random.default_rng(11)
    skill = norm.ppf(0.8) + np.array([0.4] * 8 + [0.0])[:, None]
    points, alarms = [], 0
    for _ in range(40):
        sets = []
        for shift in (easier, 0.0):
            right = 0.8**0.5 * rng.normal(size=300) + 0.2**0.5 * rng.normal(size=(9, 300)) < skill + shift
            sets.append(count([text(arm) for arm in right[:8]], text(right[8])))
        (test,) = overfit_test.family_tests("roman", [FamilyCounts(*sets)])
        points.append(float(sets[0].mean_lift - sets[1].mean_lift))
        alarms += test.exceeds(Fraction(1, 100))
    assert abs(np.mean(points)) > 0.05
    assert alarms <= 3


def test_a_set_on_which_everybody_is_right_shows_nothing():
    full, half = count(["1" * 300] * 8, "1" * 300), count(["10" * 150] * 7 + ["1" * 300], "10" * 150)
    for look in (FamilyCounts(full, half), FamilyCounts(half, full)):
        found = overfit_test.family_tests("roman", [look]) + overfit_test.arm_tests("roman", look)
        assert not any(test.exceeds(Fraction(1, 100)) for test in found if test.arm != 7)
