"""Compare the completions of two engines: `python -m substrate.inference.agreement A.jsonl B.jsonl [--answers F]`.

    A.jsonl, B.jsonl   completions as `substrate.generate` writes them, of the same items
    items 300, same text 291 (97.0 %), same answer 298 (99.3 %), first difference after 213 characters (median)
    truncated: A 3, B 3
    right: A 211, B 212, A alone 1, B alone 2, p 1.00; roman: A 88, B 88, A alone 0, B alone 0, p 1.00; ...

Engines round differently, so greedy decoding may choose another token where two are nearly equal, and the texts differ
from there on. Only the answer counts for a score, and none of a truncated completion. p is that of the sign test: how
often two equally good engines share out the items that only one of them has right so unevenly, or more so.
docs/engines.md says which p is acceptable.
"""

import argparse
import math
import os.path
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from substrate.answers import extract, is_correct
from substrate.interface.command_line import Parser, read_json_lines
from substrate.interface.errors import DataError, exit_code_of

ROW = {"item_id": str, "completion": str, "truncated": bool}


def compare(first: Path, second: Path, answers: Path | None) -> list[str]:
    """Returns the lines of the report. Raises DataError unless both files have the same items, at least one."""
    read = [read_json_lines(path, ROW) for path in (first, second)]
    texts = [{row["item_id"]: row["completion"] for row in rows} for rows in read]
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
    cut = [sum(row["truncated"] for row in rows) for rows in read]
    lines.append(f"truncated: A {cut[0]}, B {cut[1]}")
    if answers is not None:
        gold = read_json_lines(answers, {"item_id": str, "family": str, "answer": str})
        if unknown := sorted({row["item_id"] for row in gold} - set(texts[0])):
            raise DataError(
                f"{answers} has {unknown[0]}, of which {first} has no completion; give answers of the same items"
            )
        marks: dict[str, list[tuple[bool, bool]]] = {"": []}
        whole = [{row["item_id"]: row["completion"] for row in rows if not row["truncated"]} for rows in read]
        for row in gold:
            item = row["item_id"]
            right = [item in side and is_correct(row["answer"], extract(side[item])) for side in whole]
            for group in ("", row["family"]):
                marks.setdefault(group, []).append((right[0], right[1]))
        lines.append("right: " + "; ".join(f"{name}: {said(of)}" if name else said(of) for name, of in marks.items()))
    return lines


def said(marks: Sequence[tuple[bool, bool]]) -> str:
    """Returns how many items each engine has right, how many it alone, and the p of the sign test. marks: (A, B) by item."""
    alone = [sum(a and not b for a, b in marks), sum(b and not a for a, b in marks)]
    sums = [sum(column) for column in zip(*marks, strict=True)]
    return f"A {sums[0]}, B {sums[1]}, A alone {alone[0]}, B alone {alone[1]}, p {sign_test(*alone):.2g}"


def sign_test(first: int, second: int) -> float:
    """Returns the two-sided p of so many items for one side and so many for the other, if each side is as likely."""
    total, fewer = first + second, min(first, second)
    tail: int = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


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
