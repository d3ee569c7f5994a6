"""The critical values of a design: simulated ones from constitution/nulls, or bounds that hold without a simulation.

A file holds one design, its critical values with their Monte-Carlo error, the rate of false alarms under each null, and the digests of
the code and of the result. `make nulls` computes the files again. A campaign freezes its critical values at `init` and never reads
these files afterwards.
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
from pipeline.stats.decimal_math import decimal_of, exactly
from pipeline.stats.design import CriticalValues, Design

HERE = CODE_ROOT / "constitution" / "nulls"
E_VALUES = "e_values.json"
"""The file in `HERE` that `e_divisor` reads."""
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
"""The designs that ship: the full competition and the demo, with four rounds or the constitution's eight, with and without a board."""


def file_name(design: Design) -> str:
    """The name of a design's file, such as r4_a8_f6_d300_s300_b1000_k4.json.

    The letters stand for rounds, arms, families, dev items, fresh items, board rows and submissions.
    """
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
    """Read the simulated critical values of a design.

    Raises NotFound, which names the nearest design, where the folder has no file of this one, and IntegrityError where the file is damaged.
    """
    return CriticalValues.from_json(read_critical_values(design, folder)["critical"])


def read_critical_values(design: Design, folder: Path = HERE) -> dict[str, Any]:
    """Read the whole file of a design. Raises as `critical_values` does."""
    path = folder / file_name(design)
    known = sorted(folder.glob("r*.json"))
    if path not in known:
        nearest = min(GRID, key=lambda other: distance(design, other))
        raise NotFound(
            f"There are no simulated critical values for {design}",
            f"The nearest of {len(known)} designs is {nearest}; `python -m pipeline evidence nulls --write --design ...` computes the missing one",
        )
    try:
        content: dict[str, Any] = strict_json.read(path.read_bytes())
        if content["schema"] != 1 or Design(**content["design"]) != design:
            raise ValueError(f"it has schema {content['schema']} and is for {content['design']}")
        CriticalValues.from_json(content["critical"])
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise IntegrityError(
            f"{path} holds no critical values ({error})", "Restore it, or compute it again with `make nulls`"
        ) from error
    return content


def of_design(design: Design) -> tuple[dict[str, str], str]:
    """(critical values, their source): the simulated values of a design that ships, else bounds that need no simulation."""
    try:
        content = read_critical_values(design)
    except NotFound:
        command = "`python -m pipeline evidence nulls --write --design ...` computes sharper ones"
        return bounds(design), f"bounds: Bonferroni and Ville; {command}"
    return content[
        "critical"
    ], f"constitution/nulls/{file_name(design)}: {content['campaigns_per_null']} campaigns of each null"


def e_divisor(design: Design, folder: Path = HERE) -> Decimal:
    """What the board test's E is divided by where campaigns of this design are combined, at least 1.

    It is the largest mean that E had in simulated campaigns in which nothing is wrong: in small designs that is above 1. Raises NotFound for
    a design that was not simulated, and IntegrityError where the file is damaged.
    """
    path = folder / E_VALUES
    try:
        designs = strict_json.read(path.read_bytes())["designs"]
        if file_name(design) not in designs:
            raise NotFound(
                f"No simulation says how large E is for {design} where nothing is wrong",
                "`python -m pipeline evidence e-values --write --design ...` simulates it",
            )
        value = Decimal(designs[file_name(design)]["divisor"])
        if value < 1:
            raise ValueError(f"the divisor {value} is below 1")
        return value
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise IntegrityError(
            f"{path} holds no divisors of E ({error})",
            "Restore it, or compute it again with `evidence e-values --write`",
        ) from error


def bounds(design: Design, alpha: Fraction = Fraction(44, 1000)) -> dict[str, str]:
    """Critical values for a design that has no file, without a simulation.

    Gap and arm tests use Bonferroni, and E uses Ville's inequality, which holds under the healthy model alone. Together they raise a false
    alarm in at most `alpha` of the campaigns: of 4.4 %, gaps get 1.8, arms 0.4 and the board 2.2 (without a board, 3.4 and 0.4). They
    cost power: the board test loses half of its own.
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
    """The sum of the absolute logarithms of the ratios. It serves only to name the nearest design."""
    pairs: Mapping[str, int] = other.to_json()
    return sum(abs(log((value + 1) / (pairs[name] + 1))) for name, value in one.to_json().items())


def _text(value: Fraction, rounding: str) -> str:
    with exactly():
        number = decimal_of(value)
        return format(number.quantize(Decimal(1).scaleb(number.adjusted() - 3), rounding=rounding), "f")
