"""Test decimal normal distribution and linear algebra against scipy and numpy, and that no machine setting changes a digit."""

import decimal
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from pipeline.stats import decimal_math


@given(st.integers(-80_000, 80_000))
def test_tails_are_those_of_the_normal_distribution(steps):
    z = steps * decimal_math.STEP
    assert float(decimal_math.upper_tail(z)) == pytest.approx(norm.sf(float(z)), rel=1e-12)


@given(st.fractions(Fraction(1, 10**9), Fraction(1, 2)))
def test_a_quantile_is_the_least_step_whose_tail_is_small_enough(alpha):
    z = decimal_math.upper_quantile(alpha)
    limit = decimal_math.decimal_of(alpha)
    assert decimal_math.upper_tail(z) <= limit
    assert z == 0 or decimal_math.upper_tail(z - decimal_math.STEP) > limit
    assert float(z) == pytest.approx(norm.isf(float(alpha)), abs=1.01e-4)


@pytest.mark.parametrize("alpha", [Fraction(0), Fraction(2, 3), Fraction(-1, 9)])
def test_a_level_out_of_range_is_told(alpha):
    with pytest.raises(ValueError, match="a level is above 0 and at most 1/2"):
        decimal_math.upper_quantile(alpha)


def test_the_context_of_a_caller_changes_nothing():
    expected = (decimal_math.upper_tail(Decimal("2.5")), decimal_math.decimal_of(Fraction(1, 3)))
    with decimal.localcontext(decimal.Context(prec=4, rounding=decimal.ROUND_UP)):
        assert (decimal_math.upper_tail(Decimal("2.5")), decimal_math.decimal_of(Fraction(1, 3))) == expected


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_whitening_solves_what_numpy_solves(size, seed):
    rng = np.random.default_rng(seed)
    root, vector = rng.normal(size=(size, size + 2)), rng.normal(size=size)
    covariance = root @ root.T + np.eye(size)
    lower = decimal_math.cholesky([[Decimal(float(value)) for value in row] for row in covariance])
    expected = np.linalg.cholesky(covariance)
    for i, row in enumerate(lower):
        assert [float(value) for value in row] == pytest.approx(list(expected[i, : i + 1]), rel=1e-9, abs=1e-9)
    solved = decimal_math.whiten(lower, [Decimal(float(value)) for value in vector])
    assert [float(value) for value in solved] == pytest.approx(
        list(np.linalg.solve(expected, vector)), rel=1e-8, abs=1e-9
    )


def test_a_dependent_row_is_told():
    one = Decimal(1)
    with pytest.raises(ValueError, match="row 1 of the covariance"):
        decimal_math.cholesky([[one, one], [one, one]])
