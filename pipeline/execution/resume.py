"""Resume an arm from what an interrupted attempt left: checkpoints, a sealed adapter, completions.

Nothing is trusted. Only a sandbox reads checkpoints, an adapter must have the digest that was sealed, and completions count only if
they were decoded with the same adapter under the same plan.
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

from pipeline.campaign.errors import FilesUnreachable, IntegrityError, NoProgress, NotFound, TrialFailed
from pipeline.campaign.files import copy_file, copy_tree, read_json
from pipeline.campaign.layout import Attempt
from pipeline.campaign.shared_path import wait_until
from pipeline.execution import adapter
from pipeline.sandbox.bubblewrap import open_output

KEEP_SECONDS = 20.0  # at least, between two copies of a trial's state; a LoRA checkpoint of the 30B model has 400 MB
MAX_STATE_BYTES = 64 * 2**30
MAX_STATE_DEPTH = 50  # os.walk recurses, so a deeper tree would crash the worker
_STEP = re.compile(r"step_\d{6}")


@dataclass(frozen=True)
class Trained:
    """A sealed adapter that need not be trained again, and the number of the attempt that trained it."""

    adapter_digest: str
    number: int


def restore_sealed(attempt: Attempt, before: Sequence[Attempt], plan_digest: str) -> Trained | None:
    """Copy the newest adapter that was sealed under this plan, with its progress, data card and probe report; None without one.

    before: earlier attempts, the newest first. Raises IntegrityError where the adapter has not the sealed digest.
    """
    for earlier in before:
        record = sealed_record(earlier)
        if not record or record["plan_digest"] != plan_digest or not record["adapter_digest"]:
            continue
        for source in (earlier.progress, earlier.data_card, earlier.probe):
            if source.exists():
                copy_file(source, attempt.folder / source.name)
        copy_tree(earlier.adapter_dir, attempt.adapter_dir)
        digest = adapter.kept_digest(attempt.adapter_dir)
        if digest != record["adapter_digest"]:
            raise IntegrityError(
                f"{earlier.adapter_dir} is not the adapter that was sealed",
                f"Remove {earlier.folder} and start the arm again; it then trains anew",
            )
        return Trained(digest, earlier.number)
    return None


def restore_decoded(attempt: Attempt, before: Sequence[Attempt], plan_digest: str, adapter_digest: str) -> None:
    """Copy the journals of items that the newest earlier attempt with the same adapter and plan decoded."""
    for earlier in before:
        record = sealed_record(earlier)
        same = record and (record["plan_digest"], record["adapter_digest"]) == (plan_digest, adapter_digest)
        if same and earlier.decoded_dir.exists():
            copy_tree(earlier.decoded_dir, attempt.decoded_dir, but=".")
            return


def sealed_record(attempt: Attempt) -> dict[str, Any]:
    """Return the content of `sealed.json`; {} where the attempt sealed nothing or the file is damaged."""
    try:
        record = read_json(attempt.sealed)
        return record if {"plan_digest", "adapter_digest"} <= set(record) else {}
    except (NotFound, IntegrityError, TypeError):
        return {}


def keep_state(out_dir: Path, saved_dir: Path) -> None:
    """Copy what a trial has written for the next attempt; only another sandbox will read it.

    Copies to a temporary folder, renames it to the next number and removes the older copy, so a numbered folder is always complete.
    Raises OSError or shutil.Error as `_copy`.
    """
    before = _saved(saved_dir)
    aside = saved_dir / ".part"
    shutil.rmtree(aside, ignore_errors=True)
    _copy(out_dir, aside)
    os.rename(aside, saved_dir / f"{int(before[-1].name) + 1 if before else 0:06d}")
    for old in before:
        shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a trial's plain files and folders, at most MAX_STATE_BYTES, and leave out links, pipes and devices.

    Raises OSError where the files are larger, nested too deep, or change meanwhile.
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
    """Return the folder of the newest kept state among earlier attempts (the newest first), or None."""
    return next((kept[-1] for earlier in before if (kept := _saved(earlier.saved_dir))), None)


def _saved(saved_dir: Path) -> list[Path]:
    return sorted(path for path in saved_dir.glob("*") if path.name.isdigit())


class Keeper:
    """Copies a trial's state out of the node after each new checkpoint, because a node may fail without a warning."""

    def __init__(self, out_dir: Path, saved_dir: Path) -> None:
        self._out_dir, self._saved_dir = out_dir, saved_dir
        self._kept, self._last_try = _newest_checkpoint(out_dir), 0.0

    def keep_if_new(self) -> None:
        """Copy the state if there is a new checkpoint. Call it often: a copy that fails (files change, disk full) is tried again."""
        newest = _newest_checkpoint(self._out_dir)
        if newest == self._kept or time.monotonic() - self._last_try < KEEP_SECONDS:
            return
        self._last_try = time.monotonic()
        try:
            keep_state(self._out_dir, self._saved_dir)
            self._kept = newest
        except (OSError, shutil.Error, FilesUnreachable):
            pass


def _newest_checkpoint(out_dir: Path) -> str:
    """Return the name of the newest finished checkpoint, "" where there is none."""
    try:
        return max((name for name in os.listdir(out_dir / "checkpoints") if _STEP.fullmatch(name)), default="")
    except OSError:
        return ""


def reached(attempt: Attempt) -> tuple[bool, int, str]:
    """Return how far an attempt got, to compare: (whether it sealed an adapter, bytes of decoded items, newest checkpoint kept)."""
    kept = _saved(attempt.saved_dir)
    decoded = sum(path.stat().st_size for path in attempt.decoded_dir.glob("*.jsonl"))
    return bool(sealed_record(attempt)), decoded, _newest_checkpoint(kept[-1]) if kept else ""


def check_progress(before: Sequence[Attempt], num_restarts: int, file_wait_seconds: float = 0.0) -> None:
    """Raise NoProgress where Slurm has restarted this job at least twice and the last start got no further than the one before.

    before: earlier attempts, the newest first; their last files may stay unseen on this node for file_wait_seconds. An arm that a
    person starts again is never refused.
    """
    if num_restarts < 2 or len(before) < 2 or before[0].result.exists():
        return
    folders = [before[0].folder, before[0].saved_dir, before[0].decoded_dir]
    if not wait_until(lambda: reached(before[0]) > reached(before[1]), file_wait_seconds, folders):
        is_sealed, decoded, checkpoint = reached(before[0])
        where = f"a sealed adapter and {decoded} bytes of decoded items" if is_sealed else checkpoint or "no checkpoint"
        how = "Raise the time limit, so that items are decoded"
        if not is_sealed:
            how = "Lower cluster.checkpoint_minutes or recipe.checkpoint_every, or raise the time limit, so that a checkpoint fits"
        raise NoProgress(
            f"two starts in a row ended at the same point ({where})", f"{how} between two interruptions; then `rerun`"
        )
