"""Bit manipulation: a prompt shows eight-bit numbers before and after an unknown rule and asks to apply it again.

    In Alice's Wonderland, a secret bit manipulation rule transforms 8-bit binary numbers. The transformation involves ...
    01010001 -> 11011101
    00001001 -> 01101101
    00010101 -> 01010101
    Now, determine the output for: 00110100                              answer: 10010111

All 1,442 real rows of the NVIDIA Nemotron Model Reasoning Challenge that we have follow one of the eleven rules of
`RULES`: every output bit is the same Boolean function of the bits at its place in two or three *sources*. A source is
the input rotated left, shifted left (zeros enter) or shifted right, by 1 to 7. Rows have 7 to 10 examples with equal
frequency; inputs are uniform and distinct, and the question is none of them.

The solver tries all 1,715 *readings*, rules with amounts. In 1 % of the real rows several fit and differ on the
question; then it takes the likeliest and reports its answer as not determined.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from operator import and_, or_, xor

from substrate.tasks.protocol import Solution, check_style

HEADER = (
    "In Alice's Wonderland, a secret bit manipulation rule transforms 8-bit binary numbers. The transformation "
    "involves operations like bit shifts, rotations, XOR, AND, OR, NOT, and possibly majority or choice functions.\n\n"
    "Here are some examples of input -> output:\n"
)
BECOMES = " -> "
QUESTION = "\n\nNow, determine the output for: "
PHRASES = (HEADER, BECOMES, QUESTION)

WIDTH = 8
AMOUNTS = range(1, WIDTH)

_BITS = f"[01]{{{WIDTH}}}"
_EXAMPLE = f"({_BITS}){BECOMES}({_BITS})"
_PROMPT = re.compile(f"{re.escape(HEADER)}({_EXAMPLE}(?:\n{_EXAMPLE})*){QUESTION}(?P<query>{_BITS})")


@dataclass(frozen=True)
class Rule:
    """A Boolean function of two or three sources, without their amounts."""

    name: str  # as traces write it
    sources: tuple[str, ...]  # rot, shl or shr
    output: Callable[..., int]  # function of the sources; bits above the eighth are dropped
    weight: int  # of 1,442 real rows, those that follow it; an expected count if a row allows several


THREE = ("rot", "shl", "shr")
RULES = {
    rule.name: rule
    for rule in (
        Rule("shl xor shr", ("shl", "shr"), xor, 368),
        Rule("rot xor shl", ("rot", "shl"), xor, 74),
        Rule("rot xor shr", ("rot", "shr"), xor, 55),
        Rule("rot or shl", ("rot", "shl"), or_, 55),
        Rule("rot or shr", ("rot", "shr"), or_, 81),
        Rule("rot and shl", ("rot", "shl"), and_, 62),
        Rule("rot and shr", ("rot", "shr"), and_, 55),
        Rule("majority of rot shl shr", THREE, lambda r, a, b: r & a | r & b | a & b, 189),
        Rule("if shl then shr else rot", THREE, lambda r, a, b: a & b | ~a & r, 161),
        Rule("if rot then shl xor shr else not shl or shr", THREE, lambda r, a, b: r & (a ^ b) | ~r & (~a | b), 207),
        Rule("if rot then shl or shr else not shl or shr", THREE, lambda r, a, b: r & (a | b) | ~r & (~a | b), 135),
    )
}


@dataclass(frozen=True)
class Level:
    """Parameters of `generate`."""

    num_examples: tuple[int, int]  # fewest and most
    rules: tuple[str, ...]  # names in RULES
    largest_amount: int  # amounts are uniform on 1..largest_amount


LEVELS = {
    "small": Level((4, 5), ("rot xor shl", "rot or shl", "rot and shl"), 1),
    "full": Level((7, 10), tuple(RULES), WIDTH - 1),
}


@dataclass(frozen=True)
class Puzzle:
    """Pairs of input and output, and the input asked for: strings of eight 0 and 1, the highest bit first."""

    examples: tuple[tuple[str, str], ...]
    query: str


def parse(prompt: str) -> Puzzle:
    """Reads a prompt in the competition's form. Raises ValueError for any other text."""
    match = _PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError("this text is not a prompt of family bit_manipulation")
    return Puzzle(tuple(re.findall(_EXAMPLE, match[1])), match["query"])


def render(puzzle: Puzzle) -> str:
    """Prints the puzzle; the inverse of `parse`, byte for byte."""
    lines = "\n".join(f"{given}{BECOMES}{output}" for given, output in puzzle.examples)
    return f"{HEADER}{lines}{QUESTION}{puzzle.query}"


