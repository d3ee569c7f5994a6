"""The charts of arms and their cost: scores of a round's arms, the loss of one by its steps, hours by cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.pages.chart import Bar, Chart, Dot, Line, Mark, Text, bounds, numbered, scale, ticks
from pipeline.pages.figures import RIGHT, SETS, cut, grid_y
from pipeline.pages.numbers import RoundNumbers


def arms(of: RoundNumbers) -> Chart | None:
    """A row for the reference and each arm: its scores on dev, fresh with interval, and board. None without
    scores."""
    names = ["reference", *(arm.name for arm in of.plan.arms)]
    scores = {name: {item_set: of.score(name, item_set) for item_set in SETS} for name in names}
    ends = [end for each in scores.values() for score in each.values() if score for end in (score.low, score.high)]
    if not ends:
        return None
    low, high = bounds(ends)
    left, row = 66.0, 26.0
    height = 12 + row * len(names) + 22
    x = scale(max(low, 0.0), min(high, 1.0), left, RIGHT - 8)
    marks: list[Mark] = []
    found = ticks(max(low, 0.0), min(high, 1.0))
    for value in found:
        marks += [
            Line([(x(value), 8), (x(value), height - 22)], "grid"),
            Text(x(value), height - 6, f"{numbered(found, 100)(value)} %", "middle"),
        ]
    seen = []
    for n, name in enumerate(names):
        y, words = 20 + row * n, []
        marks.append(Text(4, y + 5, name))
        for item_set, shift in (("dev", -6.0), ("fresh", 1.0), ("board", 8.0)):
            if score := scores[name][item_set]:
                if item_set == "fresh":
                    marks.append(Line([(x(score.low), y + shift), (x(score.high), y + shift)], "interval fresh"))
                marks.append(Dot(x(score.value), y + shift, item_set))
                words.append(f"{item_set} {100 * score.value:.1f} %")
        if not words:
            outcome = of.outcome(name)
            why = outcome.exit_class if outcome else "it has no outcome"
            marks.append(Text(left, y + 5, f"no score: {cut(why, 34)}"))
            words.append(f"no score, {why}")
        seen.append(f"{name}: {', '.join(words)}")
    legend = [("dev", "dev"), ("fresh", "fresh, with its 95 % interval"), ("board", "board")]
    return Chart(
        f"Scores of the arms of {of.name}",
        height,
        marks,
        "; ".join(seen) + ".",
        "A row is an arm. A ring far to the right of its dot says that dev is ahead of fresh; an arm whose bar overlaps that of the "
        "[[reference]] widely may be ahead by chance.",
        legend[: 3 if any(each["board"] for each in scores.values()) else 2],
    )


def bars(values: Mapping[str, float], title: str, unit: str) -> Chart | None:
    """A bar for each entry with its number. None without entries."""
    if not values:
        return None
    left, row = 128.0, 20.0
    height = 8 + row * len(values)
    x = scale(0, max(values.values()) or 1.0, left, RIGHT - 52)
    marks: list[Mark] = []
    for n, (name, value) in enumerate(values.items()):
        y = 6 + row * n
        marks += [
            Text(4, y + 11, cut(name, 19)),
            Bar(left, y + 1, x(value) - left, row - 7, "quiet"),
            Text(x(value) + 4, y + 11, f"{value:,.2f} {unit}"),
        ]
    return Chart(title, height, marks, "; ".join(f"{name} {value:,.2f} {unit}" for name, value in values.items()) + ".")


def curve(name: str, points: Sequence[tuple[float, float]]) -> Chart | None:
    """The loss of an arm by its training steps. None without a point."""
    if not points:
        return None
    width, height, left = 176.0, 112.0, 34.0
    low, high = bounds([loss for _, loss in points])
    first, last = points[0][0], points[-1][0]
    x, y = scale(first, last, left, width - 8), scale(low, high, height - 20, 20)
    values = ticks(low, high, 2)
    marks: list[Mark] = grid_y(values, y, numbered(values), left, width - 4)
    marks.append(Text(4, 12, name))
    places = [(x(step), y(loss)) for step, loss in points]
    marks.append(Line(places, "path loss") if len(places) > 1 else Dot(*places[0], "fresh"))
    marks += [Text(left, height - 5, f"{first:g}"), Text(width - 6, height - 5, f"step {last:g}", "end")]
    seen = f"The loss goes from {points[0][1]:.3g} at step {first:g} to {points[-1][1]:.3g} at step {last:g}."
    return Chart(f"Training loss of {name}", height, marks, seen, width=width)


def thinned(points: Sequence[tuple[float, float]], most: int = 120) -> list[tuple[float, float]]:
    """At most so many points, evenly taken, the first and the last among them, because a page shows no more."""
    if len(points) <= most:
        return list(points)
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]
