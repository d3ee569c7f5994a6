"""Draw the view of a running round on a terminal: a head, a line for each arm, and below them what the caller has to say.

    demo r0001 is open; its first arm began at 14:02:11, 3 min 20 s ago
    the last arm should end in ~4 min 5 s, at 14:09
    arms: 1 completed, 1 running, 1 queued

    arm  state      progress                       left       loss   curve       vs ref  tokens/s
    a0   completed
    a1   running    train   ######....... 120/300  ~1 min 3 s 0.412  #*+=-:..    -0.031     1,812
    a2   queued     Priority: jobs of higher priority wait before it

Nothing is told by colour alone. In a narrow terminal columns fall away, the least needed first.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.live import time_left
from pipeline.live.time_left import ALL_ENDED, Left
from pipeline.live.view import ArmView, RoundView
from pipeline.reporting.status import ArmStatus
from pipeline.reporting.terminal_tables import COLOURS

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
FILLED, PLAIN_FILLED = ("█", "░"), ("#", ".")
MARKS = {time_left.OWN: "", time_left.ENDED: "~", time_left.FORECAST: "~"}
LEGEND = {
    time_left.ENDED: "~ also counts what the round's ended arms took",
    time_left.FORECAST: "~ also counts what was forecast",
}
AT_LEAST = "> the running phase alone"


@dataclass(frozen=True)
class Column:
    """One column. most: of what does not fit, so many signs stay. needed: columns of a larger number fall away first.

    is_right: numbers are aligned at their ends.
    """

    title: str
    most: int
    needed: int
    is_right: bool = False


COLUMNS = (
    Column("arm", 9, 0), Column("state", 11, 0), Column("phase", 9, 1), Column("progress", 14, 4), Column("", 15, 2, True),
    Column("left", 12, 1, True), Column("loss", 9, 3, True), Column("curve", 10, 5), Column("vs ref", 8, 6, True),
    Column("tokens/s", 9, 7, True), Column("node", 12, 8), Column("GPU-h", 9, 9, True),
)  # fmt: skip
PHASES = {
    "generate_start": "decoding",
    "generate": "decoding",
    "train_start": "start-up",
    "completed": "",
    "failed": "",
}


def draw(view: RoundView, below: Sequence[str], width: int, height: int, *, is_plain: bool = False) -> Any:
    """The whole view as rich text. below: lines under the table. is_plain: ASCII alone, for a terminal that has nothing else.

    What is higher than the terminal loses first the second lines of arms, then the lines of completed arms.
    """
    from rich.text import Text

    arms = [*view.beside, *view.arms]
    cells = [_cells(arm, view.name, is_plain) for arm in arms]
    widths = columns_for(width, cells)
    head = [Text(line) for line in in_words(view)]
    titles = Text(_joined(widths, {column.title: column.title for column in COLUMNS}), style="bold")
    tail = [Text(""), *(Text(line) for line in (*_legend(arms, view.end), *below))]
    for short in range(3):
        rows = [
            line
            for arm, own in zip(arms, cells, strict=True)
            if short < 2 or arm.row.state != "completed"
            for line in _lines(arm, own, widths, width, has_second=not short)
        ]
        lines = [*head, Text(""), titles, *rows, *tail]
        if sum(max(1, -(-len(line.plain) // width)) for line in lines) < height:
            break
    return Text("\n").join(lines)


def in_words(view: RoundView) -> list[str]:
    """The head: the round's state, its times, and how many arms do what."""
    now = time.time()
    lines = [f"{view.campaign} {view.name} is {view.state}"]
    if view.began is not None:
        began = f"{datetime.fromtimestamp(view.began):%H:%M:%S}"
        lines[0] += f"; its first arm began at {began}, {duration(max(0.0, now - view.began))} ago"
    if isinstance(view.end, Left):
        at = datetime.fromtimestamp(now + view.end.seconds)
        lines.append(f"the last arm should end in {MARKS[view.end.by]}{duration(view.end.seconds)}, at {at:%H:%M}")
    elif view.end == ALL_ENDED and not view.is_over:
        lines.append(f"{ALL_ENDED}, and the round has no decision yet")
    elif not view.is_over:
        lines.append(f"its end is not known: {view.end}")
    counts: dict[str, int] = {}
    for row in view.rows:
        counts[row.state] = counts.get(row.state, 0) + 1
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    return [*lines, f"arms: {told}"]


def columns_for(width: int, rows: Sequence[Mapping[str, str]]) -> dict[Column, int]:
    """The columns that fit and the width of each, in their order. One that no row has anything for is left out."""
    longest = {c: min(c.most, max((len(row[c.title]) for row in rows), default=0)) for c in COLUMNS}
    chosen = {c: max(len(c.title), size) for c, size in longest.items() if size}
    while sum(chosen.values()) + len(chosen) - 1 > width and len(chosen) > 2:
        del chosen[max(chosen, key=lambda column: column.needed)]
    return chosen


