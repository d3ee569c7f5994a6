r"""Equations: a prompt shows lines under hidden rules, one for each operator, and asks for the result of another.

    In Alice's Wonderland, a secret set of transformation rules is applied to equations. Below are a few examples:
    34/44 = 1                                               `!*[{ = '"[
    41/32 = 9                                               \'*'> = ![@
    34|25 = 69                                              \'-!` = \\
    87\64 = 8853                                            `!*\& = '@'{
    Now, determine the result for: 69/52                    Now, determine the result for: [[-!'
    answer: 17/                                             answer: @&

In the real rows of the NVIDIA Nemotron Model Reasoning Challenge every line has two operands of two characters around
an operator. In 652 of 1,377 rows they are digits; in the others each of up to ten symbols stands for a digit. Rows have
3, 4 or 5 examples with equal frequency, and three operators, one of which is drawn for each line and for the question.
In a fifth of the rows no example has the question's operator, and in some a digit of the answer has no known symbol, so
one can only guess. The rules are in `equation_rules`, the search for them in `equation_search`.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from substrate.answers import extract
from substrate.tasks import equation_rules as rules
from substrate.tasks.equation_rules import ALPHABET, SIGN, STYLES, Style
from substrate.tasks.equation_search import HOLE, REPEATED, Line, Reading, Search
from substrate.tasks.protocol import Solution, check_style

HEADER = (
    "In Alice's Wonderland, a secret set of transformation rules is applied to equations. Below are a few examples:\n"
)
BECOMES = " = "
QUESTION = "\nNow, determine the result for: "
PHRASES = (HEADER, BECOMES, QUESTION)

_DIGITS = "0123456789"
_ONE = f"[0-9{re.escape(ALPHABET)}]"
_EXAMPLE = f"({_ONE}{{5}}){BECOMES}({_ONE}{{1,5}})"
_PROMPT = re.compile(f"{re.escape(HEADER)}({_EXAMPLE}(?:\n{_EXAMPLE})*){QUESTION}(?P<query>{_ONE}{{5}})")
_NUM_OPERATORS = 3  # of a row, from which each line and the question draw one


@dataclass(frozen=True)
class Level:
    """Parameters of `generate`."""

    num_examples: tuple[int, int]  # fewest and most
    symbols: float  # share of the puzzles in which symbols stand for digits
    styles: tuple[Style, ...]


_SMALL_STYLE = Style("forwards", 1.0, 0.0, {"": {"a+b": 1, "a,b": 1, "|a-b|": 1}})
LEVELS = {"small": Level((3, 4), 0.0, (_SMALL_STYLE,)), "full": Level((3, 5), 0.56, STYLES)}


@dataclass(frozen=True)
class Puzzle:
    """Pairs of left side and result, and the left side asked for."""

    examples: tuple[tuple[str, str], ...]
    query: str


def parse(prompt: str) -> Puzzle:
    """Reads a prompt in the competition's form. Raises ValueError for any other text."""
    match = _PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError("this text is not a prompt of family equation")
    return Puzzle(tuple(re.findall(_EXAMPLE, match[1])), match["query"])


def render(puzzle: Puzzle) -> str:
    """Prints the puzzle; the inverse of `parse`, byte for byte."""
    lines = "\n".join(f"{left}{BECOMES}{result}" for left, result in puzzle.examples)
    return f"{HEADER}{lines}{QUESTION}{puzzle.query}"


def generate(rng: random.Random, level: str) -> Puzzle:
    """Draws puzzles until all readings agree on an answer that the scorer can read from its box."""
    while True:
        puzzle = _draw(rng, LEVELS[level])
        if (
            puzzle
            and (solution := solve(puzzle)).determined
            and extract(f"\\boxed{{{solution.answer}}}") == solution.answer
        ):
            return puzzle


def solve(puzzle: Puzzle) -> Solution:
    """Returns the likeliest answer over all readings of the examples; determined if it is the only one."""
    return _solved(puzzle)[0]


def features(puzzle: Puzzle) -> dict[str, Sequence[float | str]]:
    """Returns kind and operators and, with digits, operands and the operations on which all readings agree."""
    operators = {left[2] for left, _ in puzzle.examples}
    found: dict[str, Sequence[float | str]] = {
        "kind": ["digits" if _has_digits(puzzle) else "symbols"],
        "number of operators": [str(len(operators))],
        "operators": ["natural" if each in rules.NATURAL else "other" for each in operators],
    }
    if _has_digits(puzzle):
        found["operands"] = [float(side) for left, _ in puzzle.examples for side in (left[:2], left[3:])]
        found["operations"] = list(_only_operations(puzzle))
    return found


