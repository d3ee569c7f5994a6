"""End a campaign, and clear it of files that no later run needs.

`end` publishes the seeds that stayed secret throughout it, so that anybody can make its dev items and score them again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.execution import results
from pipeline.rounds import meta
from pipeline.sandbox import kernel_cache


def end(campaign: Campaign, *, dry_run: bool = False) -> list[str]:
    """Reveal the seeds of dev, of its replacements and of the board, and sign the head; no round may follow. Returns the seeds' names.

    Seeds of rounds that never ran stay secret, because no decision rests on them. Raises ConfigError while a round is open.
    """
    facts_of(campaign)
    newest = list(campaign.frozen_rounds())[-1]
    if newest.number == 0 or not newest.closed.exists():
        raise ConfigError(
            f"{newest.name} of {campaign.name} is not closed",
            "Wait until the round is closed, or close it by hand with `close`; then run `end` again",
        )
    seeds = read_json(campaign.seeds)
    replaced = {f"dev/{name}" for _, name in newest.frozen_plan().policy.repaired}
    names = [name for name in ("dev", *sorted(replaced), "board") if name in seeds]
    if not dry_run:
        log = Log(campaign.log)
        log.append_once("end", round=newest.name)
        for name in names:
            log.append_once("reveal", round=newest.name, name=name, seed=seeds[name])
        meta.reveal(campaign, newest)
    return names


def garbage(campaign: Campaign) -> Iterator[tuple[Path, int]]:
    """(path, size in bytes) of what no later run needs.

    Of arms that have a score the kept states and journals, of closed rounds submitit's pickles and the keys of a killed model server; of this
    machine's compiled kernels damaged and unfinished caches of the campaign's image, and all of them once the campaign has ended.
    """
    for folder in campaign.frozen_rounds():
        for arm in folder.frozen_plan().arms:
            if results.has_score(folder.published(arm.name)):
                for attempt in folder.attempts(arm.name):
                    yield from (
                        (path, _size(path)) for path in (attempt.saved_dir, attempt.decoded_dir) if path.exists()
                    )
        if folder.closed.exists():
            left = (folder.server_key, folder.server_certificate, folder.server_address)  # of a server that was killed
            yield from ((path, _size(path)) for path in left if path.exists())
            yield from ((path, _size(path)) for path in sorted(folder.slurm_dir.glob("*.pkl")))
    yield from ((path, _size(path)) for path in _kernel_caches(campaign))


def _kernel_caches(campaign: Campaign) -> list[Path]:
    """Caches of compiled kernels on this machine that no later run needs; none where the nodes' scratch is not here."""
    for folder in list(campaign.frozen_rounds())[-1:]:
        with suppress(ConfigError):
            store = kernel_cache.store_of(settings.load(folder.config).cluster.scratch_dir)
            return list(kernel_cache.garbage(store, folder.frozen_plan().image_digest, campaign.has_ended))
    return []


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
