"""What a puzzle family must offer, so that items, training data and tokenizer never know which family they handle.

A family is a module with the names of `Family`: it can read a prompt into a typed puzzle, print the puzzle back byte
for byte, draw a new one, solve one, and write down how. The solver sees only what the prompt shows, as a contestant
does:

    puzzle = roman.parse(prompt)          Puzzle(examples=((11, 'XI'), (15, 'XV')), query=38)
    roman.render(puzzle) == prompt
    roman.solve(puzzle)                   Solution(answer='XXXVIII', determined=True)
    roman.trace(puzzle, 'stepwise')       '30 XXX\\n8 VIII\\nXXXVIII'
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

STYLES = ("short", "stepwise")


@dataclass(frozen=True)
class Solution:
    """What the prompt's examples lead to."""

    answer: str  # in the printed form
    determined: bool  # the examples leave no other answer, or only such as the scorer takes for equal


class Family(Protocol):
    """One kind of puzzle. Modules satisfy it; `Any` stands for the module's own frozen `Puzzle`."""

    @property
    def PHRASES(self) -> tuple[str, ...]:
        """Fixed strings of the template: one token each in the tiny model's tokenizer."""

    @property
    def LEVELS(self) -> Mapping[str, Any]:
        """The generator's parameters: `full` follows the competition's rows, `small` suits the tiny model."""

    def parse(self, prompt: str) -> Any:
        """Read a prompt in the competition's form; ValueError for any other text."""

    def render(self, puzzle: Any) -> str:
        """Print the puzzle; inverse of `parse`, byte for byte."""

    def generate(self, rng: random.Random, level: str) -> Any:
        """Draw a puzzle whose answer is determined."""

    def solve(self, puzzle: Any) -> Solution:
        """Answer from the prompt's content alone."""

    def features(self, puzzle: Any) -> Mapping[str, Sequence[float | str]]:
        """What generated puzzles must share with the real rows: numbers, or names of classes, by what they are."""

    def trace(self, puzzle: Any, style: str) -> str:
        """The reasoning before the answer: `stepwise` is one small step per token, `short` leaves the steps out."""


def check_style(style: str) -> None:
    """ValueError unless `style` is one of `STYLES`."""
    if style not in STYLES:
        raise ValueError(f"trace style {style!r}; valid: {', '.join(STYLES)}")
