"""What a page is made of: parts with sentences, tables and charts. The templates lay them out; nothing here
knows HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.pages.chart import Chart
from pipeline.reporting.document import Section, Table

NUMBER = re.compile(r"[-+]?[\d.,]+( ?(%|s|h|MB))?( \(.*\))?")


@dataclass
class Rows:
    """A table. `caption` names it, `how` says how to read it, the first row of `table` is its header and each
    row's first cell names the row."""

    caption: str
    table: Table
    how: str = ""
    anchor: str = ""  # set by `with_anchors`

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether most of its cells are numbers, which are set flush right; the first one names rows."""
        columns = [[cell for cell in cells if cell not in ("", "-")] for cells in zip(*self.table[1:], strict=True)]
        found = [2 * sum(bool(NUMBER.fullmatch(cell)) for cell in cells) > len(cells) for cells in columns]
        return [False, *found[1:]] if found else [False] * len(self.table[0])


@dataclass
class Part:
    """A section of the page.

    how: sentences that say how to read it, in which `[[term]]` leads to the glossary. lines: what is told. gaps: sentences about what could
    not be shown. parts: subsections.
    """

    title: str
    how: Sequence[str] = ()
    charts: list[Chart] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    is_folded: bool = False
    anchor: str = ""  # set by `with_anchors`


def with_anchors(parts: Sequence[Part], used: set[str] | None = None) -> None:
    """Give every part and table an anchor that no other has, made from its name."""
    used = set() if used is None else used
    for part in parts:
        part.anchor = _free(part.title, used)
        for rows in part.rows:
            is_named = rows.caption == part.title and not rows.how  # by the heading above it
            rows.anchor = part.anchor if is_named else _free(f"table {rows.caption}", used)
        with_anchors(part.parts, used)


def _free(name: str, used: set[str]) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    found = next(each for each in (plain, *(f"{plain}-{n}" for n in range(2, len(used) + 3))) if each not in used)
    used.add(found)
    return found


def of_section(section: Section, how: Sequence[str] = (), caption: str = "") -> Part:
    """A section of the text page as a part, with everything that it has."""
    rows = [Rows(caption or section.title, section.table)] if section.table else []
    return Part(section.title, how, rows=rows, lines=list(section.lines))
