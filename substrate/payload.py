"""Entry: make the image's training data, solved puzzles with their reasoning, from a public seed.

    python -m substrate.payload --out PAYLOAD --seed 1 --level small --num-per-family 4000 --families roman gravity

    data/train.jsonl             {"item_id": "roman-000012", "family": "roman", "prompt": "In Alice's Wonderland, ...",
                                  "answer": "XXXVIII", "trace": "30 XXX\\n8 VIII\\nXXXVIII"}
    data/train_prompts.sha256    one digest a line, sorted: what `substrate.items` must not ask again

The same arguments give the same bytes. Traces are stepwise; a recipe that wants another style has the trainer write
them again from the prompt (`FAMILIES[family].trace(FAMILIES[family].parse(prompt), style)`).
"""

import hashlib
import sys
from collections.abc import Collection
from pathlib import Path

from substrate.entry import Parser, write_json_lines, write_text
from substrate.errors import DataError, UsageError, exit_code_of
from substrate.items import draw_items, prompt_digest
from substrate.tasks import FAMILIES, LEVELS

_STYLE = "stepwise"


def write_payload(out: Path, seed: int, level: str, num_per_family: int, families: Collection[str]) -> None:
    """Write `out/data/train.jsonl` and `out/data/train_prompts.sha256`."""
    # Hashed with a purpose: no training seed is ever the key of a judged set, which is 32 random bytes.
    key = hashlib.sha256(f"substrate/train/{seed}".encode()).digest()
    items = [item for family in sorted(families) for item in draw_items(key, family, level, num_per_family)]
    rows = (
        {
            "item_id": item.item_id,
            "family": item.family,
            "prompt": item.prompt,
            "answer": item.answer,
            "trace": FAMILIES[item.family].trace(item.puzzle, _STYLE),
        }
        for item in items
    )
    data = out / "data"
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {data}: {error}; a writable folder is needed") from None
    write_json_lines(data / "train.jsonl", rows)
    digests = sorted(prompt_digest(item.prompt) for item in items)
    write_text(data / "train_prompts.sha256", "".join(f"{digest}\n" for digest in digests))


def main() -> None:
    """Read the command line and do it."""
    parser = Parser(prog="substrate.payload", description="Make training data from a public seed.")
    parser.add_argument("--out", type=Path, required=True, help="payload folder; data/ is made in it")
    parser.add_argument("--seed", type=int, required=True, help="public training seed")
    parser.add_argument("--level", choices=LEVELS, required=True)
    parser.add_argument("--num-per-family", type=int, required=True, help="puzzles of each family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    arguments = parser.parse_args()
    if arguments.num_per_family < 1:
        raise UsageError(f"--num-per-family {arguments.num_per_family}; valid: 1 or more")
    write_payload(arguments.out, arguments.seed, arguments.level, arguments.num_per_family, set(arguments.families))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