def duration(seconds: float) -> str:
    """Seconds as a person says them, in two units at most: 45 s, 1 min 3 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s"


def left_in_words(left: Left | None) -> str:
    """What is left, with its mark: nothing for the arm's own speed, ~ with other arms' times or the forecast, > for the phase alone."""
    if left is None:
        return ""
    return f"{'>' if left.of != 'arm' else MARKS[left.by]}{duration(left.seconds)}"


def spark(values: Sequence[float], *, is_plain: bool = False) -> str:
    """A curve of one sign for each value, from the lowest to the highest sign."""
    signs = PLAIN_BLOCKS if is_plain else BLOCKS
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    height = high / 2 - low / 2  # of half, because a trial may write numbers whose difference is no float
    scale = (len(signs) - 1) / height if height > 0 else 0.0
    return "".join(signs[round((value / 2 - low / 2) * scale) if math.isfinite(scale) else 0] for value in finite)


def bar(share: float, width: int, *, is_plain: bool = False) -> str:
    """A bar of so many signs of which this share is filled."""
    full, empty = PLAIN_FILLED if is_plain else FILLED
    filled = min(width, max(0, int(share * width)))
    return full * filled + empty * (width - filled)


def _legend(arms: Sequence[ArmView], end: Left | str) -> list[str]:
    """What the marks mean, of those that are shown."""
    shown = [arm.left for arm in arms if arm.left] + ([end] if isinstance(end, Left) else [])
    told = [LEGEND[by] for by in LEGEND if any(left.by == by and left.of == "arm" for left in shown)]
    told += [AT_LEAST] if any(left.of != "arm" for left in shown) else []
    lines = [f"left: {'; '.join(told)}"] if told else []
    if any(arm.reference_loss is not None for arm in arms):
        lines.append(
            "vs ref: loss less the reference's at the same step; no score, because other data have another loss"
        )
    return lines


def _cells(arm: ArmView, name: str, is_plain: bool) -> dict[str, str]:
    """The text of each column of an arm. name: of the round; an arm of another one, r0000, is called by its role."""
    row, is_at_work = arm.row, arm.row.state in time_left.WORKS
    done, total = _progress(arm)
    beside = f"{row.loss - arm.reference_loss:+.3f}" if row.loss is not None and arm.reference_loss is not None else ""
    took = "" if is_at_work or not row.seconds else f"in {duration(row.seconds)}"
    return {
        "arm": row.role if row.round != name else row.arm, "state": row.state, "phase": _phase(row) if is_at_work else "",
        "progress": bar(done / total, 12, is_plain=is_plain) if total and done is not None else took,
        "": "?" if row.unread and is_at_work else f"{done}/{total}" if total and done is not None else "",
        "left": left_in_words(arm.left), "loss": "" if row.loss is None else f"{row.loss:.3f}",
        "curve": spark(arm.losses, is_plain=is_plain), "vs ref": beside,
        "tokens/s": f"{row.tokens_per_second:,.0f}" if row.tokens_per_second and is_at_work else "",
        "node": row.node, "GPU-h": f"{row.gpu_hours:.2f}" if row.gpu_hours else "",
    }  # fmt: skip


def _lines(
    arm: ArmView, cells: Mapping[str, str], widths: Mapping[Column, int], width: int, *, has_second: bool
) -> list[Any]:
    """The lines of an arm: its cells, and what is to be said of it. has_second: whether that may take further lines.

    An arm that does not work has no figures of now, so what is said of it stands behind its state.
    """
    from rich.text import Text

    row = arm.row
    resumes = f"goes on from {arm.goes_on_from}" if arm.goes_on_from else ""
    cores = f"runs on {row.cores} of {row.cores_asked} cores" if row.cores_asked else ""
    detail = "; ".join(filter(None, (row.detail, resumes, cores)))
    names = [column for column in widths if column.title in ("arm", "state")]
    begin = sum(widths[column] for column in names) + len(names)
    has_figures = row.state in time_left.WORKS or not detail
    text = Text(_joined(widths if has_figures else {column: widths[column] for column in names}, cells))
    text.stylize(COLOURS[row.state], begin - len(names) + 1 - widths[names[-1]], begin - 1)
    if not detail:
        return [text]
    room = max(10, width - begin)
    pieces = textwrap.wrap(detail, room)
    if not has_second and len(pieces) > 1:
        pieces = [f"{pieces[0][: room - 3]}..."]
    if has_figures:
        return [text, *(Text(f"{'':{begin}}{piece}") for piece in pieces)] if has_second else [text]
    text.append(f"{'':{begin - len(text.plain)}}")
    text.append(pieces[0])
    return [text, *(Text(f"{'':{begin}}{piece}") for piece in pieces[1:])]


def _phase(row: ArmStatus) -> str:
    return "training" if time_left.is_training(row) else PHASES.get(row.phase, row.phase)


def _progress(arm: ArmView) -> tuple[int | None, int | None]:
    """(done, of how many): items while the arm decodes, steps while it trains, else (None, None)."""
    row = arm.row
    if row.state not in time_left.WORKS:
        return None, None
    if row.items is not None:
        return row.items, row.num_items
    is_agents = row.phase == "agent"  # whose full run makes steps
    return (row.step, row.num_steps) if time_left.is_training(row) or is_agents else (None, None)


def _joined(widths: Mapping[Column, int], cells: Mapping[str, str]) -> str:
    """The cells side by side, each cut to its column."""
    parts = []
    for column, width in widths.items():
        cell = cells[column.title][:width]
        parts.append(f"{cell:>{width}}" if column.is_right else f"{cell:<{width}}")
    return " ".join(parts).rstrip()
