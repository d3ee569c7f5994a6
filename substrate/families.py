"""Entry: look at the puzzle families.

python -m substrate.families show roman --level full --seed 3       a puzzle, its reasoning and its answer
python -m substrate.families check train.csv [--whole]              whether the competition's rows can be read and used
python -m substrate.families report train.csv [--json] [--wrong]    the solvers on the competition's rows
python -m substrate.families compare train.csv [--json]             the generators against those rows
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

from substrate.interface.command_line import Parser
from substrate.interface.errors import exit_code_of
from substrate.tasks import FAMILIES, LEVELS, STYLES


def main() -> None:
    """Reads the command line and prints what it asks for."""
    parser = Parser(
        prog="substrate.families", description="Show puzzles, and test solvers and generators on real rows."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    sub = verbs.add_parser("show", help="print a generated puzzle, its reasoning and its answer")
    sub.add_argument("family", choices=FAMILIES)
    sub.add_argument("--level", choices=LEVELS, default="full", help="difficulty (full)")
    sub.add_argument("--seed", type=int, default=1, help="of the generator (1)")
    sub.add_argument("--style", choices=STYLES, default="stepwise", help="of the reasoning (stepwise)")
    report = verbs.add_parser("report", help="count the competition's rows that the parsers read and the solvers solve")
    report.add_argument("--wrong", action="store_true", help="also list the rows with wrong or unscorable answers")
    compare = verbs.add_parser("compare", help="compare generated puzzles with the rows by two-sample tests")
    check = verbs.add_parser("check", help="read the competition's rows, and count them by family")
    check.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY", help="all")
    check.add_argument("--whole", action="store_true", help="solve them too, as a campaign does: which rows are used")
    for sub in (check, report, compare):
        sub.add_argument("csv", type=Path, help="the competition's train.csv")
    for sub in (report, compare):
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.verb == "show":
        show(arguments.family, arguments.level, arguments.seed, arguments.style)
        return
    from substrate.data.competition import check_any, read_rows, split

    rows = read_rows(arguments.csv)
    if arguments.verb == "check":
        found_rows = split(rows, arguments.families) if arguments.whole else None
        check_any(rows, arguments.families, found_rows)
        if found_rows:
            print(found_rows.as_text())
            return
        counts = Counter(row.family or "of no family" for row in rows)
        print(f"{len(rows)} rows: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
        return
    from substrate.data import families_report

    if arguments.verb == "report":
        found = families_report.report(rows)
        print(json.dumps(found.as_json(), indent=1) if arguments.json else found.as_text(with_rows=arguments.wrong))
    else:
        compared = families_report.compare(rows)
        print(json.dumps(compared.as_json(), indent=1) if arguments.json else compared.as_text())


def show(family: str, level: str, seed: int, style: str) -> None:
    """Prints a generated prompt, its reasoning and its answer."""
    rules = FAMILIES[family]
    puzzle = rules.generate(random.Random(seed), level)
    print(rules.render(puzzle), rules.trace(puzzle, style), f"answer: {rules.solve(puzzle).answer}", sep="\n\n")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
