"""Gravity: a prompt shows falling times and distances under an unknown constant and asks for another distance.

    In Alice's Wonderland, the gravitational constant has been secretly changed. Here are some example observations:
    For t = 1.37s, distance = 14.92 m
    For t = 4.27s, distance = 144.96 m
    For t = 3.28s, distance = 85.54 m
    Now, determine the falling distance for t = 4.41s given d = 0.5*g*t^2.      answer: 154.62

The 1,434 real rows of the NVIDIA Nemotron Model Reasoning Challenge have 3, 4 or 5 examples with equal frequency. Times
are uniform on 1..5 s with two decimals, and g is uniform on 4.9..19.6 m/s^2 (0.5 to 2 times 9.8), not rounded. Distances
are rounded to two decimals and printed as Python prints a float: 25.2, 27.0.

The distance is a factor, 0.5 g, times the square of the time, so the solver is that of unit_conversion on squares.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from substrate.tasks.arithmetic import (
    as_printed,
    cents,
    determined_between,
    draw,
    factor_lines,
    long_multiplication,
    quotient,
)
from substrate.tasks.protocol import Solution, check_style

HEADER = (
    "In Alice's Wonderland, the gravitational constant has been secretly changed. Here are some example observations:\n"
)
START = "For t = "
BECOMES = "s, distance = "
END_OF_LINE = " m"
QUESTION = "\nNow, determine the falling distance for t = "
END = "s given d = 0.5*g*t^2."
PHRASES = (HEADER, START, BECOMES, QUESTION, END)  # without " m", with which words begin too

_NUMBER = r"(?:0|[1-9][0-9]{0,3})\.[0-9]{1,3}"  # so short that every distance fits the 28 digits of `decimal`
_LINE = rf"{START}(?!0\.0+s)({_NUMBER}){BECOMES}({_NUMBER}){END_OF_LINE}"  # a time of zero would leave the factor open
_PROMPT = re.compile(f"{re.escape(HEADER)}({_LINE}(?:\n{_LINE})*){QUESTION}(?P<query>{_NUMBER}){re.escape(END)}")


@dataclass(frozen=True)
class Level:
    """Parameters of `generate`: each number is uniform on the multiples of its step between its bounds."""

    num_examples: tuple[int, int]  # fewest and most
    time: tuple[str, str, str]  # seconds: lowest, highest, step
    half_g: tuple[str, str, str]  # m/s^2: lowest, highest, step


LEVELS = {
    "small": Level((2, 3), ("1", "5", "1"), ("2", "5", "1")),
    "full": Level((3, 5), ("1", "5", "0.01"), ("2.45", "9.8", "0.000001")),
}


@dataclass(frozen=True)
class Puzzle:
    """Pairs of time (s) and distance (m), and the time asked for; decimals keep the digits as printed."""

    examples: tuple[tuple[Decimal, Decimal], ...]
    query: Decimal


def parse(prompt: str) -> Puzzle:
    """Reads a prompt in the competition's form. Raises ValueError for any other text."""
    match = _PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError("this text is not a prompt of family gravity")
    return Puzzle(tuple((Decimal(t), Decimal(d)) for t, d in re.findall(_LINE, match[1])), Decimal(match["query"]))


def render(puzzle: Puzzle) -> str:
    """Prints the puzzle; the inverse of `parse`, byte for byte."""
    lines = "\n".join(f"{START}{time:f}{BECOMES}{distance:f}{END_OF_LINE}" for time, distance in puzzle.examples)
    return f"{HEADER}{lines}{QUESTION}{puzzle.query:f}{END}"


def generate(rng: random.Random, level: str) -> Puzzle:
    """Draws a puzzle; the constant is hidden, and numbers are printed as in the real rows."""
    rules = LEVELS[level]
    half_g = draw(rng, rules.half_g)
    *times, query = (as_printed(draw(rng, rules.time)) for _ in range(rng.randint(*rules.num_examples) + 1))
    return Puzzle(tuple((time, as_printed(cents(half_g * time * time))) for time in times), query)


def solve(puzzle: Puzzle) -> Solution:
    """Multiplies the square by the first example's factor; determined if all factors that fit score as equal."""
    answer = cents(puzzle.query**2 * _half_g(puzzle))
    squares = [(time * time, distance) for time, distance in puzzle.examples]
    return Solution(str(as_printed(answer)), determined_between(squares, puzzle.query**2, answer))


def features(puzzle: Puzzle) -> dict[str, Sequence[float | str]]:
    """Returns times in s, and the constant in m/s^2."""
    times = [float(time) for time, _ in puzzle.examples]
    return {"times": [*times, float(puzzle.query)], "g": [2 * float(_half_g(puzzle))]}


def trace(puzzle: Puzzle, style: str) -> str:
    """`stepwise` squares both times, divides and multiplies on paper, as in unit_conversion; here 2.0 s, 10.0 m, 3.0 s:

    0*2=0 2*2=4 4.0 total 4.0
    0*0=0 2*0+0=0 0.00 total 4.00
    0*3=0 3*3=9 9.0 total 9.0
    0*0=0 3*0+0=0 0.00 total 9.00
    10.0=4.00*2 r 2.00
    20.00=4.00*5
    factor 2.5
    0*2=0 0*2+0=0 9*2+0=18 18.00 total 18.00
    0*5=0 0*5+0=0 9*5+0=45 4.500 total 22.500
    22.5
    """
    check_style(style)
    time, distance = puzzle.examples[0]
    answer = solve(puzzle).answer
    square, asked = time * time, puzzle.query * puzzle.query
    if style == "short":
        return f"{distance:f}/{square:f}={_half_g(puzzle):f}\n{asked:f}*{_half_g(puzzle):f}={answer}"
    return "\n".join([*_square(time), *_square(puzzle.query), *factor_lines(distance, square, asked), answer])


def _half_g(puzzle: Puzzle) -> Decimal:
    """Returns the first distance divided by its squared time, cut after four decimals."""
    time, distance = puzzle.examples[0]
    return quotient(distance, time * time)


def _square(number: Decimal) -> list[str]:
    return list(long_multiplication(number, [int(digit) for digit in f"{number:f}" if digit != "."]))