def trace(puzzle: Puzzle, style: str) -> str:
    r"""Writes direction and operations; `stepwise` then reads each line, computes, and writes the result.

    line                                    digits
    / a-b                                   * a*b-1 - -|a-b|
    34/44 44-43 1 1                         ` 1 ! 0 [ 5 ...
    41/32 23-14 9 9                         `!*[{ 01*58-1 57 '"[
    69/52 25-96 -71 17/                     [[-!' -|55-60| -5 @&
    17/                                     @&
    """
    check_style(style)
    solution, reading = _solved(puzzle)
    if reading is None:
        return solution.answer
    operators = dict.fromkeys([left[2] for left, _ in puzzle.examples] + [puzzle.query[2]])
    lines = [reading.direction, " ".join(f"{each} {reading.operations[each]}" for each in operators)]
    if style == "stepwise":
        if not _has_digits(puzzle):
            lines.append(" ".join(f"{symbol} {digit}" for symbol, digit in reading.digits.items()))
        lines += [
            _worked(reading, left, result) for left, result in [*puzzle.examples, (puzzle.query, solution.answer)]
        ]
    return "\n".join([*lines, solution.answer])


def _worked(reading: Reading, left: str, result: str) -> str:
    """Writes one line: left side, the calculation in digits as read, its value, the result as written."""
    digits = "".join(reading.digits[each] for each in left[:2] + left[3:])
    operation = reading.operations[left[2]]
    a, b = rules.operands(reading.direction, digits[:2], digits[2:])
    low, high = sorted((a, b), key=int)
    text = operation.replace("max", high).replace("min", low)
    text = re.sub("[ab]", lambda name: {"a": a, "b": b}[name[0]], text)
    return f"{left} {text} {rules.value(operation, a, b).replace(SIGN, '-')} {result}"


def _only_operations(puzzle: Puzzle) -> Iterator[str]:
    """Yields direction and operation of each operator on which all readings of the examples agree."""
    lines = [_line(*example) for example in puzzle.examples]
    found = list(Search(lines, lines[0], {digit: digit for digit in _DIGITS}).readings())
    for operator in {line.operator for line in lines}:
        ways = {f"{reading.direction} {reading.operations[operator]}" for reading in found}
        if len(ways) == 1:
            yield ways.pop()


def _has_digits(puzzle: Puzzle) -> bool:
    """Whether the operands are written in digits, not in symbols."""
    return all(
        each in _DIGITS
        for left in [*(left for left, _ in puzzle.examples), puzzle.query]
        for each in left[:2] + left[3:]
    )


def _line(left: str, result: str = "") -> Line:
    return Line(left[:2] + left[3:], left[2], result.replace(left[2], SIGN))


@lru_cache(maxsize=2048)  # callers solve a puzzle and then ask for its trace
def _solved(puzzle: Puzzle) -> tuple[Solution, Reading | None]:
    """Returns the solution and the likeliest reading that leads to it; no reading if none fits the examples."""
    known = {digit: digit for digit in _DIGITS} if _has_digits(puzzle) else {}
    search = Search([_line(*example) for example in puzzle.examples], _line(puzzle.query), known)
    votes: dict[str, float] = defaultdict(float)
    likeliest: dict[str, Reading] = {}
    for reading in search.readings():
        votes[reading.answer] += reading.weight
        if reading.answer not in likeliest or reading.weight > likeliest[reading.answer].weight:
            likeliest[reading.answer] = reading
    if not votes:
        return Solution(puzzle.query, determined=False), None
    best = max(votes, key=votes.__getitem__)
    determined = len(votes) == 1 and search.is_complete and HOLE not in best
    shown = set(render(puzzle))
    unseen = next(each for each in ALPHABET if each not in shown)
    return Solution(best.replace(SIGN, puzzle.query[2]).replace(HOLE, unseen), determined), likeliest[best]


def _draw(rng: random.Random, level: Level) -> Puzzle | None:
    """Draws a puzzle; None if the question is one of the examples or shares no operator with them."""
    in_symbols = rng.random() < level.symbols
    style = rng.choices(level.styles, [each.share_of_symbols if in_symbols else each.share for each in level.styles])[0]
    signs = [each for each in style.weights if each] or list(ALPHABET)
    operators = rng.sample(signs, _NUM_OPERATORS)
    operations: dict[str, str] = {}
    for operator in operators:
        chances = {
            name: chance * (REPEATED if name in operations.values() else 1)
            for name, chance in style.operations(operator).items()
        }
        operations[operator] = rng.choices(list(chances), list(chances.values()))[0]
    lines = [(_side(rng, style), rng.choice(operators)) for _ in range(rng.randint(*level.num_examples))]
    query = _side(rng, style), rng.choice(operators)
    if query in lines or query[1] not in dict(lines).values():
        return None
    symbols = [each for each in ALPHABET if each not in {*operators, *style.weights}]
    written = dict(zip(_DIGITS, rng.sample(symbols, len(_DIGITS)), strict=True))
    names = str.maketrans(written if in_symbols else {})
    examples = []
    for digits, operator in lines:
        result = rules.results(style.direction, operations[operator])[digits]
        examples.append((_left(digits, operator, names), result.translate(names).replace(SIGN, operator)))
    return Puzzle(tuple(examples), _left(*query, names))


def _left(digits: str, operator: str, names: dict[int, str]) -> str:
    written = digits.translate(names)
    return f"{written[:2]}{operator}{written[2:]}"


def _side(rng: random.Random, style: Style) -> str:
    """Draws the four digits of a line's operands, as written."""
    return rng.choice(rules.sides(style.direction))
