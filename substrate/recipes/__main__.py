"""Entry: check recipes before anything is made of them: `python -m substrate.recipes FILE`.

FILE    {"recipes": [{"method": ...}, ...], "parallelism": {"pp": 1, "dp": 1, ...}}

Exit 0, or 64 and one line about the first that is wrong. Nothing but the standard library is imported.
"""

import sys
from pathlib import Path

from substrate.interface.command_line import Parser, read_json
from substrate.interface.errors import UsageError, exit_code_of
from substrate.recipes import load_recipe


def main() -> None:
    """Read the command line and check."""
    parser = Parser(prog="substrate.recipes", description="Check recipes against what their methods know.")
    parser.add_argument("file", type=Path)
    asked = read_json(parser.parse_args().file)
    try:
        recipes, layout = asked["recipes"], asked["parallelism"]
        pp, dp = layout["pp"], layout["dp"]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{error!r}; recipes and parallelism are needed") from None
    for recipe in recipes:
        load_recipe(recipe).check_layout(pp, dp)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
