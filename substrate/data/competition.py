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
_SHOWN = 3  # ids that a sentence names for each reason
_ID_SIGNS = 40
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
    unasked: Counter[str] = field(default_factory=Counter)  # family that nobody asked for -> number of rows

    def as_json(self) -> dict[str, Any]:
        """Returns the counts by part and family, and the ids of the rows in neither part."""
        parts = {"train": self.train, "dev": self.dev}
        counts = {name: dict(sorted(Counter(row.family for row in rows).items())) for name, rows in parts.items()}
        return {**counts, "left_out": self.left_out}

    def as_text(self) -> str:
        """Returns one sentence with every row in it: trained on, held out, left out with reason and examples, not asked for."""
        number = sum(map(len, self.left_out.values()))
        total = len(self.train) + len(self.dev) + number + sum(self.unasked.values())
        families = _counted(Counter(row.family for row in self.train))
        said = f"{total} rows: {len(self.train)} to train on{f' ({families})' if families else ''}, {len(self.dev)} held out, {number} left out"
        return "; ".join([said, *self.why_not()])

    def why_not(self) -> list[str]:
        """Returns for each reason how many rows are not used, with the first three ids."""
        said = [f"{len(ids)} because {why} (id {_first(ids)})" for why, ids in sorted(self.left_out.items())]
        return said + (
            [f"of families that tasks.families leaves out: {_counted(self.unasked)}"] if self.unasked else []
        )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _first(ids: Sequence[str]) -> str:
    """The first three ids, each cut where it is long."""
    shown = [ascii(each)[1:-1][:_ID_SIGNS] for each in ids[:_SHOWN]]
    return ", ".join(shown) + (" ..." if len(ids) > _SHOWN else "")


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
    """Splits rows as the module's docstring says; rows of other known families are counted and not used."""
    found = Split()
    seen: set[str] = set()
    for row in rows:
        reason = _why_not(row)
        if row.family and row.family not in families:
            found.unasked[row.family] += 1
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


def check_any(rows: Sequence[Row], families: Collection[str], found: Split | None = None) -> None:
    """Raises DataError, with the reasons and the first three ids of each, if no row can be trained on.

    found: the split of the rows; without it only their families are looked at, because solving thousands of rows takes half a minute.
    """
    if any(row.family in families and row.puzzle is not None for row in rows) if found is None else found.train:
        return
    known = found or split([row for row in rows if row.puzzle is None or row.family not in families], families)
    raise DataError(
        f"none of the rows can be trained on: {', '.join(known.why_not()) or f'all {len(known.dev)} are held out'}; `python -m substrate.families "
        f"show NAME` prints a prompt as a family has it, and tasks.families has {', '.join(sorted(families))}"
    )


def _why_not(row: Row) -> str:
    if not row.family:
        return "its prompt begins as no family's does"
    if row.puzzle is None:
        return "its family cannot read the prompt to its end"
    return "" if row.is_scorable else "the scorer does not read the answer from its box"


def _what_is_wrong(fields: list[str], rows: dict[str, Row]) -> str:
    empty = [name for name, field in zip(COLUMNS, fields, strict=True) if not field.strip()]
    if empty:
        return f"no {empty[0]}; fill the column {empty[0]} in, or remove the row"
    if fields[0] in rows:
        return f"id {ascii(fields[0])[1:-1]} came before, on line {rows[fields[0]].line}; keep one of the two rows"
    return ""
