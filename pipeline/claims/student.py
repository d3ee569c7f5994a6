"""Quantiles of Student's t distribution in `decimal`, with the same digits on any machine.

For a whole number n of degrees of freedom the distribution function is a finite sum in the angle atan(t / sqrt n)
(Abramowitz and Stegun 26.7.3 and 26.7.4), so no table and no numerical integral is needed.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from pipeline.stats.decimal_math import STEP, decimal_of, exactly

DIGITS = 50


@lru_cache(maxsize=4096)
def student_quantile(alpha: Fraction, degrees: int) -> Decimal:
    """The least multiple of 0.0001 whose upper tail is at most `alpha`. Raises ValueError unless 0 < alpha <= 1/2 and degrees >= 1."""
    if not (0 < alpha <= Fraction(1, 2) and degrees >= 1):
        raise ValueError(
            f"No quantile at level {alpha} with {degrees} degrees of freedom: 0 < level <= 1/2, degrees >= 1"
        )
    limit = decimal_of(alpha)
    low, high = 0, 10_000
    with exactly():
        while upper_tail(high * STEP, degrees) > limit:
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            if upper_tail(middle * STEP, degrees) <= limit:
                high = middle
            else:
                low = middle + 1
        return high * STEP


def upper_tail(t: Decimal, degrees: int) -> Decimal:
    """P(T > t) for t >= 0. About 40 digits after the point are correct."""
    with exactly() as context:
        context.prec = DIGITS
        cos_squared = degrees / (degrees + t * t)
        sine = (1 - cos_squared).sqrt()
        odd = degrees % 2
        term = total = cos_squared.sqrt() if odd else Decimal(1)
        for k in range(2 + odd, degrees, 2):
            term *= cos_squared * (k - 1) / k
            total += term
        if odd:
            angle = _atan(t / Decimal(degrees).sqrt())
            inside = (angle + (sine * total if degrees > 1 else 0)) / (2 * _atan(Decimal(1)))
        else:
            inside = sine * total
        return (1 - inside) / 2


def _atan(x: Decimal) -> Decimal:
    """atan(x) for x >= 0. Halving the angle four times makes the series short."""
    for _ in range(4):
        x = x / (1 + (1 + x * x).sqrt())
    power = total = x
    k = 1
    while abs(power) > Decimal(10) ** -(DIGITS + 2):
        power *= -x * x
        k += 2
        total += power / k
    return 16 * total
