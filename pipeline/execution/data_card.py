"""The data card of a trial: what it says it learned from, kept beside its adapter and held against the judge's own prompts.

    {"schema": 1, "num_places": 2400, "families": {"roman": {"examples": 800, "too_long": [], ...}, ...}, "prompts": [SHA-256, ...]}

A card is a trial's word, so it can only accuse: a prompt of a judged set among its digests fails the arm, by name. That a trial cannot
know such a prompt is what its sandbox is for; this check is for data that came in by another door.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.campaign import strict_json
from pipeline.campaign.errors import NotFound, TrialFailed
from pipeline.campaign.files import rows_of, write_file
from pipeline.execution import image_process
from pipeline.sandbox.bubblewrap import open_output

NAME = "data_card.json"
MAX_BYTES = 16 * 2**20  # a quarter of a million digests; parsed here, anything else as long takes some hundred MB
_DIGEST = re.compile("[0-9a-f]{64}")
_SHOWN = 5


def take(out_dir: Path, keep: Path, known_prompts: Path) -> str:
    """Keep the card of a finished trial; says in a line how many prompts it names, and how many the image does not have.

    known_prompts: the image's train_prompts.sha256. Raises TrialFailed (bad_output) where there is no card, or it is none.
    """
    try:
        with open_output(out_dir, NAME) as file:
            text = file.read(MAX_BYTES + 1)
    except NotFound as error:
        raise TrialFailed("bad_output", f"the trial wrote no {NAME}; every recipe writes one") from error
    digests = _digests(text)
    # Made anew: what two programs read must not depend on how a trial wrote it.
    write_file(keep, json.dumps({"schema": 1, "prompts": digests}))
    write_file(keep.with_name(f"trial_{keep.name}"), text)
    unknown = len(set(digests) - set(known_prompts.read_text().split()))
    return f"{len(digests)} prompts, {unknown} of them not from the image"


def _digests(text: bytes) -> list[str]:
    try:
        card = strict_json.read(text, max_bytes=MAX_BYTES)
        digests = card["prompts"]
        is_card = type(card["schema"]) is int and card["schema"] == 1 and type(digests) is list
        if is_card and all(type(digest) is str and _DIGEST.fullmatch(digest) for digest in digests):
            return digests
    except strict_json.BadJson as bad:
        if bad.code == "too_large":
            raise TrialFailed("bad_output", f"{NAME} is longer than {MAX_BYTES} bytes") from None
    except (KeyError, TypeError):
        pass
    raise TrialFailed("bad_output", f"{NAME} is not a data card: schema 1 and `prompts`, SHA-256 digests, are needed")


def refuse_overlap(root: Path, card: Path, inputs: Path, sets: Sequence[str], work: Path, log_path: Path) -> None:
    """Hold the card against each set's prompts, `inputs`/<set>.jsonl, by the image's own `substrate.overlap`.

    Raises TrialFailed (contaminated) with the ids of the items that the card names.
    """
    for item_set in sets:
        given = work / f"overlap-{item_set}" / "in"
        given.mkdir(parents=True, mode=0o755)
        shutil.copyfile(card, given / "card.json")
        shutil.copyfile(inputs / f"{item_set}.jsonl", given / "prompts.jsonl")
        arguments = ["--card", "/in/card.json", "--prompts", "/in/prompts.jsonl", "--out", "/out/overlaps.jsonl"]
        out = image_process.start(root, "overlap", arguments, {"/in": given}, given.parent, log_path)
        found = [row["item_id"] for row in rows_of(out / "overlaps.jsonl")]
        if found:
            named = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
            raise TrialFailed("contaminated", f"the trial learned from {len(found)} items of {item_set}: {named}")
