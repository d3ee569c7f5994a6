"""Searches a row of equations for its readings: direction, operations, and digits of symbols that fit every line.

For each operation a line has a list of the digits that its symbols can stand for; `by_shape` has these ready, so no
arithmetic is done here. The lists are joined line by line, the line with the fewest candidates first, and only with
digits that earlier lines allow. A reading's weight is how often the real rows use its operations, and the likeliest
answer is the one whose readings have the largest total weight.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from substrate.tasks.equation_rules import SIGN, STYLES, by_shape, results, shape

MAX_NODES = 20_000  # most partial readings that are tried; a row with more is answered from those
REPEATED = 0.05  # factor on the chance of an operation that another operator has already
HOLE = "\0"  # in an answer, stands for a digit whose symbol no line shows


@dataclass(frozen=True)
class Line:
    """`34/44 = 1`, or a question, whose result is empty."""

    digits: str  # 3444: the operands' four characters
    operator: str
    result: str  # with SIGN where the operator stands for a minus


@dataclass(frozen=True)
class Reading:
    """One way to read a row."""

    direction: str
    operations: Mapping[str, str]  # operator -> operation
    digits: Mapping[str, str]  # symbol -> digit
    answer: str  # with SIGN, and HOLE for unknown symbols
    weight: float


@dataclass
class Search:
    """A search for all readings of some lines and a question."""

    lines: Sequence[Line]
    question: Line
    known: Mapping[str, str]  # symbol -> digit where it is given; digits stand for themselves
    num_nodes: int = 0
    _lists: dict[tuple[int, str, tuple[int, ...]], Mapping[str, list[str]]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the search was not cut short, so that every reading was found."""
        return self.num_nodes <= MAX_NODES

    def readings(self) -> Iterator[Reading]:
        """Yields every reading; stops after MAX_NODES partial ones."""
        for style in STYLES:
            operators = {line.operator for line in [*self.lines, self.question]}
            self._weights = {each: style.operations(each) for each in operators}
            self._direction = style.direction
            self._symbols = [_symbols(line) for line in self.lines]
            self._lists.clear()
            self._possible = {
                operator: [
                    operation
                    for operation in self._weights[operator]
                    if all(
                        self._candidates(number, operation, ())
                        for number, line in enumerate(self.lines)
                        if line.operator == operator
                    )
                ]
                for operator in operators
            }
            yield from self._join(
                tuple(range(len(self.lines))),
                dict(self.known),
                {},
                style.share if self.known else style.share_of_symbols,
            )

    def _candidates(self, number: int, operation: str, positions: tuple[int, ...]) -> Mapping[str, list[str]]:
        """Returns, for a line, the digits at `positions` -> all digits that its symbols can stand for."""
        key = number, operation, positions
        if key not in self._lists:
            line = self.lines[number]
            found = defaultdict(list)
            for digits in by_shape(self._direction, operation).get(shape(f"{line.digits}={line.result}"), ()):
                found["".join(digits[position] for position in positions)].append(digits)
            self._lists[key] = found
        return self._lists[key]

    def _join(
        self, open_lines: tuple[int, ...], digits: dict[str, str], operations: dict[str, str], weight: float
    ) -> Iterator[Reading]:
        self.num_nodes += 1
        if not self.is_complete:
            return
        if not open_lines:
            yield from self._answers(digits, operations, weight)
            return
        number, choices = min(
            ((each, self._choices(each, digits, operations)) for each in open_lines),
            key=lambda line: sum(len(found) for _, found in line[1]),
        )
        operator, symbols, taken = self.lines[number].operator, self._symbols[number], set(digits.values())
        rest = tuple(each for each in open_lines if each != number)
        for operation, found in choices:
            factor = 1.0 if operator in operations else self._chance(operator, operation, operations)
            chosen = operations | {operator: operation}
            for candidate in found:
                new = {symbol: digit for symbol, digit in zip(symbols, candidate, strict=True) if symbol not in digits}
                if taken.isdisjoint(new.values()):
                    yield from self._join(rest, digits | new, chosen, weight * factor)

    def _choices(
        self, number: int, digits: Mapping[str, str], operations: Mapping[str, str]
    ) -> list[tuple[str, list[str]]]:
        """Returns the candidates of a line that agree with the digits so far, by operation."""
        operator, symbols = self.lines[number].operator, self._symbols[number]
        positions = tuple(place for place, symbol in enumerate(symbols) if symbol in digits)
        key = "".join(digits[symbols[place]] for place in positions)
        possible = [operations[operator]] if operator in operations else self._possible[operator]
        lists = ((each, self._candidates(number, each, positions).get(key)) for each in possible)
        return [(operation, found) for operation, found in lists if found]

    def _chance(self, operator: str, operation: str, operations: Mapping[str, str]) -> float:
        """Returns the weight of an operation for one more operator; the real rows hardly ever have one twice."""
        return self._weights[operator][operation] * (REPEATED if operation in operations.values() else 1.0)

    def _answers(self, digits: dict[str, str], operations: dict[str, str], weight: float) -> Iterator[Reading]:
        """Yields the readings of the question under a reading of all lines, one for each way to read what no line shows."""
        operator = self.question.operator
        possible = (
            {operations[operator]: 1.0}
            if operator in operations
            else {each: self._chance(operator, each, operations) for each in self._weights[operator]}
        )
        unseen = [symbol for symbol in dict.fromkeys(self.question.digits) if symbol not in digits]
        free = [digit for digit in "0123456789" if digit not in digits.values()]
        ways = list(permutations(free, len(unseen)))
        for way in ways:
            complete = digits | dict(zip(unseen, way, strict=True))
            symbols = {digit: symbol for symbol, digit in complete.items()} | {SIGN: SIGN}
            operands = "".join(complete[symbol] for symbol in self.question.digits)
            for operation, factor in possible.items():
                result = results(self._direction, operation).get(operands)
                if result is not None:
                    answer = "".join(symbols.get(each, HOLE) for each in result)
                    chosen = operations | {operator: operation}
                    yield Reading(self._direction, chosen, complete, answer, weight * factor / len(ways))


def _symbols(line: Line) -> str:
    """Returns a line's different symbols in order of appearance."""
    return "".join(dict.fromkeys(each for each in line.digits + line.result if each != SIGN))
