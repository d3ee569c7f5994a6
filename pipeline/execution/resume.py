"""What an earlier attempt at an arm left when it was cut short, taken up by the next: checkpoints, a sealed adapter, completions.

Nothing is taken on trust: checkpoints are read inside a sandbox only, an adapter must be the one that was sealed, completions count
only when they were decoded with this very adapter under this very plan.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import IntegrityError, NoProgress, NotFound, PipelineError, TrialFailed
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Attempt
from pipeline.execution import adapter
from pipeline.sandbox.bubblewrap import open_output

KEEP_SECONDS = 20.0  # between two copies of a trial's state: LoRA checkpoints of the 30B are 400 MB
MAX_STATE_BYTES = 64 * 2**30
MAX_STATE_DEPTH = 50  # os.walk recurses: a deeper tree would end the worker, not the copy
_STEP = re.compile(r"step_\d{6}")


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
    """Keep what a trial has written for the next attempt; only another sandbox will read it.

    Copied aside and renamed to the next number, then the one before goes: whatever is there under a number is whole.
    """
    before = _saved(saved_dir)
    aside = saved_dir / ".part"
    shutil.rmtree(aside, ignore_errors=True)
    _copy(out_dir, aside)
    os.rename(aside, saved_dir / f"{int(before[-1].name) + 1 if before else 0:06d}")
    for old in before:
        shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Plain files and folders of a trial, MAX_STATE_BYTES at most: no links, pipes or devices, and no sparse file grows whole.

    Raises OSError where it is more, is nested too deep, or changes meanwhile.
    """
    left = MAX_STATE_BYTES
    target.mkdir(parents=True)
    for folder, names, files in os.walk(source):
        below = target / Path(folder).relative_to(source)
        if len(below.relative_to(target).parts) > MAX_STATE_DEPTH:
            raise OSError(f"{source} has folders nested deeper than {MAX_STATE_DEPTH}")
        for name in names:
            if not Path(folder, name).is_symlink():
                (below / name).mkdir()
        for name in files:
            with suppress(NotFound, TrialFailed), open_output(Path(folder), name) as file:
                left -= os.fstat(file.fileno()).st_size
                if left < 0:
                    raise OSError(f"{source} has more than {MAX_STATE_BYTES} bytes")
                with open(below / name, "wb") as copy:
                    shutil.copyfileobj(file, copy, 2**20)


def newest_state(before: Sequence[Attempt]) -> Path | None:
    """What the newest of the earlier attempts kept that kept something."""
    return next((kept[-1] for each in before if (kept := _saved(each.saved_dir))), None)


def _saved(saved_dir: Path) -> list[Path]:
    return sorted(path for path in saved_dir.glob("*") if path.name.isdigit())


class Keeper:
    """Keeps a trial's state outside the node each time that it has a new checkpoint: a node that is lost says nothing first."""

    def __init__(self, out_dir: Path, saved_dir: Path) -> None:
        self._out_dir, self._saved_dir = out_dir, saved_dir
        self._kept, self._at = _newest_checkpoint(out_dir), 0.0

    def look(self) -> None:
        """Call it often. What cannot be copied now (it changes just then, the disk is full) is tried again."""
        newest = _newest_checkpoint(self._out_dir)
        if newest == self._kept or time.monotonic() - self._at < KEEP_SECONDS:
            return
        self._at = time.monotonic()
        try:
            keep_state(self._out_dir, self._saved_dir)
            self._kept = newest
        except (OSError, shutil.Error):
            pass


def _newest_checkpoint(out_dir: Path) -> str:
    """Name of the newest finished checkpoint; empty where there is none."""
    try:
        return max((name for name in os.listdir(out_dir / "checkpoints") if _STEP.fullmatch(name)), default="")
    except OSError:
        return ""


def reached(attempt: Attempt) -> tuple[bool, int, str]:
    """How far an attempt came, as far as the next one profits: sealed, shards decoded, newest checkpoint kept."""
    kept = _saved(attempt.saved_dir)
    shards = len(list(attempt.decoded_dir.glob("*.jsonl"))) if attempt.decoded_dir.exists() else 0
    return bool(sealed_record(attempt)), shards, _newest_checkpoint(kept[-1]) if kept else ""


def check_progress(before: Sequence[Attempt], num_restarts: int) -> None:
    """Raises NoProgress when Slurm has started this job twice again, and the last two starts came no further than each other.

    before: earlier attempts, the newest first. A person who starts an arm again is never refused.
    """
    if num_restarts < 2 or len(before) < 2 or before[0].result.exists():
        return
    newest, previous = reached(before[0]), reached(before[1])
    if newest <= previous:
        raise NoProgress(
            f"two starts in a row came to the same point ({newest[2] or 'no checkpoint'})",
            "A checkpoint must fit between two interruptions: lower recipe.checkpoint_every, or raise the time limit; then `rerun`",
        )
