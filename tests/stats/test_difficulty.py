"""Test the probit scale against scipy, that difficulty cancels on it, and the level of a target that prints one total."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from pipeline.stats import difficulty
from pipeline.stats.counts import Counts, count
from pipeline.stats.difficulty import fresh_target, moved, on_probits, target_of
from tests.stats.test_counts import text

sizes = st.tuples(st.integers(3, 8), st.integers(2, 40), st.integers(0, 10**6))


def drawn(size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, Counts]:
    """(A, M) and (M,) answers, and their counts."""
    arms, items, seed = size
    rng = np.random.default_rng(seed)
    answers, reference = rng.random((arms, items)) < rng.random(items), rng.random(items) < rng.random()
    return answers.astype(float), reference.astype(float), count([text(arm) for arm in answers], text(reference))


def levels(answers: np.ndarray) -> np.ndarray:
    """Probits of accuracies along the last axis, corrected for continuity."""
    return np.asarray(norm.ppf((answers.sum(-1) + 0.5) / (answers.shape[-1] + 1)))


def moves(answers: np.ndarray) -> np.ndarray:
    """What each answer adds to the probit of its model's accuracy, times the number of items."""
    return answers / norm.pdf(levels(answers))[..., None]


@given(sizes)
def test_effects_are_differences_of_probits(size):
    answers, reference, counts = drawn(size)
    on = on_probits(counts)
    assert [float(effect) for effect in on.effects] == pytest.approx(levels(answers) - levels(reference), abs=1e-9)
    assert float(on.mean_effect) == pytest.approx((levels(answers) - levels(reference)).mean(), abs=1e-9)
    share = (reference.sum() + 0.5) / (len(reference) + 1)
    known = len(reference) * norm.pdf(norm.ppf(share)) ** 2 / (share * (1 - share))
    assert float(on.information) == pytest.approx(known)


@given(sizes)
def test_the_variance_of_the_mean_effect_is_that_of_its_items_and_one_more(size):
    answers, reference, counts = drawn(size)
    items, n = moves(answers).mean(0) - moves(reference), len(reference)
    most = max(1 / norm.pdf(levels(reference)), (1 / norm.pdf(levels(answers))).mean())
    assert float(on_probits(counts).mean_variance) == pytest.approx(items.var(ddof=1) / n + (most / n) ** 2)


@given(sizes)
def test_an_arm_is_contrasted_with_the_mean_level_of_the_others(size):
    answers, _, counts = drawn(size)
    n = answers.shape[1]
    for arm in range(len(answers)):
        mean, variance = on_probits(counts).contrast(arm)
        others = np.delete(answers, arm, 0)
        items = moves(answers[arm]) - moves(others).mean(0)
        most = max(1 / norm.pdf(levels(answers[arm])), (1 / norm.pdf(levels(others))).mean())
        assert float(mean) == pytest.approx(levels(answers[arm]) - levels(others).mean(), abs=1e-9)
        assert float(variance) == pytest.approx(items.var(ddof=1) / n + (most / n) ** 2)


@given(sizes, st.integers(0, 10**6))
def test_rounds_on_the_same_items_have_their_covariance(size, seed):
    (first, base, one), (second, other_base, other) = drawn(size), drawn((size[0], size[1], seed))
    items = (moves(first).mean(0) - moves(base), moves(second).mean(0) - moves(other_base))
    found = difficulty.covariance(on_probits(one).mean_items, on_probits(other).mean_items, size[1])
    assert float(found) == pytest.approx(np.cov(*items)[0, 1] / size[1], abs=1e-12)


@pytest.mark.parametrize("easier", [-1.0, 0.0, 1.0])
def test_an_effect_is_the_same_on_easier_items_and_its_variance_is_honest(easier):
    """400 sets of 300 items: 8 arms .2 probits above a reference of 75 %, correlated as in studies.simulated."""
    rng = np.random.default_rng(8)
    found, stated = [], []
    for _ in range(400):
        ease, noise = rng.normal(size=300), rng.normal(size=(9, 300))
        skill = norm.ppf(0.75) + easier + np.array([0.2] * 8 + [0.0])[:, None]
        right = 0.8**0.5 * ease + 0.2**0.5 * noise < skill
        on = on_probits(count([text(arm) for arm in right[:8]], text(right[8])))
        found.append(float(on.mean_effect))
        stated.append(float(on.mean_variance))
    assert np.mean(found) == pytest.approx(0.2, abs=3 * np.std(found) / 20 + 0.005)
    assert np.mean(stated) == pytest.approx(np.var(found), rel=0.3)


def counted(accuracies: list[float], num_items: int) -> list[list[Counts]]:
    """One round of fresh items in which the reference has these accuracies."""
    marks = [text(np.arange(num_items) < round(share * num_items)) for share in accuracies]
    return [[count([each], each)] for each in marks]


@given(st.lists(st.floats(0.05, 0.97), min_size=1, max_size=6), st.floats(0.03, 0.97))
def test_the_target_has_the_printed_total_and_one_offset(accuracies, printed):
    fresh, printed_total = counted(accuracies, 300), Decimal(f"{printed:.3f}")
    target, base = target_of(fresh, printed_total, 1000), fresh_target(fresh)
    total = (float(printed_total) * 1000 + 0.5) / 1001
    assert np.mean(norm.cdf([float(level) for level in target.levels])) == pytest.approx(total, abs=1e-9)
    offsets = [float(a - b) for a, b in zip(target.levels, base.levels, strict=True)]
    fresh_levels = np.array([float(level) for level in base.levels])
    expected = brentq(lambda offset: norm.cdf(fresh_levels + offset).mean() - total, -8, 8)
    assert offsets == pytest.approx([expected] * len(offsets), abs=1e-7)
    assert target.variance > 0 and min(target.slopes) >= difficulty.HEALTHY_SD**2
    assert target_of(fresh, None, 1000) == base


def test_slopes_are_known_where_the_total_is_that_of_fresh_items():
    fresh = counted([0.95, 0.92, 0.85, 0.75, 0.6, 0.3], 1000)
    levels_of = fresh_target(fresh).levels
    known = [Decimal(1000)] * 6

    def slopes(total: float) -> np.ndarray:
        return np.array([float(value) for value in moved(levels_of, known, Decimal(f"{total:.4f}"), 10**6).slopes])

    same = float(np.mean(norm.cdf([float(level) for level in levels_of])))
    assert slopes(same) == pytest.approx([0.04] * 6, abs=1e-3)
    one_is_harder = same - (0.3 - norm.cdf(norm.ppf(0.3) - 1)) / 6
    assert slopes(one_is_harder)[-1] > 0.1  # in the weakest an effect would be worth a third
    assert slopes(one_is_harder)[0] > slopes(same)[0]


def test_an_effect_is_worth_what_it_adds_at_the_targets_level():
    target = fresh_target(counted([0.5, 0.9], 999))
    for family in (0, 1):
        level = float(target.levels[family])
        found = float(target.lift(family, Decimal("0.3")))
        assert found == pytest.approx(norm.cdf(level + 0.3) - norm.cdf(level), abs=1e-12)


@given(st.integers(0, 50))
def test_a_corrected_share_is_inside_and_symmetric(right):
    share = difficulty.corrected(right, 50)
    assert (
        0 < share < 1
        and share + difficulty.corrected(50 - right, 50) == 1
        and abs(share - Fraction(right, 50)) < Fraction(1, 100)
    )
