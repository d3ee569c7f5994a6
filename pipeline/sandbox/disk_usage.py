"""Bound the total that a sandbox writes. Per-file limits do not bound the total and quotas need root, so we poll the disk usage with `du`.

`du` walks trees that are deeper than any path may be long, and counts a hard link once. It misses what is written between two polls, and the
space of a file without a name that a process keeps open.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PAUSE_SECONDS = 1.0  # between two counts, or twenty times as long as the last count took
COUNTS = {"bytes": ("--block-size=1",), "files": ("--inodes",)}


class DiskUsage:
    """Counts the bytes and files that are added to `folders`, and the bytes of the log, since the start.

    Without `size_bytes`, half of the space that is free at the start is allowed.
    """

    def __init__(
        self, folders: Sequence[Path], log: Path, size_bytes: int | None, num_files: int, log_bytes: int
    ) -> None:
        self._folders, self._log = [str(folder) for folder in folders], log
        free = min((_free_bytes(folder) for folder in folders), default=0)
        self._limits = {"bytes": free // 2 if size_bytes is None else size_bytes, "files": num_files}
        self._log_limit = log_bytes + (log.stat().st_size if log.exists() else 0)
        self._before: dict[str, int] = {}
        self._counts = itertools.cycle(COUNTS)
        self._next = self._began = 0.0
        self._count = ""
        self._du: subprocess.Popen[bytes] | None = None

    def excess(self) -> str:
        """What exceeds its limit, in a few words; an empty string while nothing does. Call it often: it never waits."""
        if self._log.stat().st_size > self._log_limit:
            return f"the log has more than the {self._log_limit} bytes that are allowed"
        if self._du is None:
            if self._folders and time.monotonic() >= self._next:
                self._start_count()
            return ""
        if self._du.poll() is None:
            return ""
        assert self._du.stdout is not None
        with self._du.stdout as answer:
            lines = answer.read().split(b"\n")
        self._du = None
        now = time.monotonic()
        # The first count of files follows the first count of bytes at once; what is written until then is not counted.
        self._next = now + max(PAUSE_SECONDS, 20 * (now - self._began)) if len(self._before) == len(COUNTS) else now
        if len(lines) < 2:  # du was killed; the next count replaces this one
            return ""
        total = int(lines[-2].split()[0])  # the total is the last line, even if files vanished during the count
        added = total - self._before.setdefault(self._count, total)
        limit = self._limits[self._count]
        return f"{added} {self._count} were written, and {limit} are allowed" if added > limit else ""

    def close(self) -> None:
        """Stop counting."""
        if self._du is not None:
            self._du.kill()
            self._du.communicate()
            self._du = None

    def _start_count(self) -> None:
        """Start `du` for the next of bytes and files, which take turns."""
        self._count, self._began = next(self._counts), time.monotonic()
        command = ["du", "-sc", *COUNTS[self._count], "--", *self._folders]
        quiet = subprocess.DEVNULL
        self._du = subprocess.Popen(
            command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, env={"PATH": os.defpath}
        )


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
