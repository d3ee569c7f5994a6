"""Lay out a page: sections of lines, tables and figures, as text for a terminal or as one self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

Table = list[list[str]]


@dataclass
class Section:
    """A heading with lines of text, a table and figures. The first row of the table is its header; each figure is an SVG element."""

    title: str
    lines: list[str] = field(default_factory=list)
    table: Table = field(default_factory=list)
    svg: list[str] = field(default_factory=list)


def as_text(page: Sequence[Section]) -> str:
    """The page as text for a terminal, without figures."""
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


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#1b1f24}h1,h2{line-height:1.2}
table{border-collapse:collapse;margin:.7em 0}td,th{padding:.15em .8em .15em 0;text-align:left;border-bottom:1px solid #d8dee4;font-size:13px}
svg{max-width:100%;margin:.5em 2em .5em 0}li{margin:.15em 0}"""


def as_html(page: Sequence[Section]) -> str:
    """The page as one HTML file without scripts that loads nothing else. Every text is escaped."""
    out = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(page[0].title)}</title><style>{STYLE}</style>'
    ]
    for number, section in enumerate(page):
        level = "h1" if number == 0 else "h2"
        out.append(f"<{level}>{html.escape(section.title)}</{level}>")
        out.append("".join(section.svg))
        if section.lines:
            out.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in section.lines) + "</ul>")
        if section.table:
            rows = [
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
                for tag, row in zip(["th", *["td"] * len(section.table)], section.table, strict=False)
            ]
            out.append("<table>" + "".join(rows) + "</table>")
    return "\n".join(filter(None, out)) + "</html>\n"
