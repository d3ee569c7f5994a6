"""Critical values of a design: from constitution/nulls, or bounds that hold without a simulation.

Each file holds one design, its critical values with their Monte-Carlo error, the false alarms of each null, and the digests of the code and
of the result; `make nulls` makes them anew. A campaign freezes the values that it was started with; none is ever looked up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from math import log
from pathlib import Path
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import IntegrityError, NotFound
from pipeline.campaign.layout import CODE_ROOT
from pipeline.stats.design import CriticalValues, Design

HERE = CODE_ROOT / "constitution" / "nulls"
GRID = (
    Design(),
    Design(submissions=2),
    Design(board_rows=0, submissions=0),
    Design(dev_items=100, fresh_items=100, submissions=2),
    Design(dev_items=1000, fresh_items=1000, submissions=2),
    Design(rounds=8, submissions=2),
    Design(rounds=8, board_rows=250, submissions=2),
    Design(rounds=8, board_rows=0, submissions=0),
    Design(families=3, dev_items=100, fresh_items=100, board_rows=0, submissions=0),
    Design(families=3, dev_items=100, fresh_items=100, board_rows=300, submissions=2),
    Design(rounds=8, families=3, dev_items=100, fresh_items=100, board_rows=0, submissions=0),
    Design(rounds=8, families=3, dev_items=100, fresh_items=100, board_rows=300, submissions=2),
)
"""The designs that ship. The full competition form and the demo, four rounds and the constitution's eight, with and without a board."""


def file_name(design: Design) -> str:
    """r4_a8_f6_d300_s300_b1000_k4.json: rounds, arms, families, dev and fresh (sealed) items, board rows, submissions."""
    letters = {
        "rounds": "r",
        "arms": "a",
        "families": "f",
        "dev_items": "d",
        "fresh_items": "s",
        "board_rows": "b",
        "submissions": "k",
    }
    return "_".join(f"{letters[name]}{value}" for name, value in design.to_json().items()) + ".json"


def critical_values(design: Design, folder: Path = HERE) -> CriticalValues:
    """Of a design on the grid. Raises NotFound naming the nearest one, IntegrityError when its file is damaged."""
    return CriticalValues.from_json(read_critical_values(design, folder)["critical"])


def read_critical_values(design: Design, folder: Path = HERE) -> dict[str, Any]:
    """The whole file of a design on the grid. Raises as `critical_values`."""
    path = folder / file_name(design)
    known = sorted(folder.glob("r*.json"))
    if path not in known:
        nearest = min(GRID, key=lambda other: distance(design, other))
        raise NotFound(
            f"no critical values were simulated for {design}",
            f"The nearest of {len(known)} designs is {nearest}; `python -m pipeline evidence nulls` computes this one",
        )
    try:
        content: dict[str, Any] = strict_json.read(path.read_bytes())
        if content["schema"] != 1 or Design(**content["design"]) != design:
            raise ValueError(f"it is of schema {content['schema']} and for {content['design']}")
        CriticalValues.from_json(content["critical"])
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise IntegrityError(f"{path} holds no critical values ({error})", "`make nulls` makes it anew") from error
    return content


def bounds(design: Design, alpha: Fraction = Fraction(44, 1000)) -> dict[str, str]:
    """Critical values that need no simulation: Bonferroni for gap and arm, Ville's inequality for E (under the healthy model alone).

    For designs off the grid. They spend what the simulated ones spend, 1.8 + 0.4 + 2.2 % of a campaign (3.4 + 0.4 without a
    board), and cost power: C2 half of it.
    """
    gap, arm, board = (alpha * Fraction(part, 44) for part in (18, 4, 22))
    looks = Fraction(design.rounds * (design.rounds + 1), 2)
    if not (design.board_rows and design.submissions):
        gap = alpha * Fraction(34, 44)
    return {
        "gap_level": _text(gap / looks, ROUND_FLOOR),
        "gap_suspect_level": _text(Fraction(1, 20) / looks, ROUND_FLOOR),
        "arm_level": _text(arm / (design.rounds * design.arms), ROUND_FLOOR),
        "leak_level": _text(Fraction(1, 40) / looks, ROUND_FLOOR),
        "board_alarm": _text(1 / board, ROUND_CEILING),
        "board_suspect": "20",
    }


def distance(one: Design, other: Design) -> float:
    """Sum of the logarithms of the ratios; only for naming the nearest."""
    pairs: Mapping[str, int] = other.to_json()
    return sum(abs(log((value + 1) / (pairs[name] + 1))) for name, value in one.to_json().items())


def _text(value: Fraction, rounding: str) -> str:
    number = Decimal(value.numerator) / Decimal(value.denominator)
    return format(number.quantize(Decimal(1).scaleb(number.adjusted() - 3), rounding=rounding), "f")
