"""Entry: list the evaluation prompts whose digests a data card holds, or that texts hold. Standard library only.

    python -m substrate.overlap --card /in/data_card.json --prompts /in/dev.jsonl --out /out/overlaps.jsonl
    python -m substrate.overlap --texts /in/texts.jsonl --prompts /in/dev.jsonl --out /out/overlaps.jsonl

    {"item_id": "roman-000012"}                   a line for each evaluation prompt that the card names
    {"text_id": "substrate/recipes/sft_lora.py:7", "item_id": "roman-000012", "percent": 100}

A text holds a prompt (100 percent) if it has the prompt's tokens one after the other, whatever stands around them. Otherwise the prompt
that it repeats most is listed if it repeats at least 80 percent (substrate/data/prompt_overlap.py says of what).
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from substrate.data.prompt_overlap import N, overlaps, prompt_digest, tokens_of
from substrate.interface.command_line import Parser, read_json, read_json_lines, write_json_lines
from substrate.interface.errors import DataError, exit_code_of

_DIGEST = re.compile("[0-9a-f]{64}")


def named_in(digests: Sequence[str], evaluation: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the ids of the (id, prompt) pairs whose digests are among those of a data card."""
    known = set(digests)
    return [item_id for item_id, prompt in evaluation if prompt_digest(prompt) in known]


def held_by(texts: Sequence[tuple[str, str]], evaluation: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yields which evaluation prompts the texts hold or mostly repeat, text by text. Both are (id, text) pairs."""
    tokens = {item_id: tokens_of(prompt) for item_id, prompt in evaluation}
    counts = Counter(window for each in tokens.values() for window in set(_windows(each)))
    # Each prompt is sought at the window that fewest prompts have, because those of a family begin and end alike.
    sought: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for item_id, each in tokens.items():
        sought[min(_windows(each), key=counts.__getitem__, default=())].append(item_id)
    similar = {each.training_id: each for each in overlaps(texts, evaluation)}
    for text_id, text in texts:
        words = tokens_of(text)
        spaced = _spaced(words)
        near = dict.fromkeys(item_id for window in _windows(words) for item_id in sought.get(window, ()))
        whole = sorted(item_id for item_id in near if _spaced(tokens[item_id]) in spaced)
        yield from ({"text_id": text_id, "item_id": item_id, "percent": 100} for item_id in whole)
        if not whole and text_id in similar:
            most = similar[text_id]
            yield {"text_id": text_id, "item_id": most.evaluation_id, "percent": min(99, int(100 * most.share))}


def _windows(tokens: list[str]) -> list[tuple[str, ...]]:
    """Returns every N tokens that follow one another; a shorter text is no prompt."""
    return [tuple(tokens[start : start + N]) for start in range(len(tokens) - N + 1)]


def _spaced(tokens: list[str]) -> str:
    """Returns the tokens between spaces, so that a part of the list is a part of the text."""
    return f" {' '.join(tokens)} "


def read_card_digests(path: Path) -> list[str]:
    """Returns the prompt digests of a data card. Raises DataError if it has no such list, since a trial wrote it."""
    card = read_json(path)
    digests = card.get("prompts") if isinstance(card, dict) else None
    if not isinstance(digests, list) or not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in digests):
        raise DataError(f"{path.name} has no list `prompts` of SHA-256 digests; docs/contract.md has the format")
    return digests


def main() -> None:
    """Reads the command line and writes the list."""
    parser = Parser(prog="substrate.overlap", description="List the evaluation prompts that a data card or texts hold.")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--card", type=Path, help="data_card.json that a trial wrote")
    given.add_argument("--texts", type=Path, help='a line {"text_id", "text"} for each text')
    for name, text in (("prompts", "evaluation prompts, as substrate.items writes them"), ("out", "file to write")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    arguments = parser.parse_args()
    prompts = [
        (row["item_id"], row["prompt"]) for row in read_json_lines(arguments.prompts, {"item_id": str, "prompt": str})
    ]
    if arguments.texts:
        texts = [
            (row["text_id"], row["text"]) for row in read_json_lines(arguments.texts, {"text_id": str, "text": str})
        ]
        write_json_lines(arguments.out, held_by(texts, prompts))
    else:
        found = named_in(read_card_digests(arguments.card), prompts)
        write_json_lines(arguments.out, ({"item_id": item_id} for item_id in found))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
