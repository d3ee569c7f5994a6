"""Entry: list the evaluation prompts whose digests a data card holds. Standard library only.

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
    """Returns the ids of the (id, prompt) pairs whose digests are among those of a data card."""
    known = set(digests)
    return [item_id for item_id, prompt in evaluation if prompt_digest(prompt) in known]


def read_card_digests(path: Path) -> list[str]:
    """Returns the prompt digests of a data card. Raises DataError if it has no such list, since a trial wrote it."""
    card = read_json(path)
    digests = card.get("prompts") if isinstance(card, dict) else None
    if not isinstance(digests, list) or not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in digests):
        raise DataError(f"{path.name} has no list `prompts` of SHA-256 digests; docs/contract.md has the format")
    return digests


def main() -> None:
    """Reads the command line and writes the list."""
    parser = Parser(prog="substrate.overlap", description="List the evaluation prompts that a data card names.")
    for name, text in (
        ("card", "data_card.json that a trial wrote"),
        ("prompts", "evaluation prompts, as substrate.items writes them"),
        ("out", "file to write"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    arguments = parser.parse_args()
    rows = read_json_lines(arguments.prompts, {"item_id": str, "prompt": str})
    found = named_in(read_card_digests(arguments.card), ((row["item_id"], row["prompt"]) for row in rows))
    write_json_lines(arguments.out, ({"item_id": item_id} for item_id in found))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
