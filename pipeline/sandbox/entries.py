"""Entries of the image: a module `substrate.<entry>` run outside of a sandbox, and what its callers on both sides have in common.

`run` is for code that the caller made or compared with its digest, when nothing secret and no adapter is near: `init` before it packs
the image, and an auditor who has no sandbox. All judging of a campaign goes through execution/image_process.py instead.
"""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.campaign.layout import CODE_ROOT

REFUSALS = (64, 65)
"""Exit codes of an entry that refuses its words (64) or its data (65); docs/contract.md."""
OUTSIDE = "weights.json"  # names the base weights by digest, in an image that does not hold them
ITEM_FILES = ("prompts.jsonl", "answers.jsonl")
EXCLUDED = "data/train_prompts.sha256"  # in the image: digests of the training prompts, of which no item is made


def run(
    root: Path, entry: str, arguments: Sequence[str], work: Path | None = None, most_seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an entry of the payload unpacked at `root` to its end, as the caller, with what it printed.

    work: its folder and home; without one it stays in the caller's folder, so that relative paths mean what they mean there.
    Raises subprocess.TimeoutExpired after most_seconds; a failure is told by the return code alone.
    """
    environment = {"PATH": os.defpath, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    if work is not None:
        environment |= {"SUBSTRATE_ROOT": str(root), "HOME": str(work)}
    command = [sys.executable, "-P", "-m", f"substrate.{entry}", *arguments]
    return subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=most_seconds)


def run_substrate(payload: Path, entry: str, arguments: Sequence[str], what: str) -> str:
    """Run an entry of the payload's own code. Returns what it printed.

    what: begins the error's message. Raises ConfigError with the entry's sentence and cure where it refuses its words or its data
    (docs/contract.md), WorkFailed where it crashed.
    """
    done = run(payload, entry, arguments)
    if not done.returncode:
        return done.stdout.strip()
    said, cure = refusal_of(done)
    if done.returncode in REFUSALS:
        raise ConfigError(f"{what}: {said}", cure)
    raise WorkFailed(f"{what}: substrate.{entry} ended with code {done.returncode}: {said}")


def check_solutions(payload: Path, chosen: Mapping[str, Any]) -> str:
    """Let the image's own code compare the worked solutions of its training file with what the recipe can learn from them.

    chosen: a whole configuration as plain dictionaries. Both styles of solutions are looked at where an axis moves them. Returns a warning,
    what could not be compared, or "".

    Raises ConfigError with the reader's sentence, such as for completions that would all be cut.
    """
    recipe, model = chosen["recipe"], chosen["model"]
    if "max_new_tokens" not in recipe["options"]:
        return ""
    tokenizer = payload / "base" / "tokenizer.json"
    is_outside = Path(model["weights"]).name == OUTSIDE
    if is_outside and filecmp.cmp(tokenizer, CODE_ROOT / "substrate" / "base" / "tokenizer.json", shallow=False):
        return (
            f"whether recipe.options.max_new_tokens = {recipe['options']['max_new_tokens']:g} is enough for the worked solutions is seen where "
            "cluster.weights_dir has the checkpoint, whose tokenizer counts them"
        )
    question = payload.parent / "solutions.json"
    moved = [axis["choices"] for axis in chosen["policy"]["axes"] if axis["key"] == "recipe.trace_style"]
    recipes = [{**recipe, "trace_style": style} for style in dict.fromkeys([recipe["trace_style"], *chain(*moved)])]
    paths = {"train_data": str(payload / "data" / "train.jsonl"), "tokenizer": str(tokenizer)}
    question.write_text(json.dumps({"recipes": recipes, "parallelism": chosen["parallelism"], **paths}))
    done = run(payload, "recipes", [str(question)])
    if done.returncode:
        what, cure = refusal_of(done)
        raise ConfigError(what, cure)
    return " ".join(done.stderr.partition("RuntimeWarning: ")[2].splitlines()[:1])


def describe_real_rows(path: str, families: Sequence[str], *, whole: bool = False) -> str:
    """Return what the checkout's own reader finds in `tasks.train_csv`, such as "9500 rows: 1602 bit_manipulation, ...".

    whole: solve the rows too, which takes half a minute for thousands, and say how many are trained on, held out and left out, and why.

    Raises ConfigError with the reader's sentence: the line, what is wrong there, and the cure; also if no row is of one of the families.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"tasks.train_csv = {path} is not a file",
            "Download train.csv from the competition's page and give its path, or leave tasks.train_csv empty",
        )
    words = ["check", str(Path(path).resolve()), "--families", *families, *(["--whole"] if whole else [])]
    done = run(CODE_ROOT, "families", words)
    if done.returncode:
        what, cure = refusal_of(done)
        raise ConfigError(f"tasks.train_csv: {what}", cure)
    return done.stdout.strip()


def refusal_of(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """(what came, the cure) of an entry that failed with the line `error: what came; what is valid` (docs/contract.md)."""
    said = " ".join(done.stderr.strip().splitlines()[-1:]).removeprefix("error: ")
    what, found, cure = said.rpartition("; ")
    return (what, cure[:1].upper() + cure[1:]) if found else (said, "")


def task_text(kind: str, config: Mapping[str, Any], paths: Mapping[str, Any]) -> str:
    """A task file, which the entry of the same name reads."""
    return json.dumps({"schema": 1, "kind": kind, "config": config, "paths": paths}, indent=1)


def dev_slices(declared: Mapping[str, Any], repaired: Collection[str]) -> dict[str, Any]:
    """Return the slices that dev has in a round. What replaces a reversed family's items comes from all of its puzzles (article 12)."""
    return {family: limits for family, limits in declared.items() if family not in repaired}


def item_configs(
    seeds: Mapping[str, str],
    families: Sequence[str],
    level: str,
    num_items: int,
    shift: int = 0,
    slices: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """What `items` is asked for one set: a configuration a seed. seeds: of each family, as hex; num_items: of each family; slices: of dev."""
    for seed in sorted(set(seeds.values())):
        drawn = [family for family in families if seeds[family] == seed]
        yield {
            "seed_hex": seed,
            "families": drawn,
            "slices": {family: limits for family, limits in (slices or {}).items() if family in drawn},
            "level": level,
            "num_items_per_family": num_items,
            "shift": shift,
        }


def join_items(made: Sequence[Path]) -> dict[str, str]:
    """File name -> text of one set, from the folders that `items` wrote for its seeds; lines sorted, and with them item ids."""
    return {
        name: "".join(
            sorted(line for out in made for line in (out / name).read_text("utf-8").splitlines(keepends=True))
        )
        for name in ITEM_FILES
    }
