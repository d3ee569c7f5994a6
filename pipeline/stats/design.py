"""The design of a campaign (rounds, arms, items, board rows), which sets the power of its tests, and the critical values for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

REFERENCE_LEVELS = tuple(Decimal(text) for text in ("0.95", "0.92", "0.85", "0.75", "0.60", "0.30"))
"""The reference's accuracies in the six families of the simulated nulls (statistics.md 5.1). For another number of families they are interpolated."""


@dataclass(frozen=True)
class Design:
    """The size of a campaign.

    `dev_items` and `fresh_items` are numbers of items in one family. `board_rows` is the number of hidden items of the external target;
    0 means that there is no target. `submissions` is the number of arms that the target scores in one round.
    """

    rounds: int = 4
    arms: int = 8
    families: int = 6
    dev_items: int = 300
    fresh_items: int = 300
    board_rows: int = 1000
    submissions: int = 4

    @property
    def accuracies(self) -> tuple[Decimal, ...]:
        """The reference's simulated accuracy in each family, the highest first."""
        if self.families == 1:
            return (REFERENCE_LEVELS[3],)
        last = len(REFERENCE_LEVELS) - 1
        places = [Decimal(i) * last / (self.families - 1) for i in range(self.families)]
        return tuple(_between(place) for place in places)

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class CriticalValues:
    """The thresholds of the tests.

    The `*_level` fields are significance levels of one test at one look; the families divide a level in proportion to their headroom.
    The `board_*` fields are thresholds of the board test's E.
    """

    gap_level: Fraction
    gap_suspect_level: Fraction
    arm_level: Fraction
    leak_level: Fraction
    board_alarm: Decimal
    board_suspect: Decimal

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CriticalValues:
        """Read the decimal strings of a file in constitution/nulls or of a campaign's frozen facts.

        Raises KeyError, TypeError, ArithmeticError or ValueError where a value is absent, is no number, or is an E below 1.
        """
        values = cls(
            gap_level=Fraction(data["gap_level"]),
            gap_suspect_level=Fraction(data["gap_suspect_level"]),
            arm_level=Fraction(data["arm_level"]),
            leak_level=Fraction(data["leak_level"]),
            board_alarm=Decimal(data["board_alarm"]),
            board_suspect=Decimal(data["board_suspect"]),
        )
        if min(values.board_alarm, values.board_suspect) < 1:
            raise ValueError("board_alarm and board_suspect must be at least 1, because E is 1 before any score")
        return values


def _between(place: Decimal) -> Decimal:
    """Interpolate REFERENCE_LEVELS linearly at a position from 0 to 5."""
    low = min(int(place), len(REFERENCE_LEVELS) - 2)
    return REFERENCE_LEVELS[low] + (place - low) * (REFERENCE_LEVELS[low + 1] - REFERENCE_LEVELS[low])
