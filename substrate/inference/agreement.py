"""Compare the completions of two engines: `python -m substrate.inference.agreement A.jsonl B.jsonl [--answers F]`.

    A.jsonl, B.jsonl   completions as `substrate.generate` writes them, of the same items
    items 300, same text 291 (97.0 %), same answer 298 (99.3 %), first difference after 213 characters (median)
    right: A 211, B 212, one of the two 3

Engines round differently, so greedy decoding may choose another token where two are nearly equal, and the texts differ
from there on. Only the answer counts for a score.
"""

import argparse
import os.path
import statistics
import sys
from pathlib import Path

from substrate.answers import extract, is_correct
from substrate.interface.command_line import Parser, read_json_lines
from substrate.interface.errors import DataError, exit_code_of

ROW = {"item_id": str, "completion": str}


def compare(first: Path, second: Path, answers: Path | None) -> list[str]:
    """Returns the lines of the report. Raises DataError unless both files have the same items, at least one."""
    texts = [{row["item_id"]: row["completion"] for row in read_json_lines(path, ROW)} for path in (first, second)]
    if missing := sorted(set(texts[0]) ^ set(texts[1])):
        raise DataError(
            f"{missing[0]} is in one of {first} and {second} only ({len(missing)} such items); both must have the same items"
        )
    pairs = [(texts[0][item], texts[1][item]) for item in sorted(texts[0])]
    if not pairs:
        raise DataError(f"{first} has no items; give completions of at least one")
    same = sum(a == b for a, b in pairs)
    answered = sum(extract(a) == extract(b) for a, b in pairs)
    apart = [len(os.path.commonprefix([a, b])) for a, b in pairs if a != b]
    parted = f", first difference after {statistics.median(apart):.0f} characters (median)" if apart else ""
    share = 100 / len(pairs)
    lines = [
        f"items {len(pairs)}, same text {same} ({share * same:.1f} %), same answer {answered} ({share * answered:.1f} %){parted}"
    ]
    if answers is not None:
        gold = {row["item_id"]: row["answer"] for row in read_json_lines(answers, {"item_id": str, "answer": str})}
        marks = [[is_correct(gold[item], extract(side[item])) for item in sorted(gold)] for side in texts]
        differ = sum(a != b for a, b in zip(*marks, strict=True))
        lines.append(f"right: A {sum(marks[0])}, B {sum(marks[1])}, one of the two {differ}")
    return lines


def main() -> None:
    """Reads the command line and prints the report."""
    parser = Parser(
        prog="substrate.inference.agreement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="completions of engine A")
    parser.add_argument("second", type=Path, help="completions of engine B")
    parser.add_argument("--answers", type=Path, help="answers.jsonl of the same items, to count right answers too")
    arguments = parser.parse_args()
    print("\n".join(compare(arguments.first, arguments.second, arguments.answers)))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
