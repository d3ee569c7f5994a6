"""The hidden rules of the equation family: how a line is read, what an operator does, how the result is written.

    69/52 = 17/    read from the right (25 and 96), subtracted (-71), written from the right, the sign as the operator

A line has two operands of two digits and an operator between them. A row has one *direction* for all of its lines and
one *operation* for each operator. Both were derived from the real rows of the NVIDIA Nemotron Model Reasoning Challenge,
of which all 652 with digits follow them. Where symbols stand for digits, the rules hold for the digits.

    forwards    34/44 is 34 and 44, the result written as it is
    digits      34/44 is 43 and 44: each operand backwards; the result's digits backwards, the sign in front
    line        34/44 is 44 and 43: the whole line backwards; the result with its sign backwards

Numbers as read are uniform on 10..99, so `01` is written only where digits run backwards. A minus sign is written as
the line's operator, here `SIGN`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

SIGN = "~"  # stands for the line's operator in a result; the real rows have no tilde

# Operation, as traces write it -> its value. The operations in JOINED make texts, not numbers.
_VALUES: Mapping[str, Callable[[int, int], int]] = {
    "a+b": lambda a, b: a + b,
    "a+b+1": lambda a, b: a + b + 1,
    "a+b-1": lambda a, b: a + b - 1,
    "a*b": lambda a, b: a * b,
    "a*b+1": lambda a, b: a * b + 1,
    "a*b-1": lambda a, b: a * b - 1,
    "a-b": lambda a, b: a - b,
    "|a-b|": lambda a, b: abs(a - b),
    "-|a-b|": lambda a, b: -abs(a - b),
    "max%min": lambda a, b: max(a, b) % min(a, b),
}
JOINED = ("a,b", "b,a")

ALPHABET = "!\"#$%&'()*+-/:<>?@[\\]^`{|}"  # of which operators, and symbols for digits, are drawn
NATURAL = "+-*"  # operators that the first style uses roughly in their usual meaning


@dataclass(frozen=True)
class Style:
    """A kind of row: its direction, and how likely an operator has each operation.

    Weights are counts over the real rows with digits; expected counts if examples allow several readings.
    """

    direction: str
    share: float  # of the real rows with digits
    share_of_symbols: float  # of the real rows where symbols stand for digits, estimated from their operators
    weights: Mapping[str, Mapping[str, int]]  # operator, or "" for any of ALPHABET -> operation -> weight

    def operations(self, operator: str) -> Mapping[str, float]:
        """Returns operation -> chance that the operator is drawn and has it; empty if the style lacks the operator."""
        chance = 1 / len(ALPHABET) if "" in self.weights else 1 / len(self.weights)
        weights = self.weights.get(operator, self.weights.get("", {}))
        return {operation: chance * weight / sum(weights.values()) for operation, weight in weights.items()}


STYLES = (
    Style(
        "digits",
        0.41,
        0.66,
        {
            "+": {"a,b": 49, "a+b": 74, "a+b+1": 45, "a+b-1": 34},
            "-": {"a-b": 90, "-|a-b|": 51, "|a-b|": 35, "max%min": 36},
            "*": {"a,b": 46, "a*b": 65, "a*b+1": 48, "a*b-1": 37},
        },
    ),
    Style(
        "digits",
        0.17,
        0.1,
        {
            "": {
                "a+b": 57,
                "a*b": 57,
                "a-b": 43,
                "a,b": 15,
                "max%min": 15,
                "a*b-1": 14,
                "|a-b|": 14,
                "a*b+1": 11,
                "a+b-1": 10,
                "b,a": 6,
                "a+b+1": 6,
                "-|a-b|": 2,
            }
        },
    ),
    Style(
        "line",
        0.14,
        0.09,
        {
            "": {
                "a-b": 47,
                "a+b": 40,
                "a*b": 38,
                "a,b": 14,
                "a*b-1": 12,
                "-|a-b|": 10,
                "b,a": 6,
                "a+b+1": 5,
                "a*b+1": 4,
                "a+b-1": 3,
            }
        },
    ),
    Style(
        "forwards",
        0.34,
        0.21,
        {
            "": {
                "a,b": 81,
                "a*b": 68,
                "a-b": 58,
                "a+b": 53,
                "a+b+1": 49,
                "-|a-b|": 48,
                "|a-b|": 46,
                "max%min": 42,
                "a*b+1": 42,
                "a*b-1": 40,
                "a+b-1": 39,
            }
        },
    ),
)


def operands(direction: str, left: str, right: str) -> tuple[str, str]:
    """Returns the two numbers as read, as texts of two digits."""
    if direction == "forwards":
        return left, right
    return (left[::-1], right[::-1]) if direction == "digits" else (right[::-1], left[::-1])


def value(operation: str, a: str, b: str) -> str:
    """Returns the result of two numbers as read, with SIGN for a minus."""
    if operation in JOINED:
        return a + b if operation == "a,b" else b + a
    return str(_VALUES[operation](int(a), int(b))).replace("-", SIGN)


def written(direction: str, text: str) -> str:
    """Returns the result as the line writes it."""
    if direction == "forwards":
        return text
    return SIGN + text[:0:-1] if direction == "digits" and text.startswith(SIGN) else text[::-1]


@cache
def sides(direction: str) -> tuple[str, ...]:
    """Returns the operands' four digits as lines can have them, so that each number, as read, is from 10 to 99."""
    numbers = [str(number) for number in range(10, 100)]
    return tuple("".join(operands(direction, left, right)) for left in numbers for right in numbers)


@cache
def results(direction: str, operation: str) -> Mapping[str, str]:
    """Returns four digits, as the line has them, -> the result as written."""
    found = {}
    for digits in sides(direction):
        text = value(operation, *operands(direction, digits[:2], digits[2:]))
        found[digits] = written(direction, text)
    return found


@cache
def by_shape(direction: str, operation: str) -> Mapping[str, list[str]]:
    """Returns the shape of a line's digits and result -> all digits that the letters of the shape can stand for.

    34/44 = 1 has the shape `abbb=c`, so "341" is one of the texts for that shape.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for digits, result in results(direction, operation).items():
        line = f"{digits}={result}"
        found[shape(line)].append("".join(dict.fromkeys(each for each in line if each not in f"={SIGN}")))
    return found


def shape(line: str) -> str:
    """Returns the line with its first new character as `a`, its next as `b`, ...; `=` and SIGN stay."""
    letters: dict[str, str] = {"=": "=", SIGN: SIGN}
    return "".join(letters.setdefault(each, chr(ord("a") + len(letters) - 2)) for each in line)
