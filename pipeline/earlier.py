"""What an earlier attempt at an arm left when it was cut short, taken up by the next: checkpoints, a sealed adapter, completions.

Nothing is taken on trust: checkpoints are read inside a sandbox only, an adapter must be the one that was sealed, completions count
only when they were decoded with this very adapter under this very plan.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import adapter
from pipeline.errors import IntegrityError, PipelineError
from pipeline.layout import Attempt, read_json


@dataclass(frozen=True)
class Trained:
    """An adapter that needs no training again, and the attempt that trained it."""

    adapter_digest: str
    number: int


def take_up_sealed(attempt: Attempt, before: Sequence[Attempt], plan_digest: str) -> Trained | None:
    """Copy the newest sealed adapter, its progress, data card and probe. Raises IntegrityError when it is not what was sealed."""
    for each in before:
        record = sealed_record(each)
        if not record or record["plan_digest"] != plan_digest or not record["adapter_digest"]:
            continue
        for source in (each.progress, each.data_card, each.probe):
            if source.exists():
                shutil.copyfile(source, attempt.folder / source.name)
        shutil.copytree(each.adapter_dir, attempt.adapter_dir)
        digest = adapter.kept_digest(attempt.adapter_dir)
        if digest != record["adapter_digest"]:
            raise IntegrityError(f"{each.adapter_dir} is not the adapter that was sealed", f"Remove {each.folder}")
        return Trained(digest, each.number)
    return None


def take_up_decoded(attempt: Attempt, before: Sequence[Attempt], plan_digest: str, adapter_digest: str) -> None:
    """Copy the shards of completions that an earlier attempt made with this very adapter."""
    for each in before:
        record = sealed_record(each)
        same = record and (record["plan_digest"], record["adapter_digest"]) == (plan_digest, adapter_digest)
        if same and each.decoded_dir.exists():
            shutil.copytree(each.decoded_dir, attempt.decoded_dir, ignore=shutil.ignore_patterns(".*"))
            return


def sealed_record(attempt: Attempt) -> dict[str, Any]:
    """What an attempt sealed; empty where it did not come to that, or the file is damaged."""
    try:
        record = read_json(attempt.sealed)
        return record if {"plan_digest", "adapter_digest"} <= set(record) else {}
    except (PipelineError, TypeError):
        return {}


def keep_state(out_dir: Path, saved_dir: Path) -> None:
    """Keep checkpoints and progress for the next attempt; only another sandbox will read them."""
    aside = saved_dir.with_name(f".{saved_dir.name}")
    shutil.copytree(out_dir, aside, symlinks=True)
    os.rename(aside, saved_dir)
