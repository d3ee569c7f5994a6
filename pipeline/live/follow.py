"""Show a running round until it ends: a screen on a terminal, elsewhere a line for each change. Slurm is asked seldom while nothing happens."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.cluster import slurm_jobs
from pipeline.live import screen
from pipeline.live.view import RoundView
from pipeline.reporting.status import step_in_words

REFRESH_SECONDS = 0.5
Below = Callable[[RoundView], list[str]]


def _nothing(view: RoundView) -> list[str]:
    """No lines below the table."""
    return []


@contextmanager
def follow(look: Callable[[], RoundView], below: Below = _nothing) -> Iterator[Callable[[], RoundView]]:
    """Yield a function that updates what is shown and returns the newest view.

    Call it often: it calls `look` at most every half second, and once more when the block ends. On a terminal the last view stays.
    below: the lines under the table, which elsewhere are printed when they change.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        from rich.live import Live

        is_plain = not (console.encoding or "").lower().startswith("utf")
        newest = look()

        def drawn() -> Any:
            return screen.draw(newest, below(newest), console.width, console.height, is_plain=is_plain)

        live = Live(drawn(), console=console, auto_refresh=False)

        def update() -> RoundView:
            nonlocal newest
            newest = look()
            live.update(drawn(), refresh=True)
            return newest

        with _cursor_back(console):
            try:  # around the start too, which hides the cursor, because Ctrl-C may come at any time
                live.start(refresh=True)
                yield _seldom(update)
            finally:
                try:
                    update()
                finally:
                    live.stop()
        return
    changes = Changes()

    def print_changes() -> RoundView:
        view = look()
        for line in changes.since(view, below(view)):
            print(line, flush=True)
        return view

    try:
        yield _seldom(print_changes)
    finally:
        print_changes()


@contextmanager
def _cursor_back(console: Any) -> Iterator[None]:
    """Show the cursor again where SIGTERM ends this process, which `pause` sends to a `round`. console: rich's."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        with suppress(OSError):  # what forces colours may show the view in something else than a terminal
            os.write(console.file.fileno(), b"\x1b[?25h\n")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Changes:
    """What has changed from one view to the next, as lines for a file."""

    def __init__(self) -> None:
        self._printed: dict[tuple[str, str], tuple[str, str]] = {}
        self._told: list[str] = []

    def since(self, view: RoundView, below: list[str]) -> list[str]:
        """A line for each arm whose state or phase changed, for each complaint of Slurm, and for each new line of `below`."""
        lines = []
        for arm in (*view.beside, *view.arms):
            row = arm.row
            now = (row.state, row.phase)
            if row.state != "waiting" and self._printed.get((row.round, row.arm)) != now:
                self._printed[row.round, row.arm] = now
                resumes = f"(goes on from {arm.goes_on_from})" if arm.goes_on_from else ""
                words = (
                    f"{row.round}/{row.arm} {row.role:<9} {row.state:<11} {row.phase}",
                    step_in_words(row),
                    row.detail,
                    resumes,
                )
                lines.append(" ".join(filter(None, words)).rstrip())
        lines += [line for line in below if line not in self._told]
        self._told = below
        return lines


class Asker:
    """Asks Slurm again soon after something changed, and else waits twice as long each time.

    query: what Slurm says of the round's jobs, as `control.ask_slurm`. shortest, longest: limits of the waiting time, in seconds.
    """

    def __init__(self, query: Callable[[], slurm_jobs.Report], shortest: float = 2.0, longest: float = 60.0) -> None:
        self._query, self._shortest, self._longest = query, shortest, longest
        self._wait, self._at = 0.0, 0.0
        self._said: slurm_jobs.Report | None = None
        self._ids: Mapping[str, str] = {}

    def said(self, ids: Mapping[str, str]) -> slurm_jobs.Report:
        """What Slurm says, which may be up to `longest` seconds old. ids: of the jobs now; one that is new is asked for at once."""
        if self._said is None or ids != self._ids or time.monotonic() - self._at >= self._wait:
            before, self._said = self._said, self._query()
            self._ids, self._at = ids, time.monotonic()
            is_new = before is None or before.jobs != self._said.jobs
            self._wait = self._shortest if is_new else min(self._longest, 2 * self._wait)
        return self._said


def _seldom(show: Callable[[], RoundView]) -> Callable[[], RoundView]:
    """A function that calls `show` at most once in REFRESH_SECONDS and returns its newest value."""
    newest: list[tuple[float, RoundView]] = []

    def maybe() -> RoundView:
        if not newest or time.monotonic() - newest[0][0] >= REFRESH_SECONDS:
            found = show()
            newest[:] = [(time.monotonic(), found)]
        return newest[0][1]

    return maybe
