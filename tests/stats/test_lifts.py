"""Test the intervals of lifts that are shown to people, against scipy and by their form."""

from fractions import Fraction

import pytest
from scipy.stats import norm

from pipeline.campaign.records import Lift
from pipeline.reporting.terminal_tables import lift_in_words
from pipeline.stats.lifts import amount, interval, show, signed


@pytest.mark.parametrize(
    ("mean", "variance"),
    [(Fraction(1, 3), Fraction(1, 900)), (Fraction(-2, 7), Fraction(5, 10_000)), (Fraction(0), Fraction(0))],
)
def test_an_interval_is_the_normal_one(mean: Fraction, variance: Fraction) -> None:
    low, high = interval(mean, variance)
    expected = norm.interval(0.95, loc=float(mean), scale=float(variance) ** 0.5 or 1e-300)
    assert (float(low), float(high)) == pytest.approx(expected, abs=1e-5)
    assert low + high == 2 * mean


def test_lifts_in_words() -> None:
    lift = Lift("reference", "base", "dev", 300, Fraction(149, 300), Fraction(1, 1200))
    assert lift_in_words(lift) == "+49.7 points (95 %: +44.0 to +55.3, 300 paired items)"
    assert (show(lift.mean), amount(-lift.mean), signed(-lift.mean)) == ("+49.67 points", "49.67 points", "-49.67")
