"""Find and remove the files of a campaign that no later run needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.campaign.layout import Campaign
from pipeline.execution import results


def garbage(campaign: Campaign) -> Iterator[tuple[Path, int]]:
    """(path, size in bytes) of kept states and decoded shards of arms that have a score, and of submitit's pickles of closed rounds."""
    for folder in campaign.frozen_rounds():
        for arm in folder.frozen_plan().arms:
            if results.has_score(folder.published(arm.name)):
                for attempt in folder.attempts(arm.name):
                    yield from (
                        (path, _size(path)) for path in (attempt.saved_dir, attempt.decoded_dir) if path.exists()
                    )
        if folder.closed.exists():
            yield from ((path, _size(path)) for path in sorted(folder.slurm_dir.glob("*.pkl")))


def remove(items: Sequence[tuple[Path, int]]) -> None:
    """Delete what `garbage` returned."""
    for path, _ in items:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files)
