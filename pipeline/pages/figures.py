"""The charts of a page: scores by round, families on dev against fresh, evidence against its thresholds,
predicted against printed board scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline.pages.chart import Bar, Chart, Dot, Line, Mark, Text, bounds, numbered, scale, spread, ticks
from pipeline.pages.numbers import INTERVAL, Finding, Predicted, RoundNumbers, Score

SETS = {
    "dev": "dev, the items that stay from round to round",
    "fresh": "fresh, items that are new in every round",
    "board": "board, the external target",
}
KINDS = {"gap": "gap tests of families", "arm": "gap tests of single arms", "board": "board test", "leak": "leak test"}
SIGNS = {"no alarm": "", "suspicion": " ?", "alarm": " !"}
LOUDNESS = {"no alarm": "quiet", "suspicion": "raised", "alarm": "loud"}
MOST = 2.0  # a bar of evidence ends at twice its alarm threshold; its number tells the rest
LEFT, RIGHT, TOP = 44, 350, 12
BELOW_NAME = TOP + 14  # where a plot begins whose upright axis has its name above it


def by_round(rounds: Sequence[RoundNumbers]) -> list[Chart]:
    """A chart for each of dev, fresh and board: the round's leading arm and the reference, with intervals. All
    have one scale."""
    found: dict[str, list[tuple[Score | None, Score | None]]] = {
        item_set: [
            (at.score_so_far(at.leader, item_set) if at.leader else None, at.score("reference", item_set))
            for at in rounds
        ]
        for item_set in SETS
    }
    values = [
        end for pairs in found.values() for pair in pairs for score in pair if score for end in (score.low, score.high)
    ]
    if not values:
        return []
    low, high = bounds(values)
    return [
        _of_set(item_set, rounds, pairs, max(low, 0.0), min(high, 1.0))
        for item_set, pairs in found.items()
        if any(a for a, _ in pairs)
    ]


def _of_set(
    item_set: str,
    rounds: Sequence[RoundNumbers],
    pairs: Sequence[tuple[Score | None, Score | None]],
    low: float,
    high: float,
) -> Chart:
    height = 190.0
    y, x = scale(low, high, height - 26, TOP), scale(-0.5, len(rounds) - 0.5, LEFT, RIGHT)
    marks: list[Mark] = grid_y(values := ticks(low, high), y, lambda value: f"{numbered(values, 100)(value)} %")
    seen = []
    for n, (at, (arm, reference)) in enumerate(zip(rounds, pairs, strict=True)):
        marks.append(Text(x(n), height - 8, at.name, "middle"))
        words = []
        for score, kind, shift, who in ((reference, "reference", 8, "reference"), (arm, item_set, -8, at.leader or "")):
            if score:
                marks += _interval(x(n) + shift, y(score.low), y(score.high), kind)
                marks.append(Dot(x(n) + shift, y(score.value), kind))
                words.append(f"{who} {100 * score.value:.1f} %")
        seen.append(f"{at.name}: {', '.join(reversed(words)) or 'no score'}")
    legend = [(item_set, "the round's leading arm"), ("reference", "the reference adapter")]
    return Chart(f"Scores on {SETS[item_set]}", height, marks, "; ".join(seen) + ".", legend=legend)


def families(gaps: Mapping[str, tuple[float, float]], round_name: str) -> Chart | None:
    """Each family as a dot: across, the arms' mean lift on dev; up, their mean lift on fresh. None without
    families."""
    if not gaps:
        return None
    low, high = bounds([value for pair in gaps.values() for value in pair] + [0.0], 0.12)
    height, left, right = 314.0, 48.0, 244.0
    x, y = scale(low, high, left, right), scale(low, high, height - 40, BELOW_NAME)
    marks = _square(low, high, (x, y), height, left, right, (100, "+"), "lift on dev, points", "lift on fresh, points")
    names = sorted(gaps)
    places = spread([y(gaps[name][1]) for name in names], 15, BELOW_NAME + 6, height - 44)
    for name, place in zip(names, places, strict=True):
        at = x(gaps[name][0]), y(gaps[name][1])
        marks += [
            Line([at, (right + 2, place)], "leader"),
            Dot(*at, "family"),
            Text(right + 5, place + 4, cut(name, 16)),
        ]
    seen = "; ".join(
        f"{name}: dev {100 * gaps[name][0]:+.1f}, fresh {100 * gaps[name][1]:+.1f} points" for name in names
    )
    return Chart(f"Families in {round_name}: lift on dev against lift on fresh", height, marks, seen + ".")


def tests(findings: Sequence[Finding], round_name: str) -> Chart | None:
    """A bar for each test, as a share of what raises an alarm. None without tests."""
    if not findings:
        return None
    left, row = 128.0, 20.0
    height = 22 + row * len(findings) + 20
    x = scale(0, MOST, left, RIGHT - 34)
    marks: list[Mark] = [Line([(x(1), 16), (x(1), height - 20)], "alarm"), Text(x(1), 12, "alarm", "middle")]
    seen = []
    for n, each in enumerate(findings):
        y = 22 + row * n
        name = each.about
        marks += [
            Text(4, y + 12, cut(name, 19)),
            Bar(left, y + 2, x(min(each.size, MOST)) - left, row - 7, LOUDNESS[each.result]),
        ]
        if each.suspect is not None:
            marks.append(Line([(x(each.suspect), y), (x(each.suspect), y + row - 3)], "suspect"))
        marks.append(Text(x(min(each.size, MOST)) + 4, y + 12, f"{each.size:.2f}{SIGNS[each.result]}"))
        seen.append(f"{each.words} {each.size:.2f} ({each.result})")
    marks += [Text(x(value), height - 5, f"{value:g}", "middle") for value in (0, 1, 2)]
    return Chart(f"Evidence of {round_name} as a share of what raises an alarm", height, marks, "; ".join(seen) + ".")


def evidence_by_round(found: Mapping[str, Sequence[Finding]]) -> Chart | None:
    """The largest finding of each kind by round, as a share of what raises an alarm. None for fewer than two
    rounds."""
    names = [name for name, findings in found.items() if findings]
    if len(names) < 2:
        return None
    height = 200.0
    largest = {
        kind: [(n, max(sizes)) for n, name in enumerate(names) if (sizes := [each.size for each in found[name] if each.what == kind])]
        for kind in KINDS
    }  # fmt: skip
    largest = {kind: points for kind, points in largest.items() if points}
    x, y = scale(-0.5, len(names) - 0.5, LEFT, RIGHT), scale(0, MOST, height - 26, TOP)
    marks: list[Mark] = grid_y([0, 0.5, 1.5, 2], y, lambda value: f"{value:g}" + ("+" if value == MOST else ""))
    marks += [Line([(LEFT, y(1)), (RIGHT, y(1))], "alarm"), Text(LEFT - 6, y(1) + 4, "alarm", "end")]
    marks += [Text(x(n), height - 8, name, "middle") for n, name in enumerate(names)]
    for kind, points in largest.items():
        places = [(x(n), y(min(size, MOST))) for n, size in points]
        marks += [Line(places, f"path {kind}"), *(Dot(*place, kind) for place in places)]
    seen = "; ".join(
        f"{KINDS[kind]}: " + ", ".join(f"{names[n]} {size:.2f}" for n, size in points)
        for kind, points in largest.items()
    )
    legend = [(kind, KINDS[kind]) for kind in largest]
    how = "Of each kind of test the point is the one nearest to an [[alarm]]; a point above the red line raised one in that round."
    return Chart("The strongest evidence of each kind by round", height, marks, seen + ".", how, legend)


def predicted(found: Sequence[Predicted]) -> Chart | None:
    """Each submitted arm: across, the board score that dev and fresh predict; up, the printed one. None without
    scores."""
    if not found:
        return None
    ends = [each.predicted + sign * INTERVAL * each.spread for each in found for sign in (-1, 1)]
    low, high = bounds([*ends, *(each.printed for each in found)])
    height, left, right = 314.0, 48.0, 268.0
    x, y = scale(low, high, left, right), scale(low, high, height - 40, BELOW_NAME)
    marks = _square(low, high, (x, y), height, left, right, (1, ""), "predicted board score", "printed board score")
    places = spread([y(each.printed) for each in found], 14, BELOW_NAME + 6, height - 44)
    for each, place in zip(found, places, strict=True):
        at = x(each.predicted), y(each.printed)
        marks.append(
            Line([(x(each.predicted + sign * INTERVAL * each.spread), at[1]) for sign in (-1, 1)], "interval board")
        )
        marks += [
            Line([at, (right + 2, place)], "leader"),
            Dot(*at, "board"),
            Text(right + 5, place + 4, f"{each.arm} of {each.round}"),
        ]
    seen = "; ".join(
        f"{each.arm} of {each.round}: predicted {each.predicted:.2f}, printed {each.printed:.2f}" for each in found
    )
    return Chart("Board scores: predicted and printed", height, marks, seen + ".")


def _square(
    low: float, high: float, axes: tuple[Callable[[float], float], Callable[[float], float]], height: float, left: float, right: float,
    how: tuple[float, str], across: str, up: str,
) -> list[Mark]:  # fmt: skip
    """The ground of a chart with one scale on both axes: the line where both are equal, a grid, and names. how: factor and sign of its numbers."""
    (x, y), values = axes, ticks(low, high)
    words = numbered(values, *how)
    marks: list[Mark] = [Line([(x(low), y(low)), (x(high), y(high))], "identity")]
    for value in values:
        marks += [
            Line([(x(value), y(low)), (x(value), y(high))], "grid"), Line([(x(low), y(value)), (x(high), y(value))], "grid"),
            Text(x(value), height - 24, words(value), "middle"), Text(left - 6, y(value) + 4, words(value), "end"),
        ]  # fmt: skip
    return [*marks, Text((left + right) / 2, height - 6, across, "middle"), Text(4, TOP - 1, up)]


def grid_y(
    values: Sequence[float], y: Callable[[float], float], words: Callable[[float], str], left: float = LEFT, right: float = RIGHT
) -> list[Mark]:  # fmt: skip
    """Horizontal lines at the values, with their words to the left."""
    found: list[Mark] = []
    for value in values:
        found += [
            Line([(left, y(value)), (right, y(value))], "grid"),
            Text(left - 6, y(value) + 4, words(value), "end"),
        ]
    return found


def _interval(x: float, low: float, high: float, kind: str) -> list[Mark]:
    return [Line([(x, low), (x, high)], f"interval {kind}")]


def cut(text: str, most: int) -> str:
    """The beginning of a label that has more than so many letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
