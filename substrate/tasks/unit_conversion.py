"""Unit conversion: a prompt shows measurements before and after an unknown factor and asks to convert another.

    In Alice's Wonderland, a secret unit conversion is applied to measurements. For example:
    10.08 m becomes 6.69
    17.83 m becomes 11.83
    35.85 m becomes 23.79
    Now, convert the following measurement: 25.09 m                     answer: 16.65

In all 1,437 real rows of the NVIDIA Nemotron Model Reasoning Challenge the unit is m. The rows have 3, 4 or 5 examples
with equal frequency. Measurements are uniform on 5..50 with two decimals (printed as Python prints a float: 10.9, 13.0),
the factor is uniform on 0.5..2, not rounded, and results have two decimals. At level `small` the factor is a whole
number of one digit.

The solver does what the trace writes: long division of the first example, then long multiplication. Its answer is within
0.5 % of the exact one, and the scorer allows 1 %.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from substrate.tasks.arithmetic import as_printed, cents, determined_between, draw, factor_lines, quotient
from substrate.tasks.protocol import Solution, check_style

HEADER = "In Alice's Wonderland, a secret unit conversion is applied to measurements. For example:\n"
BECOMES = " m becomes "
QUESTION = "\nNow, convert the following measurement: "
END = " m"
PHRASES = (HEADER, BECOMES, QUESTION)

_NUMBER = r"(?:0|[1-9][0-9]{0,5})\.[0-9]{1,6}"
_EXAMPLE = rf"(?!0\.0+ )({_NUMBER}){BECOMES}({_NUMBER})"  # a measurement of zero would leave the factor open
_PROMPT = re.compile(f"{re.escape(HEADER)}({_EXAMPLE}(?:\n{_EXAMPLE})*){QUESTION}(?P<query>{_NUMBER}){END}")


@dataclass(frozen=True)
class Level:
    """Parameters of `generate`: each number is uniform on the multiples of its step between its bounds."""

    num_examples: tuple[int, int]  # fewest and most
    measurement: tuple[str, str, str]  # lowest, highest, step
    factor: tuple[str, str, str]  # lowest, highest, step


LEVELS = {
    "small": Level((2, 3), ("1", "9", "1"), ("2", "5", "1")),
    "full": Level((3, 5), ("5", "50", "0.01"), ("0.5", "2", "0.000001")),
}


@dataclass(frozen=True)
class Puzzle:
    """Pairs of measurement and result, and the measurement asked for; decimals keep the digits as printed."""

    examples: tuple[tuple[Decimal, Decimal], ...]
    query: Decimal


def parse(prompt: str) -> Puzzle:
    """Reads a prompt in the competition's form. Raises ValueError for any other text."""
    match = _PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError("this text is not a prompt of family unit_conversion")
    examples = tuple((Decimal(measured), Decimal(result)) for measured, result in re.findall(_EXAMPLE, match[1]))
    return Puzzle(examples, Decimal(match["query"]))


def render(puzzle: Puzzle) -> str:
    """Prints the puzzle; the inverse of `parse`, byte for byte."""
    lines = "\n".join(f"{measurement:f}{BECOMES}{result:f}" for measurement, result in puzzle.examples)
    return f"{HEADER}{lines}{QUESTION}{puzzle.query:f}{END}"


def generate(rng: random.Random, level: str) -> Puzzle:
    """Draws a puzzle; the factor is hidden, and numbers are printed as in the real rows."""
    rules = LEVELS[level]
    factor = draw(rng, rules.factor)
    count = rng.randint(*rules.num_examples) + 1
    *measurements, query = (as_printed(draw(rng, rules.measurement)) for _ in range(count))
    return Puzzle(tuple((measurement, cents(measurement * factor)) for measurement in measurements), query)


def solve(puzzle: Puzzle) -> Solution:
    """Multiplies by the first example's factor; determined if all factors that fit score as equal."""
    answer = cents(puzzle.query * _factor(puzzle))
    return Solution(f"{answer:f}", determined_between(puzzle.examples, puzzle.query, answer))


def features(puzzle: Puzzle) -> dict[str, Sequence[float | str]]:
    """Returns measurements, and the factor."""
    measurements = [float(measurement) for measurement, _ in puzzle.examples]
    return {"measurements": [*measurements, float(puzzle.query)], "factor": [float(_factor(puzzle))]}


def trace(puzzle: Puzzle, style: str) -> str:
    """`stepwise` writes long division, then long multiplication with carries, digit by digit.

    7.5 m at the factor 3 (level `small`):    25.09 m at 0.6635 (level `full`; only the first two digits are shown):
        13.50=4.5*3                               23.79=35.85*0 r 23.79
        5*3=15 7*3+1=22                           237.90=35.85*6 r 22.80
        22.50                                     factor 0.6635
                                                  9*0=0 0*0+0=0 5*0+0=0 2*0+0=0 0.00 total 0.00
                                                  9*6=54 0*6+5=5 5*6+0=30 2*6+3=15 15.054 total 15.054
                                                  16.65
    """
    check_style(style)
    factor = _factor(puzzle)
    answer = f"{cents(puzzle.query * factor):f}"
    if style == "short":
        return f"{puzzle.query:f}*{factor:f}={answer}"
    measurement, result = puzzle.examples[0]
    return "\n".join([*factor_lines(result, measurement, puzzle.query), answer])


def _factor(puzzle: Puzzle) -> Decimal:
    """Returns the factor of the first example, cut after four decimals."""
    measurement, result = puzzle.examples[0]
    return quotient(result, measurement)
