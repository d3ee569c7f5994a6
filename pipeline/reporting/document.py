"""What a text page is made of, sections of lines and tables, and its form for a terminal. (`pages` makes HTML of it.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Table = list[list[str]]


@dataclass
class Section:
    """A heading with lines of text and a table, whose first row is its header."""

    title: str
    lines: list[str] = field(default_factory=list)
    table: Table = field(default_factory=list)


def as_text(page: Sequence[Section]) -> str:
    """The page as text for a terminal."""
    out = []
    for section in page:
        out += ["", section.title, "-" * len(section.title), *section.lines]
        if section.table:
            widths = [max(len(row[column]) for row in section.table) for column in range(len(section.table[0]))]
            out += [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in section.table
            ]
    return "\n".join(out).lstrip("\n") + "\n"