def generate(rng: random.Random, level: str) -> Puzzle:
    """Draws puzzles until all readings that fit the examples agree on the question."""
    limits = LEVELS[level]
    rules = [RULES[name] for name in limits.rules]
    while True:
        rule = rng.choices(rules, [rule.weight for rule in rules])[0]
        reading = Reading(rule, tuple(rng.randint(1, limits.largest_amount) for _ in rule.sources))
        *inputs, query = rng.sample(range(2**WIDTH), rng.randint(*limits.num_examples) + 1)
        puzzle = Puzzle(tuple((_text(given), _text(reading.table()[given])) for given in inputs), _text(query))
        if solve(puzzle).determined:
            return puzzle


def solve(puzzle: Puzzle) -> Solution:
    """Returns the likeliest answer over all readings of the examples; determined if all readings agree."""
    votes = _votes(puzzle)
    if not votes:
        return Solution(puzzle.query, determined=False)
    return Solution(max(votes, key=votes.__getitem__), determined=len(votes) == 1)


def features(puzzle: Puzzle) -> dict[str, Sequence[float | str]]:
    """Returns the ones in each input, and rule and amounts if the examples allow one reading."""
    ones = [float(given.count("1")) for given in [*dict(puzzle.examples), puzzle.query]]
    found = list(islice(readings(puzzle), 2))
    only = found if len(found) == 1 else []
    amounts = [str(amount) for reading in only for amount in reading.amounts]
    return {"ones": ones, "rule": [reading.rule.name for reading in only], "amounts": amounts}


def trace(puzzle: Puzzle, style: str) -> str:
    """Writes the rule with its amounts; `stepwise` adds input, sources and output of each example and the question.

    rot1 or shl1
    00010110 00101100 00101100 00101100
    10000001 00000011 00000010 00000011
    00110100 01101000 01101000 01101000
    """
    check_style(style)
    answer = solve(puzzle).answer
    fitting = (each for each in readings(puzzle) if _text(each.table()[int(puzzle.query, 2)]) == answer)
    reading = next(fitting, None)
    if reading is None:
        return answer
    if style == "short":
        return f"{reading}\n{answer}"
    inputs = [given for given, _ in puzzle.examples] + [puzzle.query]
    return "\n".join([str(reading), *(" ".join(_row(reading, given)) for given in inputs)])


@dataclass(frozen=True)
class Reading:
    """A rule with the amounts of its sources."""

    rule: Rule
    amounts: tuple[int, ...]

    def table(self) -> tuple[int, ...]:
        """Returns the output of every input 0..255."""
        return _table(self.rule.name, self.amounts)

    def __str__(self) -> str:
        text = self.rule.name
        for source, amount in zip(self.rule.sources, self.amounts, strict=True):
            text = text.replace(source, f"{source}{amount}")
        return text


def readings(puzzle: Puzzle) -> Iterator[Reading]:
    """Yields all readings that give every example."""
    examples = [(int(given, 2), int(output, 2)) for given, output in puzzle.examples]
    found = _tables()
    for given, output in examples:
        found = [(reading, table) for reading, table in found if table[given] == output]
    yield from (reading for reading, _ in found)


def _votes(puzzle: Puzzle) -> dict[str, float]:
    """Returns answer -> expected number of real rows under the readings that lead to it."""
    votes: dict[str, float] = defaultdict(float)
    for reading in readings(puzzle):
        rows = reading.rule.weight / len(AMOUNTS) ** len(reading.amounts)
        votes[_text(reading.table()[int(puzzle.query, 2)])] += rows
    return votes


def _row(reading: Reading, given: str) -> list[str]:
    """Returns input, sources and output as bits."""
    number = int(given, 2)
    sources = [_source(*each, number) for each in zip(reading.rule.sources, reading.amounts, strict=True)]
    return [given, *map(_text, sources), _text(reading.table()[number])]


@cache
def _tables() -> list[tuple[Reading, tuple[int, ...]]]:
    """Returns every reading with the outputs of all inputs."""
    every = (Reading(rule, each) for rule in RULES.values() for each in product(AMOUNTS, repeat=len(rule.sources)))
    return [(reading, reading.table()) for reading in every]


@cache
def _table(name: str, amounts: tuple[int, ...]) -> tuple[int, ...]:
    rule = RULES[name]
    return tuple(_apply(rule, amounts, given) for given in range(2**WIDTH))


def _apply(rule: Rule, amounts: tuple[int, ...], given: int) -> int:
    sources = (_source(*each, given) for each in zip(rule.sources, amounts, strict=True))
    return rule.output(*sources) & 0xFF


def _source(name: str, amount: int, given: int) -> int:
    left = given << amount
    return {"shr": given >> amount, "shl": left & 0xFF, "rot": (left | given >> (WIDTH - amount)) & 0xFF}[name]


def _text(number: int) -> str:
    return f"{number:0{WIDTH}b}"
