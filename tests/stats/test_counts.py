"""Test the sufficient integers against the arrays that they summarise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import IntegrityError
from pipeline.stats.counts import Counts, count, covariance

sizes = st.tuples(st.integers(3, 8), st.integers(2, 40), st.integers(0, 10**6))


def drawn(size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, Counts]:
    """(A, M) and (M,) answers, and their counts."""
    arms, items, seed = size
    rng = np.random.default_rng(seed)
    answers, reference = rng.random((arms, items)) < rng.random(items), rng.random(items) < 0.5
    return answers.astype(float), reference.astype(float), count([text(arm) for arm in answers], text(reference))


def text(answers: np.ndarray) -> str:
    return "".join("1" if right else "0T"[i % 2] for i, right in enumerate(answers))


@given(sizes)
def test_means_and_variances_are_those_of_the_items(size):
    answers, reference, counts = drawn(size)
    lifts, n = answers - reference, answers.shape[1]
    assert [float(lift) for lift in counts.arm_lifts()] == pytest.approx(lifts.mean(1))
    assert float(counts.mean_lift) == pytest.approx(lifts.mean())
    variance = lifts.mean(0).var(ddof=1) / n
    assert float(covariance(counts, counts)) == pytest.approx(variance, abs=1e-12)
    own = answers.var(0, ddof=1).mean()
    assert float(counts.own_variance) == pytest.approx(own, abs=1e-12)
    assert float(counts.shared_variance) == pytest.approx(max(0, variance * n - own / len(answers)), abs=1e-12)


@given(sizes)
def test_an_arm_is_contrasted_with_the_mean_of_the_others(size):
    answers, _, counts = drawn(size)
    for arm in range(len(answers)):
        contrast = answers[arm] - np.delete(answers, arm, 0).mean(0)
        mean, variance = counts.arm_contrast(arm)
        assert float(mean) == pytest.approx(contrast.mean(), abs=1e-12)
        assert float(variance) == pytest.approx(contrast.var(ddof=1) / len(contrast), abs=1e-12)


@given(sizes, st.integers(0, 10**6))
def test_rounds_on_the_same_items_have_their_covariance(size, seed):
    (first, base, one), (second, other_base, other) = drawn(size), drawn((size[0], size[1], seed))
    expected = np.cov((first - base).mean(0), (second - other_base).mean(0))[0, 1] / size[1]
    assert float(covariance(one, other)) == pytest.approx(expected, abs=1e-12)


def test_a_set_of_one_model_many_times_has_no_variance_of_its_own():
    counts = count(["1100"] * 5, "1100")
    assert (counts.mean_lift, counts.own_variance, counts.shared_variance) == (0, 0, 0)


@pytest.mark.parametrize(("arms", "reference"), [(["110"], "1100"), (["1"], "1"), ([], "11"), (["11", "111"], "11")])
def test_what_cannot_be_paired_is_told(arms, reference):
    with pytest.raises(IntegrityError, match="cannot be paired"):
        count(arms, reference)


def test_other_items_are_no_second_look():
    with pytest.raises(IntegrityError, match="3 and 2 items"):
        covariance(count(["110", "100"], "010"), count(["11", "10"], "01"))
