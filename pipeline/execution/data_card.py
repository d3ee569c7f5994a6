"""The data card of a trial: the digests of the prompts that it says it learned from. The judge compares them with its own prompts.

    {"schema": 1, "num_places": 2400, "families": {"roman": {"examples": 800, "too_long": [], ...}, ...}, "prompts": [SHA-256, ...]}

The trial writes its card itself, so a card can prove guilt but not innocence: an arm fails where its card names the prompt of a judged
item. The sandbox keeps judged prompts from a trial; this check finds those that were in the training data.
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
MAX_BYTES = 16 * 2**20  # a quarter of a million digests; other JSON of this length takes a few hundred MB to parse
_DIGEST = re.compile("[0-9a-f]{64}")
_SHOWN = 5


def check_and_keep(out_dir: Path, keep: Path, known_prompts: Path) -> str:
    """Check a finished trial's card and write it to `keep`; the trial's own bytes go to `trial_<name>` beside it.

    known_prompts: the image's train_prompts.sha256. Returns one line that says how many prompts the card names and how many of them the
    image lacks. Raises TrialFailed (bad_output) where the card is absent or not a data card.
    """
    try:
        with open_output(out_dir, NAME) as file:
            text = file.read(MAX_BYTES + 1)
    except NotFound as error:
        raise TrialFailed("bad_output", f"the trial wrote no {NAME}, which every recipe must write") from error
    digests = _digests(text)
    # Encode it again, so that every reader sees the same values however the trial wrote them.
    write_file(keep, json.dumps({"schema": 1, "prompts": digests}))
    write_file(keep.with_name(f"trial_{keep.name}"), text)
    unknown = len(set(digests) - set(known_prompts.read_text().split()))
    return f"{len(digests)} prompts, {unknown} of them not from the image"


def _digests(text: bytes) -> list[str]:
    """Return the prompts' digests of a card. Raises TrialFailed (bad_output) for anything that is not a card."""
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
    raise TrialFailed(
        "bad_output", f"{NAME} is not a data card: it needs schema 1 and `prompts`, a list of SHA-256 digests"
    )


def refuse_overlap(root: Path, card: Path, inputs: Path, sets: Sequence[str], work: Path, log_path: Path) -> None:
    """Compare the card with each set's prompts, `inputs`/<set>.jsonl, by the image's own `substrate.overlap`.

    Raises TrialFailed (contaminated), which names items whose prompts the card has.
    """
    for item_set in sets:
        given = work / f"overlap-{item_set}" / "in"
        given.mkdir(parents=True, mode=0o755)
        shutil.copyfile(card, given / "card.json")
        shutil.copyfile(inputs / f"{item_set}.jsonl", given / "prompts.jsonl")
        arguments = ["--card", "/in/card.json", "--prompts", "/in/prompts.jsonl", "--out", "/out/overlaps.jsonl"]
        out = image_process.start(root, "overlap", arguments, {"/in": given}, given.parent, log_path)
        learned = [row["item_id"] for row in rows_of(out / "overlaps.jsonl")]
        if learned:
            shown = ", ".join(learned[:_SHOWN]) + (", ..." if len(learned) > _SHOWN else "")
            raise TrialFailed("contaminated", f"the trial learned from {len(learned)} items of {item_set}: {shown}")
