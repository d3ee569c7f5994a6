"""Print digits of exact verdicts on a few fixed ledgers, made without numpy's random numbers, to compare environments."""

from __future__ import annotations

import hashlib
from decimal import Decimal

from pipeline.stats import alarms
from pipeline.stats.counts import Counts, count
from pipeline.stats.critical_values import bounds
from pipeline.stats.design import CriticalValues, Design

FAMILIES = ("roman", "gravity", "equation")


def digest() -> str:
    design = Design(rounds=3, arms=4, families=3, dev_items=40, fresh_items=40, board_rows=300, submissions=2)
    critical = CriticalValues.from_json(bounds(design))
    rounds = [
        alarms.RoundCounts(
            {family: _counts(family, number, "dev") for family in FAMILIES},
            {family: _counts(family, number, "fresh") for family in FAMILIES},
            {0: Decimal("0.01"), 3: Decimal("-0.02") * number},
            ahead=0,
        )
        for number in range(3)
    ]
    verdicts = [repr(alarms.verdict(rounds[:upto], design, critical)) for upto in (1, 2, 3)]
    return hashlib.sha256("\n".join(verdicts).encode()).hexdigest()


def _counts(family: str, number: int, item_set: str) -> Counts:
    base = _bits(f"{family}/{'all' if item_set == 'dev' else number}/{item_set}/reference")
    return count([_bits(f"{family}/{number}/{item_set}/{arm}") for arm in range(4)], base)


def _bits(key: str) -> str:
    return "".join(f"{byte:08b}" for byte in hashlib.sha256(key.encode()).digest()[:5])
