"""Entry: name the evaluation prompts whose digests a data card has. Standard library only.

python -m substrate.overlap --card /in/data_card.json --prompts /in/dev.jsonl --out /out/overlaps.jsonl

{"item_id": "roman-000012"}                       a line for each evaluation prompt that the card names
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from substrate.data.prompt_overlap import prompt_digest
from substrate.interface.command_line import Parser, read_json, read_json_lines, write_json_lines
from substrate.interface.errors import DataError, exit_code_of

_DIGEST = re.compile("[0-9a-f]{64}")


def named_in(digests: Sequence[str], evaluation: Iterable[tuple[str, str]]) -> list[str]:
    """Ids of the evaluation prompts whose digests are among those of a data card."""
    known = set(digests)
    return [item_id for item_id, prompt in evaluation if prompt_digest(prompt) in known]


def read_card_digests(path: Path) -> list[str]:
    """The prompts of a data card, which a trial wrote; DataError where it has no list of digests."""
    card = read_json(path)
    digests = card.get("prompts") if isinstance(card, dict) else None
    if not isinstance(digests, list) or not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in digests):
        raise DataError(f"{path.name} has no `prompts` of SHA-256 digests; docs/contract.md has the form")
    return digests


def main() -> None:
    """Read the command line and do it."""
    parser = Parser(prog="substrate.overlap", description="Name the evaluation prompts that a data card has.")
    for name in ("card", "prompts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    rows = read_json_lines(arguments.prompts, {"item_id": str, "prompt": str})
    found = named_in(read_card_digests(arguments.card), ((row["item_id"], row["prompt"]) for row in rows))
    write_json_lines(arguments.out, ({"item_id": item_id} for item_id in found))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
