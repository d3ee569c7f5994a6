"""A declared slice of a family's puzzles: those whose features lie within limits.

    limits = read_slices({"unit_conversion": {"factor": {"low": 2, "high": 3}}}, FAMILIES)["unit_conversion"]
    is_within(limits, "unit_conversion", puzzle)       whether the puzzle's factor is between 2 and 3

Real dev sets are often narrower than what they stand for: collected in one season, at one site, by one annotator. A slice
says so in a campaign's configuration. Its rule is public and made of the family's features (`Family.features`), never of
items. Dev items are drawn by it, training rows within it are marked, and a recipe may draw more of those.
"""

import sys
from collections.abc import Collection, Mapping
from typing import Any

from substrate.interface.errors import UsageError
from substrate.tasks import FAMILIES

EXAMPLE = '{"unit_conversion": {"factor": {"low": 2, "high": 3}}}'
LARGEST = sys.float_info.max  # an integer beyond it is no float
Limits = Mapping[str, tuple[float, float]]  # of each feature: the lowest and the highest value


def read_slices(value: Any, families: Collection[str]) -> dict[str, Limits]:
    """Returns the limits of each family that has a slice. Raises UsageError for what is no slice of one of `families`."""
    valid = f"an object such as {EXAMPLE}, of the families {', '.join(sorted(families))}"
    if not isinstance(value, Mapping) or not set(value) <= set(families):
        raise UsageError(f"slices is {value!r}; valid: {valid}")
    for family, limits in value.items():
        if not isinstance(limits, Mapping) or not limits:
            raise UsageError(f"slices.{family} is {limits!r}; valid: limits of one feature at least")
        for feature, ends in limits.items():
            is_pair = isinstance(ends, Mapping) and set(ends) == {"low", "high"}
            if (
                not is_pair
                or not all(type(end) in (int, float) and abs(end) <= LARGEST for end in ends.values())
                or not ends["low"] <= ends["high"]
            ):
                raise UsageError(
                    f"slices.{family}.{feature} is {ends!r}; valid: two finite numbers, low and high, low <= high"
                )
    return {
        family: {feature: (float(ends["low"]), float(ends["high"])) for feature, ends in limits.items()}
        for family, limits in value.items()
    }


def is_within(limits: Limits, family: str, puzzle: Any) -> bool:
    """Whether every value of each limited feature lies between its limits, both included.

    Raises UsageError for a feature that the family does not have, or that is no number.
    """
    features = FAMILIES[family].features(puzzle)
    for feature, (low, high) in limits.items():
        numbers = [value for value in features.get(feature, ()) if isinstance(value, int | float)]
        if len(numbers) < len(features.get(feature, "?")):
            numeric = sorted(name for name, each in features.items() if not any(isinstance(v, str) for v in each))
            raise UsageError(f"a slice limits {feature} of {family}; valid: {', '.join(numeric)}")
        if not all(low <= number <= high for number in numbers):
            return False
    return True
