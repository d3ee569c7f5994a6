"""How far two engines agree on the same items: `python -m substrate.agreement A.jsonl B.jsonl [--answers F]`.

    A.jsonl, B.jsonl   completions as `generate` writes them, of the same items
    items 300, same text 291 (97.0 %), same answer 298 (99.3 %), first difference after 213 characters (median)
    right: A 211, B 212, one of the two 3

Greedy decoding differs between engines where two tokens are within rounding: a text parts there and goes on otherwise.
What counts for a score is the answer.
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
    """Lines of the report. Raises DataError when the files are not of the same items."""
    texts = [{row["item_id"]: row["completion"] for row in read_json_lines(path, ROW)} for path in (first, second)]
    if missing := sorted(set(texts[0]) ^ set(texts[1])):
        raise DataError(f"{missing[0]} is in one of {first} and {second} only ({len(missing)} such items)")
    pairs = [(texts[0][item], texts[1][item]) for item in sorted(texts[0])]
    if not pairs:
        raise DataError(f"{first} has no items")
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
    """Reads the command line; prints the report."""
    parser = Parser(
        prog="substrate.agreement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--answers", type=Path, help="answers.jsonl of the same items: counts what is right as well")
    arguments = parser.parse_args()
    print("\n".join(compare(arguments.first, arguments.second, arguments.answers)))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
