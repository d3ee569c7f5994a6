"""Checkpoints of a training run: what a killed or stopped process needs to go on as if nothing had happened.

    checkpoints/step_000100/    state-00000-00000.safetensors   whole tensors, each written by one of the ranks that share it
                                complete.json                   step, identity, numbers of the run, size and sha256 of files
    checkpoints/step_000200/    ...
    checkpoints/partial/        being written, or left by a kill; never read

A checkpoint is written aside and renamed, so a folder `step_*` was complete once; `complete.json` tells whether it
still is (a full disk or a lost page truncates a file without a word). The newest two are kept: one that is damaged is
passed over, with a warning, for the one before it.

Tensors are whole and have their published names (`exp_avg/...` for a moment of AdamW), so a run may go on in another
layout of ranks: in the same one its numbers are equal to the last bit, in another to rounding. `identity` (the
configuration without the layout) is compared at load, so another run's state is refused. No file is a pickle.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.interface.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


KEPT = 2


def save(folder: Path, tensors: Iterable[tuple[str, "Tensor"]], record: dict[str, Any]) -> None:
    """Writes the state after `record["step"]` steps. All ranks call it together; it is complete when they return.

    tensors: those that this rank writes, whole and on the host. record: JSON; rank 0's counts; has step and identity.
    Raises DataError when a file cannot be written; the checkpoint before stays.
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
            shutil.rmtree(final, ignore_errors=True)  # left by a run that got this far, and was resumed from before it
            os.replace(partial, final)
            for old in _newest_first(folder)[KEPT:]:
                shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise DataError(f"checkpoint after step {record['step']} cannot be written: {error}; room is needed") from None
    dist.barrier()


def newest(folder: Path, identity: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its record; None where there is none. All ranks call it together.

    Raises UsageError if it was written by a run of another configuration.
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
            warnings.warn(f"checkpoint {path} is damaged ({what}): passed over", RuntimeWarning, stacklevel=2)
            continue
        if record["identity"] != identity:
            changed = sorted(key for key in identity if record["identity"].get(key) != identity[key])
            raise UsageError(
                f"{path} was written with another {', '.join(changed)}; valid is the same, or an empty folder"
            )
        return path, record
    return None


def _inspect(path: Path, rank: int, num_ranks: int) -> tuple[dict[str, Any], list[str]]:
    """The record, and what is damaged; the files are shared out among the ranks, for they may be 440 GB."""
    try:
        record = json.loads((path / "complete.json").read_text())
        mine = sorted(record["files"].items())[rank::num_ranks]
        return record, [name for name, expected in mine if _fingerprint(path / name) != expected]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return {}, [repr(error)]


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True)


def _fingerprint(path: Path) -> list[int | str]:
    """Size in bytes and sha256."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _write_durably(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
