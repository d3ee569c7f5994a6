"""Entry: make the image's training data, solved puzzles with their reasoning, from a public seed and from real rows.

    python -m substrate.payload --out PAYLOAD --seed 1 --level small --num-per-family 4000 --families roman gravity
        [--csv train.csv --held-out FOLDER] [--registered prompts.jsonl ...] [--slices '{"gravity": {"time": [1, 2]}}']

    data/train.jsonl             {"item_id": "roman-000012", "family": "roman", "prompt": "In Alice's Wonderland, ...",
                                  "answer": "XXXVIII", "traces": {"short": "30 8", "stepwise": "30 XXX\\n8 ..."},
                                  "source": "generated"}    or "slice" within a declared slice, or "real"
    data/train_prompts.sha256    one digest per line, sorted: the prompts that `substrate.items` must not draw again
    data/card.json               the number of rows by family and source, and which real rows were left out, and why
    FOLDER/prompts.jsonl         the held-out real rows, in the format of `substrate.items`
    FOLDER/answers.jsonl         their answers

Registered prompts, one {"item_id", "prompt"} per line, are those that somebody will evaluate with. A real row that
repeats one is an error that names both; generated puzzles that would be equal to one are skipped.

It prints how many real rows are used, held out and left out, and why. The same arguments give the same bytes.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from substrate.data.competition import Row, Split, check_any, read_rows, split
from substrate.data.prompt_overlap import overlaps, prompt_digest
from substrate.data.rows import SOURCES
from substrate.data.slices import Limits, is_within, read_slices
from substrate.interface.command_line import Parser, read_json_lines, write_json_lines, write_text
from substrate.interface.errors import DataError, UsageError, exit_code_of
from substrate.items import Item, draw_items
from substrate.tasks import FAMILIES, LEVELS, STYLES

_SHOWN = 5  # overlaps that an error message lists
_CHUNK = 100  # puzzles that a process makes at a time


def write_payload(
    out: Path,
    seed: int,
    level: str,
    num_per_family: int,
    families: Collection[str],
    csv: Path | None = None,
    held_out: Path | None = None,
    registered: Sequence[Path] = (),
    slices: Mapping[str, Limits] | None = None,
    num_dev: int = 0,
) -> None:
    """Writes the files of `out/data` and, with a csv, those of `held_out`. slices: the declared slice of each family that has one.
    num_dev: how many dev items each slice must have.

    Raises DataError if the csv is malformed, has no row to train on, or repeats a registered prompt, or if no generated
    puzzle lies in a declared slice, or too few for dev; UsageError for a slice by a feature that the family lacks.
    """
    evaluation = [row for path in registered for row in read_json_lines(path, {"item_id": str, "prompt": str})]
    known = [(row["item_id"], row["prompt"]) for row in evaluation]
    real = split(read_rows(csv), families) if csv else Split()
    if csv:
        check_any([], families, real)
        print(real.as_text())
    if found := overlaps([(_real_id(row), row.prompt) for row in real.train], known):
        named = "; ".join(map(str, found[:_SHOWN]))
        raise DataError(
            f"{len(found)} rows of {csv} repeat registered prompts: {named}; remove them from one of the two"
        )
    rows = [_line(_real_id(row), row.family, row.prompt, row.answer, "real") for row in real.train]
    exclude = {prompt_digest(prompt) for _, prompt in known} | {prompt_digest(row["prompt"]) for row in rows}
    exclude |= {prompt_digest(row.prompt) for row in real.dev}
    # Hashed with a prefix, so that no training seed can equal the key of a judged set, which is 32 random bytes.
    key = hashlib.sha256(f"substrate/train/{seed}".encode()).digest()
    with ProcessPoolExecutor() as pool:  # because searching for equations is slow
        in_chunks = partial(pool.map, chunksize=_CHUNK) if num_per_family > _CHUNK else map
        for family in sorted(families):
            items = draw_items(key, family, level, num_per_family, exclude, in_chunks)
            rows += in_chunks(partial(_line_of, (slices or {}).get(family)), items)
        digests = sorted(prompt_digest(row["prompt"]) for row in rows)
        for family, limits in sorted((slices or {}).items()):
            # A set under a public key, a quarter larger than dev: a slice that is too narrow is refused here, not once arms have trained.
            key, wanted = hashlib.sha256(f"substrate/slice/{seed}".encode()).digest(), num_dev + num_dev // 4
            draw_items(key, family, level, wanted, exclude | set(digests), in_chunks, limits=limits)
    _make(out / "data")
    write_json_lines(out / "data" / "train.jsonl", rows)
    write_text(out / "data" / "train_prompts.sha256", "".join(f"{digest}\n" for digest in digests))
    counts = {
        source: dict(sorted(Counter(row["family"] for row in rows if row["source"] == source).items()))
        for source in SOURCES
        if source != "slice" or slices
    }
    for family in sorted(slices or {}):
        if not counts["slice"].get(family):
            raise DataError(
                f"none of the {num_per_family} puzzles of {family} lies in its declared slice; widen the slice"
            )
    card: dict[str, Any] = {"schema": 1, "seed": seed, "level": level, "rows": counts, "registered": len(known)}
    card |= {"real": real.as_json()} if csv else {}
    write_text(out / "data" / "card.json", json.dumps(card, indent=1) + "\n")
    if held_out:
        _write_held_out(real.dev, held_out)


def _line_of(limits: Limits | None, item: Item) -> dict[str, Any]:
    source = "slice" if limits and is_within(limits, item.family, item.puzzle) else "generated"
    return _line(item.item_id, item.family, item.prompt, item.answer, source)


def _line(item_id: str, family: str, prompt: str, answer: str, source: str) -> dict[str, Any]:
    rules = FAMILIES[family]
    puzzle = rules.parse(prompt)
    traces = {style: rules.trace(puzzle, style) for style in STYLES}
    fields = {"item_id": item_id, "family": family, "prompt": prompt, "answer": answer}
    return {**fields, "traces": traces, "source": source}


def _real_id(row: Row) -> str:
    return f"real-{row.row_id}"


def _write_held_out(rows: Sequence[Row], folder: Path) -> None:
    _make(folder)
    ordered = sorted(rows, key=_real_id)
    for name in ("prompt", "answer"):
        lines = ({"item_id": _real_id(row), "family": row.family, name: getattr(row, name)} for row in ordered)
        write_json_lines(folder / f"{name}s.jsonl", lines)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {folder}: {error}; its parent must be a writable folder") from None


def main() -> None:
    """Reads the command line and writes the payload."""
    parser = Parser(prog="substrate.payload", description="Make training data from a public seed, and from real rows.")
    parser.add_argument("--out", type=Path, required=True, help="payload folder; data/ is made in it")
    parser.add_argument("--seed", type=int, required=True, help="public training seed")
    parser.add_argument("--level", choices=LEVELS, required=True, help="difficulty of the puzzles")
    parser.add_argument("--num-per-family", type=int, required=True, help="generated puzzles of each family")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY", help="all by default"
    )
    parser.add_argument("--csv", type=Path, help="the competition's train.csv, whose rows are trained on too")
    parser.add_argument("--held-out", type=Path, help="folder for the tenth of its rows that is not trained on")
    parser.add_argument("--registered", type=Path, action="append", default=[], help="evaluation prompts to keep out")
    parser.add_argument(
        "--slices", type=json.loads, default={}, help="declared slices of families, as JSON (data/slices.py)"
    )
    parser.add_argument("--num-dev", type=int, default=0, help="dev items that each declared slice must have")
    asked = parser.parse_args()
    if asked.num_per_family < 1:
        raise UsageError(f"--num-per-family is {asked.num_per_family}; valid: 1 or more")
    if (asked.csv is None) != (asked.held_out is None):
        raise UsageError("only one of --csv and --held-out was given; give both or neither")
    write_payload(
        asked.out, asked.seed, asked.level, asked.num_per_family, set(asked.families),
        asked.csv, asked.held_out, asked.registered, read_slices(asked.slices, asked.families), asked.num_dev,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
