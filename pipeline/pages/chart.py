"""A chart as marks in a box of 360 units width, which a phone shows at its own size, so that the text can be read there.

Marks have a kind, which the page's style gives a colour for light and for dark; every series has a shape of its own, too, so that nothing is
said by colour alone. `seen` is the text for who cannot see the chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

WIDTH = 360


@dataclass(frozen=True)
class Line:
    """A line through points (x, y)."""

    points: Sequence[tuple[float, float]]
    kind: str
    mark: str = "line"


@dataclass(frozen=True)
class Dot:
    """A data point. kind: its series, which has a shape of its own (`SHAPES`)."""

    x: float
    y: float
    kind: str
    mark: str = "dot"

    @property
    def shape(self) -> str:
        return SHAPES[self.kind]


@dataclass(frozen=True)
class Bar:
    """A bar from its upper left corner (x, y)."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    mark: str = "bar"


@dataclass(frozen=True)
class Text:
    """A label. anchor: which part of it is at x: start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    kind: str = "label"
    mark: str = "text"


Mark = Line | Dot | Bar | Text
SHAPES = {
    "dev": "ring", "fresh": "disc", "board": "triangle", "reference": "square", "gap": "disc", "arm": "ring", "leak": "square", "family": "disc",
    "other": "cross",
}  # fmt: skip
"""The shape of each series."""


@dataclass
class Chart:
    """A figure. Its marks lie in a box of width times height units.

    title: what is shown. seen: what is seen, for a screen reader. how: how to read it. legend: (kind, words)
    of each shape that is used."""

    title: str
    height: float
    marks: list[Mark] = field(default_factory=list)
    seen: str = ""
    how: str = ""
    legend: Sequence[tuple[str, str]] = ()
    width: float = WIDTH

    def shape(self, kind: str) -> str:
        return SHAPES[kind]


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A linear scale from values to places. Equal ends are drawn apart, so that the only value lies in the middle."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return lambda value: start + (value - low) / (high - low) * (end - start)


def ticks(low: float, high: float, least: int = 3) -> list[float]:
    """Round values from `low` to `high`, at least so many and few more: multiples of 1, 2 or 5 times a power of ten."""
    if not 0 < high - low < math.inf:
        return [low]
    power = 10.0 ** math.ceil(math.log10(high - low))
    steps = (power * factor / 10**n for n in range(4) for factor in (1, 0.5, 0.2))
    found = (
        [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)] for step in steps
    )
    return next((values for values in found if len(values) >= least), [low, high])


def numbered(values: Sequence[float], factor: float = 1, sign: str = "") -> Callable[[float], str]:
    """How ticks are written, times a factor: with as many decimals as their distance needs. sign: "+" for differences."""
    step = factor * (values[1] - values[0]) if len(values) > 1 else 1.0
    places = max(0, -math.floor(math.log10(step) + 1e-9))

    def words(value: float) -> str:
        shown = round(factor * value, places)
        return f"{shown:{sign}.{places}f}" if shown else f"{0:.{places}f}"

    return words


def bounds(values: Iterable[float], margin: float = 0.05) -> tuple[float, float]:
    """The ends of an axis that shows all values, with some room."""
    found = list(values)
    low, high = min(found), max(found)
    room = (high - low) * margin or 0.01
    return low - room, high + room


def spread(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Labels' places near `places`, at least `distance` apart where there is room between low and high, in the
    same order."""
    order = sorted(range(len(places)), key=lambda n: places[n])
    found = list(places)
    least = low
    for n in order:
        found[n] = least = max(places[n], least)
        least += distance
    most = high
    for n in reversed(order):
        found[n] = most = min(found[n], most)
        most -= distance
    return found
