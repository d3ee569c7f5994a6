"""Entry: score completions against the answers, item by item. It runs no model and needs the standard library alone.

    python -m substrate.score --completions dev.jsonl --answers answers.jsonl --out scores.jsonl

    completions   {"item_id": "roman-000012", "completion": "30 XXX\\n...\\boxed{XXXVIII}", "num_tokens": 31,
                   "truncated": false}
    answers       {"item_id": "roman-000012", "family": "roman", "answer": "XXXVIII"}
    out           {"item_id": "roman-000012", "family": "roman", "correct": 1, "answer": "XXXVIII", "num_tokens": 31,
                   "truncated": 0}

Every answer needs exactly one completion: a missing, repeated or surplus item is an error, never a wrong answer.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from substrate.answers import extract, is_correct
from substrate.interface.command_line import Parser, read_json_lines, write_json_lines
from substrate.interface.errors import DataError, exit_code_of

Row = Mapping[str, Any]


def score(completions: Sequence[Row], answers: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns one row per item, in item-id order. Raises DataError that names a missing, repeated or surplus item."""
    answer_of = _by_item(answers, "answers")
    completion_of = _by_item(completions, "completions")
    for item_id in sorted(answer_of.keys() ^ completion_of.keys()):
        what = "has no completion" if item_id in answer_of else "has a completion but no answer"
        raise DataError(f"item {item_id!r} {what}; each item needs exactly one of each")
    return [_judge(completion_of[item_id], answer_of[item_id]) for item_id in sorted(answer_of)]


def _by_item(rows: Sequence[Row], name: str) -> dict[str, Row]:
    by_item: dict[str, Row] = {}
    for row in rows:
        if row["item_id"] in by_item:
            raise DataError(f"item {row['item_id']!r} is repeated in the {name}; each item must occur there once")
        by_item[row["item_id"]] = row
    return by_item


def _judge(completion: Row, answer: Row) -> dict[str, Any]:
    extracted = extract(completion["completion"])
    return {
        "item_id": answer["item_id"],
        "family": answer["family"],
        "correct": int(is_correct(answer["answer"], extracted)),
        "answer": extracted,
        "num_tokens": completion["num_tokens"],
        "truncated": int(completion["truncated"]),
    }


def main() -> None:
    """Reads the command line and writes the scores."""
    parser = Parser(prog="substrate.score", description="Score completions against answers.")
    parser.add_argument(
        "--completions", type=Path, required=True, help="completions, as substrate.generate writes them"
    )
    parser.add_argument("--answers", type=Path, required=True, help="answers, as substrate.items writes them")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    completions = read_json_lines(
        arguments.completions, {"item_id": str, "completion": str, "num_tokens": int, "truncated": bool}
    )
    answers = read_json_lines(arguments.answers, {"item_id": str, "family": str, "answer": str})
    write_json_lines(arguments.out, score(completions, answers))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
