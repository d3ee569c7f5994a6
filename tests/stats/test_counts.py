"""Test the counts against the arrays that they summarise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import IntegrityError
from pipeline.stats.counts import Counts, count

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
    lifts = answers - reference
    assert [float(lift) for lift in counts.arm_lifts()] == pytest.approx(lifts.mean(1))
    assert float(counts.mean_lift) == pytest.approx(lifts.mean())
    assert counts.right == tuple(answers.sum(1)) and counts.reference == reference.sum()
    own = answers.var(0, ddof=1).mean()
    assert float(counts.own_variance) == pytest.approx(own, abs=1e-12)
    assert float(counts.shared_variance) == pytest.approx(
        max(0, lifts.mean(0).var(ddof=1) - own / len(answers)), abs=1e-12
    )


def test_a_set_of_one_model_many_times_has_no_variance_of_its_own():
    counts = count(["1100"] * 5, "1100")
    assert (counts.mean_lift, counts.own_variance, counts.shared_variance) == (0, 0, 0)


@pytest.mark.parametrize(("arms", "reference"), [(["110"], "1100"), (["1"], "1"), ([], "11"), (["11", "111"], "11")])
def test_what_cannot_be_paired_is_told(arms, reference):
    with pytest.raises(IntegrityError, match="cannot be paired"):
        count(arms, reference)
