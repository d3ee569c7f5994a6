"""Campaigns for tests: one real smoke campaign a session, copied for each test, and arm files like a worker's."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.records import Arm, Plan
from pipeline.execution import results
from pipeline.rounds import freeze
from pipeline.rounds.init import init

OVERRIDES = ["experiment=smoke"]
GPUS = ["cluster=slurm", "cluster.gpus_per_node=8", "cluster.file_wait_seconds=0"]  # a site whose meta jobs have none
NUM_ITEMS = 40
_KEEP: list[TemporaryDirectory[str]] = []


@cache
def template() -> Path:
    """A campaign as `init` makes it, never to be changed; made once a session and removed with it."""
    _KEEP.append(TemporaryDirectory(prefix="campaigns-"))
    campaign = Campaign.at(Path(_KEEP[0].name) / "smoke")
    init(campaign, OVERRIDES)
    return campaign.folder


def fresh_campaign(parent: Path) -> Campaign:
    """A campaign as `init` leaves it: r0000 is frozen, r0001 is next."""
    return Campaign.at(shutil.copytree(template(), parent / "smoke"))


@cache
def frozen_template() -> Path:
    campaign = fresh_campaign(template().parent / "frozen")
    publish_reference(campaign, freeze.freeze(campaign, "r0001", OVERRIDES))
    return campaign.folder


def frozen_campaign(parent: Path) -> Campaign:
    """A campaign whose first round is frozen and whose reference is evaluated; no arm is there."""
    return Campaign.at(shutil.copytree(frozen_template(), parent / "smoke"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, to be compared before and after; locks are no content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def attributes(frozen: Plan, arm: Arm, /, **changes: Any) -> dict[str, Any]:
    """What a worker writes beside its score."""
    found = {name: kind() for name, kind in results.ATTRIBUTES.items()}
    found |= {
        name: getattr(frozen, name)
        for name in ("campaign", "round", "image_digest", "constitution_digest", "config_digest")
    }
    found |= {
        "schema_version": results.SCHEMA,
        "arm": arm.name,
        "role": arm.role,
        "seed": arm.seed,
        "status": "completed",
        "exit_class": "completed",
    }
    return {**found, "adapter_digest": canonical.digest_text(f"{frozen.round}/{arm.name}"), **changes}


def scored(num_correct: int) -> list[dict[str, Any]]:
    """Rows of one set of which the first so many are right."""
    return [
        {
            "item_id": f"roman-{n:06d}",
            "family": "roman",
            "correct": int(n < num_correct),
            "answer": "XIV",
            "num_tokens": 9,
            "truncated": 0,
        }
        for n in range(NUM_ITEMS)
    ]


def publish(folder: Round, arm: str, num_correct: int | None = 20, /, **changes: Any) -> Path:
    """One arm's file; None publishes a failed attempt."""
    frozen = folder.frozen_plan()
    mine = next(each for each in frozen.arms if each.name == arm)
    failed = {"status": "failed", "exit_class": "diverged"} if num_correct is None else {}
    items = {} if num_correct is None else {name: scored(num_correct) for name in ("dev", "fresh")}
    results.write_result(folder.published(arm), attributes(frozen, mine, **(failed | changes)), items, [], {})
    return folder.published(arm)


def publish_reference(campaign: Campaign, folder: Round, num_correct: int = 20) -> None:
    """The reference in r0000 with its dev score, and its score on this round's fresh items."""
    first = campaign.round("r0000")
    frozen = first.frozen_plan()
    results.write_result(
        first.published("a0"), attributes(frozen, frozen.arms[0]), {"dev": scored(num_correct)}, [], {}
    )
    here = attributes(frozen, frozen.arms[0], round=folder.name, config_digest=folder.frozen_plan().config_digest)
    results.write_result(folder.folder / "reference.h5", here, {"fresh": scored(num_correct)}, [], {})


@contextmanager
def changed_byte(path: Path, position: int = -2) -> Iterator[None]:
    """One bit of one byte flipped, and put back afterwards."""
    before = path.read_bytes()
    content = bytearray(before)
    content[position] ^= 1
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)
