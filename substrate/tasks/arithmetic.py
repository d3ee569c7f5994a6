"""Decimal arithmetic as on paper, with which the families of hidden factors solve puzzles and write their reasoning.

    long division of 23.79 by 35.85         23.79=35.85*0 r 23.79 / 237.90=35.85*6 r 22.80 / ...
    long multiplication of 25.09 by 0.66    9*0=0 0*0+0=0 5*0+0=0 2*0+0=0 0.00 total 0.00 / ...

A quotient is cut after four decimals, so that the solver's answer is exactly what its trace arrives at.
"""

import random
from collections.abc import Iterable, Iterator
from decimal import ROUND_HALF_UP, Decimal

from substrate.answers import REL_TOLERANCE

_CENT = Decimal("0.01")
_QUOTIENT_DECIMALS = 4


def draw(rng: random.Random, grid: tuple[str, str, str]) -> Decimal:
    """Draws uniformly from the multiples of the step in `grid`, which is (lowest, highest, step)."""
    lowest, highest, step = map(Decimal, grid)
    return rng.randint(int(lowest / step), int(highest / step)) * step


def as_printed(number: Decimal) -> Decimal:
    """Gives a number the digits that Python prints for a float: 10.90 -> 10.9, 13 -> 13.0."""
    return Decimal(str(float(number)))


def cents(value: Decimal) -> Decimal:
    """Rounds to two decimals, halves away from zero."""
    return value.quantize(_CENT, ROUND_HALF_UP)


def determined_between(examples: Iterable[tuple[Decimal, Decimal]], query: Decimal, answer: Decimal) -> bool:
    """Whether every factor that gives all (input, output) pairs, outputs rounded to cents, scores as `answer`."""
    half = _CENT / 2  # the most by which a printed result differs from the exact one
    bounds = [((output - half) / given, (output + half) / given) for given, output in examples]
    lowest, highest = max(low for low, _ in bounds) * query, min(high for _, high in bounds) * query
    tolerance = Decimal(REL_TOLERANCE) * answer
    return lowest <= highest and answer - tolerance <= lowest and highest <= answer + tolerance


def quotient(dividend: Decimal, divisor: Decimal) -> Decimal:
    """Returns `dividend` by `divisor`, cut after four decimals."""
    digits = [digit for _, digit, _ in long_division(dividend, divisor)]
    return sum((Decimal(digit).scaleb(-place) for place, digit in enumerate(digits)), Decimal(0))


def factor_lines(output: Decimal, given: Decimal, query: Decimal) -> list[str]:
    """Writes `query` times the quotient of `output` by `given`: one line per digit to divide, and one to multiply."""
    division = list(long_division(output, given))
    lines = [
        f"{dividend:f}={given:f}*{digit}" + (f" r {remainder:f}" if remainder else "")
        for dividend, digit, remainder in division
    ]
    if len(division) == 1:
        return [*lines, digit_products(query, division[0][1])]
    lines.append(f"factor {quotient(output, given):f}")
    return [*lines, *long_multiplication(query, [digit for _, digit, _ in division])]


def long_division(dividend: Decimal, divisor: Decimal) -> Iterator[tuple[Decimal, int, Decimal]]:
    """Yields dividend, quotient digit and remainder of each step, the whole part first, until nothing remains."""
    for _ in range(1 + _QUOTIENT_DECIMALS):
        digit = int(dividend // divisor)
        remainder = dividend - digit * divisor
        yield dividend, digit, remainder
        if not remainder:
            return
        dividend = (remainder * 10).quantize(remainder)  # keeps the number of decimals: 22.80 -> 228.00


def digit_products(number: Decimal, factor: int) -> str:
    """Writes `number` times one digit, from the right, with carries: 7.5 * 3 -> `5*3=15 7*3+1=22`."""
    steps: list[str] = []
    carry = 0
    for digit in map(int, reversed(f"{number:f}".replace(".", ""))):
        product = digit * factor + carry
        steps.append(f"{digit}*{factor}{f'+{carry}' if steps else ''}={product}")
        carry = product // 10
    return " ".join(steps)


def long_multiplication(number: Decimal, digits: list[int]) -> Iterator[str]:
    """Yields one line per digit of the factor: its digit products, the partial product and the running total."""
    total = Decimal(0)
    for place, digit in enumerate(digits):
        partial = (number * digit).scaleb(-place)
        total += partial
        yield f"{digit_products(number, digit)} {partial:f} total {total:f}"
