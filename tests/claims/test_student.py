"""Test the quantiles of Student's t against scipy's."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from pipeline.claims.student import student_quantile, upper_tail


@given(st.fractions(Fraction(1, 100_000), Fraction(1, 2)), st.integers(1, 60))
def test_a_quantile_is_the_least_step_that_keeps_the_level(alpha, degrees):
    quantile = student_quantile(alpha, degrees)
    assert -1e-9 < float(quantile) - t.isf(float(alpha), degrees) < 1.001e-4
    assert upper_tail(quantile, degrees) <= Decimal(alpha.numerator) / alpha.denominator


@given(st.decimals(0, 50, places=3), st.integers(1, 40))
def test_the_tail_is_scipy_s(value, degrees):
    assert float(upper_tail(value, degrees)) == pytest.approx(t.sf(float(value), degrees), rel=1e-9)


@pytest.mark.parametrize(("alpha", "degrees"), [(Fraction(0), 3), (Fraction(3, 5), 3), (Fraction(1, 20), 0)])
def test_a_level_or_degrees_out_of_range_are_refused(alpha, degrees):
    with pytest.raises(ValueError, match="No quantile at level"):
        student_quantile(alpha, degrees)
