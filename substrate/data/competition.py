"""The competition's training file: its rows, their families, and a split into training and dev by puzzle.

    id,prompt,answer
    00066667,"In Alice's Wonderland, a secret bit manipulation rule ...",10010111

A row is trained on if the solver's reasoning leads to the row's own answer and the scorer reads that answer from its
box. The other rows are counted and listed by id, with the reason.

Source: `train.csv` of the NVIDIA Nemotron Model Reasoning Challenge, 9,500 rows without reasoning. It is not part of
this project: a user has it from the competition's page.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from substrate.answers import extract, is_correct
from substrate.data.prompt_overlap import overlaps, prompt_digest
from substrate.data.table import read_table
from substrate.interface.errors import DataError
from substrate.tasks import FAMILIES

COLUMNS = ["id", "prompt", "answer"]
_DEV_SHARES = 10  # one puzzle in ten is real-dev, the rest is real-train


@dataclass(frozen=True)
class Row:
    """One row. The first sentence of its prompt decides the family; puzzle is None if the family cannot parse it."""

    line: int  # number of the line where the row ends
    row_id: str
    prompt: str
    answer: str
    family: str  # "" if no family's prompts begin so
    puzzle: Any

    @property
    def is_scorable(self) -> bool:
        r"""Whether the scorer reads the row's own answer from its box; it cannot read `}` from `\boxed{}}`."""
        return is_correct(self.answer, extract(f"\\boxed{{{self.answer}}}"))

    @property
    def is_dev(self) -> bool:
        """Whether the puzzle belongs to the dev part; equal puzzles always fall into the same part."""
        return int(prompt_digest(self.prompt), 16) % _DEV_SHARES == 0


@dataclass
class Split:
    """The rows of some families in two parts, and the ids of those in neither."""

    train: list[Row] = field(default_factory=list)
    dev: list[Row] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> row ids

    def as_json(self) -> dict[str, Any]:
        """Returns the counts by part and family, and the ids of the rows in neither part."""
        parts = {"train": self.train, "dev": self.dev}
        counts = {name: dict(sorted(Counter(row.family for row in rows).items())) for name, rows in parts.items()}
        return {**counts, "left_out": self.left_out}


def read_rows(path: Path) -> list[Row]:
    """Returns every row of the file. Raises DataError with the line, what is wrong with it, and what to do."""
    rows: dict[str, Row] = {}
    for line, fields in read_table(path, COLUMNS):
        wrong = _what_is_wrong(fields, rows)
        if wrong:
            raise DataError(f"{path} line {line}: {wrong}")
        row_id, prompt, answer = fields
        family, puzzle = recognise(prompt)
        rows[row_id] = Row(line, row_id, prompt, answer, family, puzzle)
    if not rows:
        raise DataError(f"{path} has no rows below its header; rows of {','.join(COLUMNS)} are needed")
    return list(rows.values())


def recognise(prompt: str) -> tuple[str, Any]:
    """Returns family and puzzle of a prompt: family "" if it begins like none, puzzle None if the rest does not parse."""
    for name, family in FAMILIES.items():
        if prompt.startswith(family.PHRASES[0]):
            try:
                return name, family.parse(prompt)
            except ValueError:
                return name, None
    return "", None


def split(rows: Sequence[Row], families: Collection[str]) -> Split:
    """Splits rows as the module's docstring says; rows of other known families are ignored."""
    found = Split()
    seen: set[str] = set()
    for row in rows:
        reason = _why_not(row)
        if row.family and row.family not in families:
            continue
        digest = prompt_digest(row.prompt)
        reason = reason or ("repeats another row" if digest in seen else "")
        seen.add(digest)
        if reason:
            found.left_out.setdefault(reason, []).append(row.row_id)
        elif row.is_dev:
            found.dev.append(row)
        elif is_correct(row.answer, FAMILIES[row.family].solve(row.puzzle).answer):
            found.train.append(row)
        else:
            found.left_out.setdefault("the solver has another answer", []).append(row.row_id)
    pairs = [[(row.row_id, row.prompt) for row in part] for part in (found.train, found.dev)]
    repeated = {each.training_id for each in overlaps(*pairs)}
    if repeated:
        found.train = [row for row in found.train if row.row_id not in repeated]
        found.left_out["repeats a row of the dev part"] = sorted(repeated)
    return found


def _why_not(row: Row) -> str:
    if row.puzzle is None:
        return "no known family reads it"
    return "" if row.is_scorable else "the scorer does not read the answer from its box"


def _what_is_wrong(fields: list[str], rows: dict[str, Row]) -> str:
    empty = [name for name, field in zip(COLUMNS, fields, strict=True) if not field.strip()]
    if empty:
        return f"no {empty[0]}; fill the column {empty[0]} in, or remove the row"
    if fields[0] in rows:
        return f"id {ascii(fields[0])[1:-1]} came before, on line {rows[fields[0]].line}; keep one of the two rows"
    return ""
