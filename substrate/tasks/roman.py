"""Roman numerals: a prompt shows some numbers with their numerals and asks for the numeral of another.

    In Alice's Wonderland, numbers are secretly converted into a different numeral system. Some examples are given ...
    11 -> XI
    94 -> XCIV
    19 -> XIX
    Now, write the number 38 in the Wonderland numeral system.          answer: XXXVIII

In all 1,414 real rows of the NVIDIA Nemotron Model Reasoning Challenge the numeral system is the Roman one. The rows
have 3, 4 or 5 examples with equal frequency, and all numbers are uniform on 1..100, drawn with replacement (the question
repeats an example in 4 %).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from substrate.tasks.protocol import Solution, check_style

HEADER = (
    "In Alice's Wonderland, numbers are secretly converted into a different numeral system. "
    "Some examples are given below:\n"
)
BECOMES = " -> "
QUESTION = "\nNow, write the number "
END = " in the Wonderland numeral system."
PHRASES = (HEADER, BECOMES, QUESTION, END)

_NUMBER = "[1-3][0-9]{3}|[1-9][0-9]{0,2}"
_EXAMPLE = f"({_NUMBER}){BECOMES}([IVXLCDM]+)"
_PROMPT = re.compile(f"{re.escape(HEADER)}({_EXAMPLE}(?:\n{_EXAMPLE})*){QUESTION}(?P<query>{_NUMBER}){re.escape(END)}")
_SYMBOLS = "IVXLCDM"
# A digit as indices into (one, five, ten) of its place: 4 is one-five, so "01"; 9 is one-ten, so "02".
_SHAPES = ("", "0", "00", "000", "01", "1", "10", "100", "1000", "02")
_LARGEST = 3999


@dataclass(frozen=True)
class Level:
    """Parameters of `generate`."""

    num_examples: tuple[int, int]  # fewest and most
    largest: int  # numbers are uniform on 1..largest


LEVELS = {"small": Level((2, 3), 39), "full": Level((3, 5), 100)}


@dataclass(frozen=True)
class Puzzle:
    """Pairs of number and numeral, and the number asked for."""

    examples: tuple[tuple[int, str], ...]
    query: int


def parse(prompt: str) -> Puzzle:
    """Reads a prompt in the competition's form. Raises ValueError for any other text."""
    match = _PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError("this text is not a prompt of family roman")
    examples = tuple((int(number), written) for number, written in re.findall(_EXAMPLE, match[1]))
    return Puzzle(examples, int(match["query"]))


def render(puzzle: Puzzle) -> str:
    """Prints the puzzle; the inverse of `parse`, byte for byte."""
    lines = "\n".join(f"{number}{BECOMES}{numeral}" for number, numeral in puzzle.examples)
    return f"{HEADER}{lines}{QUESTION}{puzzle.query}{END}"


def generate(rng: random.Random, level: str) -> Puzzle:
    """Draws a puzzle; numbers may repeat, as they do in the real rows."""
    rules = LEVELS[level]
    numbers = [rng.randint(1, rules.largest) for _ in range(rng.randint(*rules.num_examples))]
    return Puzzle(tuple((number, numeral(number)) for number in numbers), rng.randint(1, rules.largest))


def solve(puzzle: Puzzle) -> Solution:
    """Writes the number in Roman numerals; determined if all examples are Roman numerals."""
    return Solution(numeral(puzzle.query), all(numeral(number) == written for number, written in puzzle.examples))


def features(puzzle: Puzzle) -> dict[str, Sequence[float | str]]:
    """Returns the numbers of the examples and of the question."""
    return {"numbers": [number for number, _ in puzzle.examples], "question": [puzzle.query]}


def trace(puzzle: Puzzle, style: str) -> str:
    """`stepwise` converts place by place and then joins: `30 XXX`, `8 VIII`, `XXXVIII`, each on a line."""
    check_style(style)
    if style == "short":
        return f"{puzzle.query}{BECOMES}{numeral(puzzle.query)}"
    places = [f"{value} {part}" for value, part in _places(puzzle.query)]
    return "\n".join([*places, numeral(puzzle.query)])


def numeral(number: int) -> str:
    """Returns the Roman numeral of 1..3999. Raises ValueError for other numbers."""
    return "".join(part for _, part in _places(number))


def _places(number: int) -> list[tuple[int, str]]:
    """Returns the non-zero decimal places, highest first, with their numerals: 38 -> (30, XXX), (8, VIII)."""
    if not 1 <= number <= _LARGEST:
        raise ValueError(f"number is {number}; valid: 1..{_LARGEST}")
    digits = str(number)
    places = []
    for exponent, digit in zip(range(len(digits) - 1, -1, -1), map(int, digits), strict=True):
        if digit:
            part = "".join(_SYMBOLS[2 * exponent + int(position)] for position in _SHAPES[digit])
            places.append((digit * 10**exponent, part))
    return places
