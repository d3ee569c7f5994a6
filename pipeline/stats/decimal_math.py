"""The normal distribution and small positive definite systems in `decimal`, with the same digits on any machine.

Python's floats follow IEEE, but log, exp and erfc come from the machine's libm, so a verdict near its critical value would depend on the
machine. Decimals with 34 digits take three times as long as floats and remove that dependence (contract 24). All functions are pure.
"""

from __future__ import annotations

import decimal
from collections.abc import Sequence
from contextlib import AbstractContextManager
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

DIGITS = 34
STEP = Decimal("0.0001")  # quantiles are multiples of it, rounded to the safe side
LEAST_SHARE = Fraction(1, 10**12)
TAIL_APPROXIMATION = (("2.515517", "0.802853", "0.010328"), ("1", "1.432788", "0.189269", "0.001308"))
EXACT = decimal.Context(prec=DIGITS, rounding=decimal.ROUND_HALF_EVEN, Emin=-999999, Emax=999999)
Matrix = list[list[Decimal]]


def exactly() -> AbstractContextManager[decimal.Context]:
    """The context in which every number of a decision is computed, whatever context the caller has set."""
    return decimal.localcontext(EXACT)  # a copy of it


def decimal_of(value: Fraction | int) -> Decimal:
    """Convert a ratio to a decimal of 34 digits."""
    ratio = Fraction(value)
    with exactly():
        return Decimal(ratio.numerator) / Decimal(ratio.denominator)


def digits(value: Decimal) -> str:
    """Write twelve significant digits, as records hold them: Decimal("0.045") becomes "4.50000000000E-2"."""
    with exactly():  # the format of a Decimal rounds as the context says
        return f"{value:.11E}"


def rounded(value: Decimal) -> Decimal:
    """Round to the twelve significant digits that `digits` writes, so that the number that decides is exactly the number in the record."""
    return Decimal(digits(value))


def upper_tail(z: Decimal) -> Decimal:
    """P(N(0, 1) > z) for |z| <= 12, to 30 digits, by the series 1/2 - phi(z) (z + z^3/3 + z^5/15 + ...).

    The tail is a difference of two numbers near 1/2, so as many digits are added as it has zeros, z^2 / 4.6.
    """
    with exactly() as context:
        square = z * z
        context.prec = DIGITS + 6 + int(square / 4)
        term = total = abs(z)
        odd, least = 1, Decimal(1).scaleb(-context.prec)
        while term > least:
            odd += 2
            term = term * square / odd
            total += term
        half = Decimal("0.5")
        below = half + (-square / 2).exp() / _root_of_two_pi() * total
        context.prec = DIGITS
        return +(1 - below if z >= 0 else below)


@lru_cache(maxsize=65536)
def probability(z: Decimal) -> Decimal:
    """P(N(0, 1) < z) for |z| <= 12."""
    return upper_tail(z.copy_negate())  # the sign - would round to the caller's context


def density(z: Decimal) -> Decimal:
    """The density of N(0, 1) at z."""
    with exactly():
        return (-z * z / 2).exp() / _root_of_two_pi()


@lru_cache(maxsize=65536)
def quantile(share: Fraction) -> Decimal:
    """The z with P(N(0, 1) < z) = share, to at least 25 digits. Raises ValueError unless 10^-12 <= share <= 1 - 10^-12.

    It begins with a rational approximation (Abramowitz and Stegun 26.2.23, error below .00045) and takes three steps of Halley's method, each
    of which cubes the error.
    """
    if not LEAST_SHARE <= share <= 1 - LEAST_SHARE:
        raise ValueError(f"The share {share} is not valid: a share lies between 10^-12 and 1 - 10^-12")
    if share > Fraction(1, 2):
        return quantile(1 - share).copy_negate()  # the sign - would round to the caller's context
    with exactly():
        tail = decimal_of(share)
        t = (-2 * tail.ln()).sqrt()
        above, below = (_polynomial(t, coefficients) for coefficients in TAIL_APPROXIMATION)
        z = t - above / below
        for _ in range(3):
            step = (upper_tail(z) - tail) / density(z)
            z += step / (1 - z * step / 2)
        return -z


@lru_cache(maxsize=4096)
def upper_quantile(alpha: Fraction) -> Decimal:
    """The least multiple of 0.0001, at most 12, whose upper tail is at most alpha. Raises ValueError unless 0 < alpha <= 1/2."""
    if not 0 < alpha <= Fraction(1, 2):
        raise ValueError(f"The level {alpha} is not valid: a level is above 0 and at most 1/2")
    limit = decimal_of(alpha)
    low, high = 0, 120_000
    while low < high:
        middle = (low + high) // 2
        if upper_tail(middle * STEP) <= limit:
            high = middle
        else:
            low = middle + 1
    return high * STEP


def cholesky(matrix: Matrix) -> Matrix:
    """The lower triangle L, as rows of growing length, with L L' = matrix. Raises ValueError where the matrix is not positive definite."""
    rows: Matrix = []
    for values in matrix:
        rows.append(cholesky_row(rows, values))
    return rows


def cholesky_row(rows: Sequence[Sequence[Decimal]], values: Sequence[Decimal]) -> list[Decimal]:
    """The next row of the lower triangle, after `rows`. `values`: the row of the matrix, up to its diagonal or longer. Raises as `cholesky`."""
    row: list[Decimal] = []
    with exactly():
        for earlier, value in zip(rows, values, strict=False):
            row.append((value - dot(row, earlier[:-1])) / earlier[-1])
        rest = values[len(rows)] - dot(row, row)
        if rest <= 0:
            raise ValueError(
                f"The matrix is not positive definite: row {len(rows)} of the covariance depends on the rows before it"
            )
        return [*row, rest.sqrt()]


def whiten(lower: Matrix, vector: Sequence[Decimal]) -> list[Decimal]:
    """Solve L x = vector for x, where L is a lower triangle from `cholesky`. Leading zeros of the vector cost nothing."""
    first = next((i for i, value in enumerate(vector) if value), len(vector))
    solution = [Decimal(0)] * first
    with exactly():
        for row, value in zip(lower[first:], vector[first:], strict=True):
            solution.append((value - dot(row[first:-1], solution[first:])) / row[-1])
    return solution


def _polynomial(x: Decimal, coefficients: Sequence[str]) -> Decimal:
    total = Decimal(0)
    for coefficient in reversed(coefficients):
        total = total * x + Decimal(coefficient)
    return total


def dot(left: Sequence[Decimal], right: Sequence[Decimal]) -> Decimal:
    """The sum of the products, added in order. The caller must be inside `exactly()`."""
    total = Decimal(0)
    for a, b in zip(left, right, strict=True):
        total += a * b
    return total


@lru_cache(maxsize=1)
def _root_of_two_pi() -> Decimal:
    """The root of 2 pi to 80 digits, with pi by Machin's 16 atan(1/5) - 4 atan(1/239)."""

    def atan_of_one_over(n: int) -> Decimal:
        power = total = Decimal(1) / n
        k = 1
        while abs(power) > Decimal(10) ** -88:
            power = -power / (n * n)
            k += 2
            total += power / k
        return total

    with decimal.localcontext(decimal.Context(prec=90)):
        return (2 * (16 * atan_of_one_over(5) - 4 * atan_of_one_over(239))).sqrt()
