"""The three figures of a decision's page, as SVG: arms on dev, fresh and board; each family's dev against its fresh; family states by round."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = {
    "UNPROVEN": "#afb8c1",
    "TRUSTED": "#2da44e",
    "SUSPECT": "#d4a72c",
    "REVERSED-overfit": "#cf222e",
    "REVERSED-shift": "#8250df",
    "RESTORED": "#54aeff",
}


@dataclass(frozen=True)
class Point:
    """One arm. `dev`, `fresh` and `board` are accuracies from 0 to 1; `half` is half the width of the 95 % interval of `fresh`."""

    name: str
    dev: float
    fresh: float
    half: float
    board: float | None


def strip(points: Sequence[Point]) -> str:
    """Draw the arms side by side. A circle is dev, a dot with a bar fresh and its 95 % interval, a triangle the board. Empty without arms."""
    if not points:
        return ""
    values = [v for p in points for v in (p.dev, p.fresh - p.half, p.fresh + p.half, p.board) if v is not None]
    low, high = min(values) - 0.02, max(values) + 0.02
    width, height, left, top = 90 + 60 * len(points), 260, 60, 20

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - 30)

    parts = []
    for n in range(5):
        value = low + (high - low) * n / 4
        parts.append(
            _line(left, y(value), width - 10, y(value), "#d8dee4") + _text(4, y(value) + 4, f"{100 * value:.0f} %")
        )
    for number, point in enumerate(points):
        x = left + 35 + 60 * number
        parts.append(_line(x, y(point.fresh - point.half), x, y(point.fresh + point.half), "#0969da", 2))
        parts.append(f'<circle cx="{x:.1f}" cy="{y(point.fresh):.1f}" r="4.5" fill="#0969da"/>')
        parts.append(
            f'<circle cx="{x - 12:.1f}" cy="{y(point.dev):.1f}" r="4" fill="none" stroke="#57606a" stroke-width="1.6"/>'
        )
        if point.board is not None:
            at = y(point.board)
            parts.append(f'<path d="M{x + 12:.1f} {at - 5:.1f}l5 9h-10z" fill="#bc4c00"/>')
        parts.append(_text(x, height - 10, point.name, "middle"))
    parts.append(_text(left, 13, "accuracy: circle dev, dot fresh with its 95 % interval, triangle board"))
    return _svg(width, height, parts)


def gaps(families: Mapping[str, tuple[float, float]]) -> str:
    """Draw one row for each family: the arms' mean lift over the reference on dev (circle) and on fresh (dot). The distance is the gap.

    `families` maps a family to its lifts (dev, fresh), as differences of accuracies. Empty without families.
    """
    if not families:
        return ""
    values = [value for pair in families.values() for value in pair] + [0.0]
    low, high = min(values) - 0.01, max(values) + 0.01
    width, left, height = 460, 130, 48 + 22 * len(families)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 20)

    parts = [_line(x(0), 22, x(0), height - 24, "#d8dee4"), _text(x(0), height - 9, "0", "middle")]
    parts += [
        _text(x(value), height - 9, f"{100 * value:+.0f} points", "middle")
        for value in (low, high)
        if abs(x(value) - x(0)) > 40
    ]
    for row, (family, (dev, fresh)) in enumerate(sorted(families.items())):
        y = 34 + 22 * row
        parts += [_text(4, y + 4, family), _line(x(dev), y, x(fresh), y, "#afb8c1", 2)]
        parts.append(f'<circle cx="{x(fresh):.1f}" cy="{y}" r="4.5" fill="#0969da"/>')
        parts.append(f'<circle cx="{x(dev):.1f}" cy="{y}" r="4" fill="none" stroke="#57606a" stroke-width="1.6"/>')
    parts.append(_text(left, 13, "mean lift of the arms over the reference: circle dev, dot fresh"))
    return _svg(width, height, parts)


def timeline(history: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Draw the states: one row for each family, one column for each round; the colour is the state. Empty without families.

    `history` has (round, family -> state) in order.
    """
    families = sorted({family for _, states in history for family in states})
    if not families:
        return ""
    width, height, left = 150 + 64 * len(history) + 150, 40 + 22 * len(families), 140
    parts = [_text(left + 64 * n + 4, 14, name) for n, (name, _) in enumerate(history)]
    for row, family in enumerate(families):
        y = 22 + 22 * row
        parts.append(_text(4, y + 14, family))
        for column, (_, states) in enumerate(history):
            if state := states.get(family):
                box = f'<rect x="{left + 64 * column}" y="{y}" width="60" height="18" rx="3" fill="{COLOURS[state]}">'
                parts.append(f"{box}<title>{html.escape(f'{family}: {state}')}</title></rect>")
    used = sorted({state for _, states in history for state in states.values()}, key=list(COLOURS).index)
    for row, state in enumerate(used):
        x, y = left + 64 * len(history) + 14, 22 + 18 * row
        parts.append(
            f'<rect x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[state]}"/>' + _text(x + 15, y + 9, state)
        )
    return _svg(width, max(height, 30 + 18 * len(used)), parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    box = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="system-ui,sans-serif" font-size="11">{"".join(parts)}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#57606a">{html.escape(text)}</text>'
