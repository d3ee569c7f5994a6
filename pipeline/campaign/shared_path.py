"""Paths on a network file system: what fails for a moment is tried again, and what another machine wrote is waited for, both within bounds.

A machine sees a shared folder through caches. A handle goes stale when another machine replaces the file (ESTALE), a server that restarts
answers with an error for a moment (EIO and others), and a file that exists may stay unseen until the cache of its folder has expired. Every
path of a campaign is a SharedPath (layout.py), so whoever reads one through its methods need not know that. Only what may be repeated goes
through here: reading, and writing a whole file anew. Appending does not. Some file systems have no locks either.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import IO, Any, TypeVar

from pipeline.campaign.errors import ConfigError, FilesUnreachable

T = TypeVar("T")
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between tries: seven tries, three seconds in all. A client looks a stale handle up anew at the next try."""
POLL_SECONDS = 0.5
CLAIM_SECONDS = 30.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
SERVER = "Check with `ls` that {host} reads that folder; if it does not, have it mounted anew, or use another machine. Then run the command again"
TRANSIENT = {
    errno.ESTALE: SERVER,
    errno.EIO: f"The disk or the file server fails; `dmesg` may say which. {SERVER}",
    errno.ETIMEDOUT: SERVER,
    errno.EREMOTEIO: SERVER,
    errno.ENOTCONN: SERVER,  # a FUSE daemon that is gone
    errno.ESHUTDOWN: SERVER,  # a client that Lustre evicted
}
"""Errors of a file system that may be gone a moment later -> the cure if they are not. A local disk gives only EIO, and the same again."""


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file to read it. Raises OSError at once for anything else: who opens a fifo would wait for its writer."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "this is no regular file", os.fspath(path))
    return file


def patiently(path: str | os.PathLike[str], act: Callable[[], T]) -> T:
    """Call `act`, which reads `path`, until it raises none of TRANSIENT. It must be something that can be repeated as a whole.

    Raises FilesUnreachable, which names the path and a cure, if the last try fails too. Other errors pass at once.
    """
    waits = iter(WAITS)
    while True:
        try:
            return act()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            seconds = next(waits, None)
            if seconds is None:
                raise FilesUnreachable(
                    f"{os.fspath(path)} cannot be read on {platform.node()}: {error.strerror}, in {len(WAITS) + 1} tries",
                    TRANSIENT[error.errno].format(host=platform.node()),
                ) from error
        time.sleep(seconds)
        look_anew(Path(path).parent)


def look_anew(folder: Path) -> None:
    """List a folder, so that this machine asks the file server for it instead of its cache. A folder that cannot be listed is left."""
    with suppress(OSError):
        os.listdir(folder)


def wait_until(is_seen: Callable[[], bool], seconds: float, folders: Iterable[Path] = ()) -> bool:
    """Ask until the answer is yes, for `seconds` at most, and list `folders` anew before each question. Returns the last answer.

    The first question comes at once, so with 0 seconds it is the only one.
    """
    deadline, places = time.monotonic() + seconds, list(folders)
    while True:
        for folder in places:
            look_anew(folder)
        if is_seen():
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def take_lock(file: IO[Any], operation: int) -> None:
    """Call flock on an open file. Raises BlockingIOError where somebody holds it, and ConfigError where the file system has no locks."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise ConfigError(
            f"the file system of {file.name} has no file locks ({error.strerror}), so two machines could act on the campaign at once",
            "Have it mounted with locks (Lustre: `-o flock`; NFS: without `nolock`), or keep campaigns on another file system",
        ) from error


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold `path`, a file made by an exclusive create, while a short block runs: on one machine at a time even without file locks.

    A claim that stays for CLAIM_SECONDS is that of a process that was killed, and is taken over.
    """
    claimed, since = None, time.monotonic()
    while True:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            break
        except FileExistsError:
            now = _identity(path)
            if now != claimed:
                claimed, since = now, time.monotonic()
            elif time.monotonic() - since > CLAIM_SECONDS:
                path.unlink(missing_ok=True)
            time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


class SharedPath(PosixPath):
    """A path whose reading methods are patient. Whatever is joined to it, or found in it, is one too.

    `exists`, `is_file` and `is_dir` say no only where there is nothing of that kind. pathlib's say no for some errors too (which ones
    depends on Python's version), and then a file that cannot be read would pass for one that was never written.
    """

    __slots__ = ()

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return patiently(self, lambda: os.stat(self, follow_symlinks=follow_symlinks))

    def lstat(self) -> os.stat_result:
        return self.stat(follow_symlinks=False)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        try:
            self.stat(follow_symlinks=follow_symlinks)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self.exists(follow_symlinks=follow_symlinks) and super().is_file()

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.exists(follow_symlinks=follow_symlinks) and super().is_dir()

    def read_bytes(self) -> bytes:
        return patiently(self, super().read_bytes)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return patiently(self, lambda: PosixPath.read_text(self, encoding, errors))

    def link_target(self) -> str:
        """The target of a link as it is written; `readlink` would normalize it."""
        return patiently(self, lambda: os.readlink(self))

    def iterdir(self) -> Generator[SharedPath, None, None]:
        yield from (self / name for name in patiently(self, lambda: os.listdir(self)))

    def glob(self, pattern: str) -> Generator[SharedPath, None, None]:
        yield from patiently(self, lambda: self._found(super(SharedPath, self).glob(pattern)))

    def rglob(self, pattern: str) -> Generator[SharedPath, None, None]:
        yield from patiently(self, lambda: self._found(super(SharedPath, self).rglob(pattern)))

    def _found(self, paths: Iterable[SharedPath]) -> list[SharedPath]:
        """All of `paths`. This folder is listed first, because pathlib takes one that cannot be listed for an empty one since Python 3.13."""
        with suppress(FileNotFoundError, NotADirectoryError):
            os.listdir(self)
        return list(paths)
