"""What a sandbox writes in all. A limit on a file's size binds no two files, and quotas are root's: so somebody looks now and then.

`du` looks, because it walks trees that are deeper than any path, and counts a hard link once. Space of a file without a name that a
process keeps open is not seen, nor what is written between two looks.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PAUSE_SECONDS = 1.0  # between two looks, or twenty times what the last one took
COUNTS = {"bytes": ("--block-size=1",), "files": ("--inodes",)}


class Spending:
    """Looks at `folders` and at the log, which the command fills too. Limits hold for what was added since the start.

    size_bytes: None allows half of what is free at the start.
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

    def over(self) -> str:
        """Says in a few words what was too much; empty while nothing is. Call it often: it never waits."""
        if self._log.stat().st_size > self._log_limit:
            return f"a log of more than {self._log_limit} bytes"
        if self._du is None:
            if self._folders and time.monotonic() >= self._next:
                self._look()
            return ""
        if self._du.poll() is None:
            return ""
        assert self._du.stdout is not None
        with self._du.stdout as answer:
            lines = answer.read().split(b"\n")
        self._du = None
        now = time.monotonic()
        # The second count of the start comes at once; what is spent until then is not counted.
        self._next = now + max(PAUSE_SECONDS, 20 * (now - self._began)) if len(self._before) == len(COUNTS) else now
        if len(lines) < 2:  # it was killed; the next look will tell
            return ""
        total = int(lines[-2].split()[0])  # the last line, also where files went while it looked
        spent = total - self._before.setdefault(self._count, total)
        limit = self._limits[self._count]
        return f"{spent} {self._count} written, {limit} are allowed" if spent > limit else ""

    def close(self) -> None:
        """Look no more."""
        if self._du is not None:
            self._du.kill()
            self._du.communicate()
            self._du = None

    def _look(self) -> None:
        self._count, self._began = next(self._counts), time.monotonic()
        command = ["du", "-sc", *COUNTS[self._count], "--", *self._folders]
        quiet = subprocess.DEVNULL
        self._du = subprocess.Popen(
            command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, env={"PATH": os.defpath}
        )


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
