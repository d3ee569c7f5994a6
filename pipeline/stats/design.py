"""What a campaign's power depends on (rounds, arms, items, board rows, submissions, families), and the critical values that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

REFERENCE_LEVELS = tuple(Decimal(text) for text in ("0.95", "0.92", "0.85", "0.75", "0.60", "0.30"))
"""Accuracies of the reference that the nulls are simulated with (statistics.md 5.1); other numbers of families are read off this line."""


@dataclass(frozen=True)
class Design:
    """`dev_items` and `fresh_items` are per family; `board_rows` 0: no external target; `submissions` are scored arms a round."""

    rounds: int = 4
    arms: int = 8
    families: int = 6
    dev_items: int = 300
    fresh_items: int = 300
    board_rows: int = 1000
    submissions: int = 4

    @property
    def accuracies(self) -> tuple[Decimal, ...]:
        """Of the reference, by family, the strongest first."""
        if self.families == 1:
            return (REFERENCE_LEVELS[3],)
        last = len(REFERENCE_LEVELS) - 1
        places = [Decimal(i) * last / (self.families - 1) for i in range(self.families)]
        return tuple(_between(place) for place in places)

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class CriticalValues:
    """Levels are those of one test (families share them by headroom); `board_*` are values of E, all of the campaign's largest."""

    gap_level: Fraction
    gap_suspect_level: Fraction
    arm_level: Fraction
    leak_level: Fraction
    board_alarm: Decimal
    board_suspect: Decimal

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CriticalValues:
        """Decimal strings, as constitution/nulls and a campaign's frozen facts hold them. Raises KeyError, TypeError, ArithmeticError, ValueError."""
        found = cls(
            gap_level=Fraction(data["gap_level"]),
            gap_suspect_level=Fraction(data["gap_suspect_level"]),
            arm_level=Fraction(data["arm_level"]),
            leak_level=Fraction(data["leak_level"]),
            board_alarm=Decimal(data["board_alarm"]),
            board_suspect=Decimal(data["board_suspect"]),
        )
        if min(found.board_alarm, found.board_suspect) < 1:
            raise ValueError("board_alarm and board_suspect: at least 1, which is E before any score")
        return found


def _between(place: Decimal) -> Decimal:
    low = min(int(place), len(REFERENCE_LEVELS) - 2)
    return REFERENCE_LEVELS[low] + (place - low) * (REFERENCE_LEVELS[low + 1] - REFERENCE_LEVELS[low])
