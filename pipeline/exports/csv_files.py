"""Write tables as CSV: UTF-8, one header line, `true` and `false`, an empty cell where a value is not known."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from pipeline.exports.folder import Written, counted
from pipeline.exports.tables import Table


def write(tables: Iterable[Table], folder: Path) -> list[Written]:
    """Write `items.csv`, `arms.csv` and `decisions.csv` into a folder. Raises OSError as writing does."""
    written = []
    for table in tables:
        path, count = folder / f"{table.name}.csv", 0
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(table.columns)
            for row in table.rows():
                count += 1
                lines.writerow([_cell(row[name]) for name in table.columns])
        written.append(Written(path.name, counted(count, "row")))
    return written


def _cell(value: object) -> object:
    """A boolean as JSON writes it; csv writes None as an empty cell, and a float so that it reads back as the same number."""
    return str(value).lower() if isinstance(value, bool) else value
