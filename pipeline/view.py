"""Following long work: a live table where a terminal looks on, one line a change where output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.status import ArmStatus, table

REFRESH_SECONDS = 0.5


@contextmanager
def follow(rows: Callable[[], list[ArmStatus]]) -> Iterator[Callable[[], None]]:
    """Gives a function to call often; it looks at most every half second and shows what changed."""
    if sys.stdout.isatty():
        from rich.live import Live

        with Live(table(rows()), auto_refresh=False) as live:
            yield _seldom(lambda: live.update(table(rows()), refresh=True))
        return
    seen: dict[tuple[str, str], tuple[str, str]] = {}

    def print_changes() -> None:
        for row in rows():
            now = (row.state, row.phase)
            if row.state != "waiting" and seen.get((row.round, row.arm)) != now:
                seen[row.round, row.arm] = now
                print(f"{row.round}/{row.arm} {row.role:<9} {row.state:<11} {row.phase} {row.step} {row.detail}".rstrip(), flush=True)

    yield _seldom(print_changes)


def _seldom(show: Callable[[], None]) -> Callable[[], None]:
    last = 0.0

    def maybe() -> None:
        nonlocal last
        if time.monotonic() - last >= REFRESH_SECONDS:
            last = time.monotonic()
            show()

    return maybe
