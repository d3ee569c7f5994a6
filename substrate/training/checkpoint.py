"""Checkpoints of a training run, from which a killed or stopped run resumes as if nothing had happened.

    checkpoints/step_000100/    state-00000-00000.safetensors   whole tensors, each written by one of the ranks that share it
                                complete.json                   step, identity, numbers of the run, size and sha256 of files
    checkpoints/step_000200/    ...
    checkpoints/partial/        being written, or left by a kill; never read

A checkpoint is written as `partial` and then renamed, so every folder `step_*` was complete once. The sizes and digests
in `complete.json` show whether it still is, because a full disk or a lost page can truncate a file silently. The newest
two are kept; if the newest is damaged, a warning is given and the one before it is used.

Tensors are whole and have their published names (`exp_avg/...` for a moment of the optimizer), so a run may resume in another
layout of ranks: in the same layout its numbers are equal to the last bit on a CPU, in another up to rounding. `identity`, the
configuration without the layout, must be equal, so another run's state is refused. No file is a pickle.
"""

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.interface.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


KEPT = 2  # newest checkpoints that stay on disk
SHARE = 0.05  # of the time, at most, for checkpoints by the clock
VARIABLE = "SUBSTRATE_CHECKPOINT_SECONDS"


class Saver:
    """Says when a checkpoint is due, by count of steps or by the clock, and saves it unless it is saved already.

    The clock asks `seconds` after the last one, and never where that is 0. Where saving takes long, it asks later, so that
    no more than SHARE of the time goes into it. When checkpoints are saved changes nothing of what is trained.
    """

    def __init__(self, every: int, seconds: float) -> None:
        self._every, self._seconds = every, seconds
        self._due = time.monotonic() + seconds
        self.saved_step = -1

    @classmethod
    def from_environment(cls, every: int) -> "Saver":
        """Reads SUBSTRATE_CHECKPOINT_SECONDS. Raises UsageError for a value that is no number of at least 0."""
        text = os.environ.get(VARIABLE, "0")
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise UsageError(f"{VARIABLE} is {text!r}; it must be a number of seconds, 0 or more")
        return cls(every, seconds)

    def is_due(self, step: int, agree: Callable[[bool], bool]) -> bool:
        """Returns whether to save after `step`. All ranks call it together. agree: makes one rank's clock count for all."""
        return step % self._every == 0 or (self._seconds > 0 and agree(time.monotonic() >= self._due))

    def save(self, folder: Path, tensors: Iterable[tuple[str, "Tensor"]], record: dict[str, Any]) -> None:
        """Saves as the function `save`."""
        if record["step"] == self.saved_step:
            return
        begun = time.monotonic()
        save(folder, tensors, record)
        self.saved_step, now = record["step"], time.monotonic()
        self._due = now + max(self._seconds, (now - begun) / SHARE)


def save(folder: Path, tensors: Iterable[tuple[str, "Tensor"]], record: dict[str, Any]) -> None:
    """Writes the state after `record["step"]` steps. All ranks call it together; it is complete when they return.

    tensors: those that this rank writes, whole and on the host. record: JSON with `step` and `identity`; rank 0's is
    written. Raises DataError if a file cannot be written; the previous checkpoint stays.
    """
    import torch.distributed as dist
    from safetensors import SafetensorError

    from substrate.model.tensors import collect, write_shards

    partial, is_first = folder / "partial", dist.get_rank() == 0
    try:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        written = write_shards(tensors, partial, "state")
        files = collect((name, _fingerprint(partial / name)) for name in written)
        if is_first:
            _write_durably(partial / "complete.json", {"schema": 2, "files": files, **record})
            final = folder / f"step_{record['step']:06d}"
            shutil.rmtree(final, ignore_errors=True)  # left by a run that was resumed from an earlier step
            os.replace(partial, final)
            for old in _newest_first(folder)[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)  # NFS keeps the name of an open file; the next save tries again
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"checkpoint after step {record['step']} cannot be written: {error}; make room in the output folder"
        ) from None
    dist.barrier()


def newest(folder: Path, identity: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest intact checkpoint and its record, or None. All ranks call it together.

    Warns of each damaged checkpoint that it skips. Raises UsageError if the checkpoint is of another configuration.
    """
    import torch.distributed as dist

    box: list[Any] = [_newest_first(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    for path in box[0]:
        record, damaged = _inspect(path, dist.get_rank(), dist.get_world_size())
        reports: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(reports, damaged)
        if any(reports):
            what = ", ".join(sorted({name for report in reports for name in report}))
            warnings.warn(f"checkpoint {path} is damaged ({what}) and skipped", RuntimeWarning, stacklevel=2)
            continue
        if record["identity"] != identity:
            changed = sorted(key for key in identity if record["identity"].get(key) != identity[key])
            raise UsageError(
                f"{path} was written with another {', '.join(changed)}; use the same, or an empty output folder"
            )
        return path, record
    return None


def _inspect(path: Path, rank: int, num_ranks: int) -> tuple[dict[str, Any], list[str]]:
    """Returns the record and the damaged files. Each rank checks a part of the files, which may be 440 GB."""
    try:
        record = json.loads((path / "complete.json").read_text())
        mine = sorted(record["files"].items())[rank::num_ranks]
        return record, [name for name, expected in mine if _fingerprint(path / name) != expected]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return {}, [repr(error)]


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True)


def _fingerprint(path: Path) -> list[int | str]:
    """Returns size in bytes and sha256."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _write_durably(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        file.write(json.dumps(content))  # not indented, which is three times slower, and a rollout is a million numbers
        file.flush()
        os.fsync(file.fileno())
