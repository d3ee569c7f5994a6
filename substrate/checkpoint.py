"""Checkpoints of a training run: what a killed or stopped process needs to go on as if nothing had happened.

    checkpoints/step_000100/    __0_0.distcp __1_0.distcp .metadata     of torch.distributed.checkpoint, a file a rank
                                complete.json                           step, identity, size and sha256 of each file
    checkpoints/step_000200/    ...
    checkpoints/partial/        being written, or left by a kill; never read

A checkpoint is written aside and renamed, so a folder `step_*` was complete once; `complete.json` tells whether it
still is (a full disk or a lost page truncates a file without a word). The newest two are kept: one that is damaged is
passed over, with a warning, for the one before it.

State is kept rank by rank, under `rank_<r>/`, with no resharding: a resumed run has the layout that it was stopped
in, and its numbers are equal to the last bit. `identity` (configuration and layout) is compared at load, so another
run's state is refused.

The metadata of torch.distributed.checkpoint is a pickle: these folders are read only where they were written, inside
the sandbox.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from substrate.errors import UsageError

KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any], identity: dict[str, Any], *, rank: int) -> None:
    """Writes `state` (this rank's tensors, nested in dicts) as the checkpoint after `step` steps.

    All ranks call it together. It returns when the checkpoint is complete under its name.
    """
    import torch.distributed as dist
    from torch.distributed import checkpoint as torch_checkpoint

    partial = folder / "partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    torch_checkpoint.save({f"rank_{rank}": state}, checkpoint_id=partial)
    dist.barrier()
    if rank == 0:
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        _write_durably(partial / "complete.json", {"schema": 1, "step": step, "identity": identity, "files": files})
        final = folder / f"step_{step:06d}"
        shutil.rmtree(final, ignore_errors=True)  # left by a run that got this far, and was resumed from before it
        os.replace(partial, final)
        for old in _newest_first(folder)[KEPT:]:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, state: dict[str, Any], identity: dict[str, Any], *, rank: int) -> int | None:
    """Fills `state` in place from the newest sound checkpoint and returns its step; None where there is none.

    `state` has the structure that was saved; its tensors are overwritten. All ranks call it together. Raises UsageError
    if the checkpoint was written by a run of another configuration or layout.
    """
    import torch.distributed as dist

    box: list[Any] = [_newest_sound(folder) if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        return None
    path, record = box[0]
    if record["identity"] != identity:
        changed = sorted(key for key in identity if record["identity"].get(key) != identity[key])
        raise UsageError(f"{path} was written with another {', '.join(changed)}; valid is the same, or an empty folder")

    from torch.distributed import checkpoint as torch_checkpoint

    torch_checkpoint.load({f"rank_{rank}": state}, checkpoint_id=path)
    return record["step"]


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True)


def _newest_sound(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    for path in _newest_first(folder):
        try:
            record = json.loads((path / "complete.json").read_text())
            damaged = [name for name, expected in record["files"].items() if _fingerprint(path / name) != expected]
        except (OSError, ValueError, KeyError) as error:
            damaged = [repr(error)]
        if not damaged:
            return path, record
        warnings.warn(f"checkpoint {path} is damaged ({', '.join(damaged)}): passed over", RuntimeWarning, stacklevel=3)
    return None


def _fingerprint(path: Path) -> list[int | str]:
    """Size in bytes and sha256."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _write_durably(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
