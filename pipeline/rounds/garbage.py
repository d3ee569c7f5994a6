"""What no later run of a campaign needs: find it, with its size, and remove it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.campaign.layout import Campaign
from pipeline.execution import results


def garbage(campaign: Campaign) -> Iterator[tuple[Path, int]]:
    """What no later run needs, with its bytes: kept states and shards of arms that have a score, pickles of closed rounds."""
    for folder in campaign.frozen_rounds():
        for arm in folder.frozen_plan().arms:
            if results.status_of(folder.published(arm.name)) == "completed":
                for attempt in folder.attempts(arm.name):
                    yield from (
                        (path, _size(path)) for path in (attempt.saved_dir, attempt.decoded_dir) if path.exists()
                    )
        if folder.closed.exists():
            yield from ((path, _size(path)) for path in sorted(folder.slurm_dir.glob("*.pkl")))


def remove(found: Sequence[tuple[Path, int]]) -> None:
    """Free what `garbage` found."""
    for path, _ in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file() and not each.is_symlink()]
    return sum(each.stat().st_size for each in files)
