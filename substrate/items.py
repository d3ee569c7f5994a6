"""Entry: make a set of puzzles from a secret seed, with prompts and answers in separate files. Standard library only.

    python -m substrate.items [/task/task.json]         kind "items", docs/contract.md

    prompts.jsonl   {"item_id": "roman-000012", "family": "roman", "prompt": "In Alice's Wonderland, numbers ..."}
    answers.jsonl   {"item_id": "roman-000012", "family": "roman", "answer": "XXXVIII"}

Item 12 of a family is drawn by a generator seeded with HMAC-SHA-256(seed, "roman/12"). So nobody can compute other
items from some of them, and item 12 is the same however many items are asked for. A prompt is skipped, and its index
stays unused, if the training data or this set already have it in any spelling (`substrate/data/prompt_overlap.py`).

With `slices` a family's items are those that lie within declared limits (`substrate/data/slices.py`); the index of
another puzzle stays unused. With `shift` s each item is the longest prompt of 1 + s draws: more examples, operands of more digits, longer words. This
makes a shifted set of any family, whose puzzles are still of the level that the model was trained on.
"""

import hashlib
import hmac
import json
import random
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from substrate.data.prompt_overlap import prompt_digest
from substrate.data.slices import Limits, is_within, read_slices
from substrate.interface.command_line import Parser, read_text, write_json_lines
from substrate.interface.errors import DataError, UsageError, exit_code_of
from substrate.tasks import FAMILIES, LEVELS

_TRIES_PER_ITEM = 100  # bounds the search in a family whose puzzles are nearly all used up


@dataclass(frozen=True)
class Item:
    """One puzzle of a set."""

    item_id: str
    family: str
    puzzle: Any  # the family's own type
    prompt: str
    answer: str


Map = Callable[[Callable[[int], Item], Iterable[int]], Iterable[Item]]


def draw_items(
    seed: bytes,
    family: str,
    level: str,
    num_items: int,
    exclude: Collection[str] = (),
    map_: Map = map,
    shift: int = 0,
    limits: Limits | None = None,
) -> list[Item]:
    """Returns the first `num_items` puzzles of a family under a seed, by index, that are new.

    exclude: digests of prompts to skip. map_: applies a function to every index in order, such as a process pool's
    `map`. shift: how many more are drawn for each item, of which the longest prompt is taken. limits: of a slice, outside
    of which puzzles are skipped. Raises DataError if the family has too few puzzles.
    """
    items: list[Item] = []
    seen = set(exclude)
    index = 0
    while len(items) < num_items:
        if index >= _TRIES_PER_ITEM * num_items:
            raise DataError(
                f"family {family} at level {level} gave {len(items)} new puzzles in {index} draws; ask for fewer"
                + (", or widen its slice" if limits else "")
            )
        block = range(index, index + num_items - len(items))
        for item in map_(partial(_draw, seed, family, level, shift), block):
            if limits and not is_within(limits, family, item.puzzle):
                continue
            digest = prompt_digest(item.prompt)
            if digest not in seen:
                seen.add(digest)
                items.append(item)
        index = block.stop
    return items


def _draw(seed: bytes, family: str, level: str, shift: int, index: int) -> Item:
    key = hmac.new(seed, f"{family}/{index}".encode(), hashlib.sha256).digest()
    rules, rng = FAMILIES[family], random.Random(int.from_bytes(key))
    drawn = [rules.generate(rng, level) for _ in range(1 + shift)]
    puzzle = max(drawn, key=lambda each: len(rules.render(each)))  # the first of equals
    return Item(f"{family}-{index:06d}", family, puzzle, rules.render(puzzle), rules.solve(puzzle).answer)


@dataclass(frozen=True)
class Task:
    """A checked task file of kind `items`."""

    seed: bytes
    families: tuple[str, ...]
    level: str
    num_items_per_family: int
    shift: int
    slices: Mapping[str, Limits]
    exclude: Path
    out: Path


def read_task(path: Path) -> Task:
    """Reads and checks a task file. Raises UsageError that names the wrong key."""
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"task file {path}: {error}; it must be a JSON object of kind items") from None
    if not isinstance(task, dict) or (task.get("schema"), task.get("kind")) != (1, "items"):
        raise UsageError(f"task file {path} is not of schema 1 and kind items; this entry reads no other")
    config, paths = _object(task, "config"), _object(task, "paths")
    families = config.get("families")
    if not isinstance(families, list) or not families or not set(map(str, families)) <= set(FAMILIES):
        raise UsageError(f"config.families is {families!r}; valid: a list of {', '.join(FAMILIES)}")
    if config.get("level") not in LEVELS:
        raise UsageError(f"config.level is {config.get('level')!r}; valid: {', '.join(LEVELS)}")
    num_items = config.get("num_items_per_family")
    if type(num_items) is not int or not 0 < num_items <= 10**6:
        raise UsageError(f"config.num_items_per_family is {num_items!r}; valid: 1 to 1000000")
    shift = config.get("shift", 0)
    if type(shift) is not int or not 0 <= shift < 100:
        raise UsageError(f"config.shift is {shift!r}; valid: 0 (none) to 99")
    seed_hex = config.get("seed_hex")
    if not isinstance(seed_hex, str) or not re.fullmatch("[0-9a-f]{64}", seed_hex):
        raise UsageError("config.seed_hex is not 64 lower-case hex digits")  # without the value, which is secret
    for name in ("exclude", "out"):
        if not isinstance(paths.get(name), str):
            raise UsageError(f"paths.{name} is {paths.get(name)!r}; valid: a path")
    unique = tuple(dict.fromkeys(families))
    slices = read_slices(config.get("slices", {}), unique)
    files = Path(paths["exclude"]), Path(paths["out"])
    return Task(bytes.fromhex(seed_hex), unique, config["level"], num_items, shift, slices, *files)


def _object(task: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = task.get(key)
    if not isinstance(value, dict):
        raise UsageError(f"{key} is {value!r}; valid: an object")
    return value


def _read_exclusions(path: Path) -> set[str]:
    digests = read_text(path).split()
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        raise DataError(f"{path} has a line that is no SHA-256 digest; each line must be 64 lower-case hex digits")
    return set(digests)


def write_items(task: Task) -> None:
    """Draws the set and writes its two files, in item-id order."""
    exclude = _read_exclusions(task.exclude)
    items: list[Item] = []
    for family in sorted(task.families):
        limits, number = task.slices.get(family), task.num_items_per_family
        items += draw_items(task.seed, family, task.level, number, exclude, shift=task.shift, limits=limits)
    for name in ("prompt", "answer"):
        rows = ({"item_id": item.item_id, "family": item.family, name: getattr(item, name)} for item in items)
        write_json_lines(task.out / f"{name}s.jsonl", rows)


def main() -> None:
    """Reads the command line and writes the set."""
    parser = Parser(prog="substrate.items", description="Make a set of puzzles from a task file.")
    parser.add_argument("task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind items")
    write_items(read_task(parser.parse_args().task))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
