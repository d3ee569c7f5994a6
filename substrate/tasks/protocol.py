"""What a puzzle family must offer, so that items, training data and tokenizer need not know which family they handle.

A family is a module with the names of `Family`. It reads a prompt into a typed puzzle, prints the puzzle back byte for
byte, draws a new one, solves one, and writes down the reasoning. Like a contestant, the solver sees the prompt alone:

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
    """The answer that the prompt's examples lead to."""

    answer: str  # as the competition prints it
    determined: bool  # whether the scorer counts every answer that the examples allow as equal to this one


class Family(Protocol):
    """One kind of puzzle, as a module; `Any` stands for the module's own frozen `Puzzle`."""

    @property
    def PHRASES(self) -> tuple[str, ...]:
        """The fixed strings of the template; each is one token of the tiny model's tokenizer."""

    @property
    def LEVELS(self) -> Mapping[str, Any]:
        """Parameters of the generator: `full` follows the competition's rows, `small` suits the tiny model."""

    def parse(self, prompt: str) -> Any:
        """Reads a prompt in the competition's form. Raises ValueError for any other text."""

    def render(self, puzzle: Any) -> str:
        """Prints the puzzle; the inverse of `parse`, byte for byte."""

    def generate(self, rng: random.Random, level: str) -> Any:
        """Draws a puzzle whose answer is determined."""

    def solve(self, puzzle: Any) -> Solution:
        """Solves the puzzle from the prompt's content alone."""

    def features(self, puzzle: Any) -> Mapping[str, Sequence[float | str]]:
        """Returns, by name, the numbers or classes whose distribution must equal that of the real rows."""

    def trace(self, puzzle: Any, style: str) -> str:
        """Returns the reasoning before the answer: `stepwise` in small steps, `short` without them."""


def check_style(style: str) -> None:
    """Raises ValueError unless `style` is one of `STYLES`."""
    if style not in STYLES:
        raise ValueError(f"trace style is {style!r}; valid: {', '.join(STYLES)}")
