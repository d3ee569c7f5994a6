"""Entry: check recipes before a round is made of them. Standard library only, as long as no training file is named.

    python -m substrate.recipes FILE

FILE    {"recipes": [{"method": ...}, ...], "parallelism": {"pp": 1, "dp": 1, ...}}
        and, to compare the recipes with solutions, "train_data" and "tokenizer", both paths

It exits with 0, or with 64 and one line about the first wrong recipe, or with 65 if one cannot learn from the solutions.
"""

import sys
from pathlib import Path

from substrate.interface.command_line import Parser, read_json
from substrate.interface.errors import UsageError, exit_code_of
from substrate.recipes import load_recipe


def main() -> None:
    """Reads the command line and checks the recipes."""
    parser = Parser(
        prog="substrate.recipes",
        description="Check the keys of recipes, and whether they can run on a parallel layout.",
    )
    parser.add_argument("file", type=Path, help="JSON with recipes and parallelism")
    asked = read_json(parser.parse_args().file)
    try:
        recipes, layout = [load_recipe(values) for values in asked["recipes"]], asked["parallelism"]
        pp, dp = layout["pp"], layout["dp"]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"the file of recipes is wrong: {error!r}; it must have recipes, and parallelism with pp and dp"
        ) from None
    for recipe in recipes:
        recipe.check_layout(pp, dp)
    if "train_data" in asked:
        from substrate.data.tokenizer import Tokenizer

        encoder = Tokenizer.from_file(asked["tokenizer"])
        for recipe in recipes:
            recipe.check_solutions(Path(asked["train_data"]), encoder)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
