"""Read and write a campaign's files: atomic writes, lock files, digests, strict JSON, and readable permission errors."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import pwd
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed


def tree_digest(root: Path) -> str:
    """Return the sha256 over the sorted paths, modes and contents below `root`. Raises ConfigError for a device, fifo or socket."""
    digest = hashlib.sha256()
    # Sorted by bytes: a locale would sort differently from node to node.
    for name in sorted(walk(root), key=os.fsencode):
        path = root / name
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            kind, content = "120000", os.readlink(path)
        elif stat.S_ISDIR(mode):
            kind, content = "040755", ""
        elif stat.S_ISREG(mode):
            kind, content = "100755" if mode & stat.S_IXUSR else "100644", file_digest(path)
        else:
            raise ConfigError(
                f"{path} is a device, fifo or socket", "Remove it: a payload may hold folders, files and symlinks only"
            )
        # Neither a path nor a link target can hold a NUL, so the fields cannot run into each other.
        digest.update(b"".join(os.fsencode(field) + b"\0" for field in (name, kind, content)))
    return digest.hexdigest()


def walk(root: Path, below: str = "") -> Iterator[str]:
    """Yield every path below `root`, relative to it. Unlike os.walk and rglob, this raises OSError at a folder that it may not read."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            yield below + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from walk(root, f"{below}{entry.name}/")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """Write a file atomically and durably: to a temporary file beside it, fsync, os.replace, fsync of the folder.

    Raises WorkFailed when the disk is full or the folder cannot be written; an earlier file then stays as it was.
    """
    payload = data.encode() if isinstance(data, str) else data
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, mode)
        os.replace(aside, path)
        aside = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise WorkFailed(
            f"cannot write {path}: {error.strerror}", "Free space or rights there, then run the command again"
        ) from error
    finally:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    what: what the lock allows only once at a time, for the message. Raises ConfigError, which names the process and the person who
    hold it: several people may share a campaign.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"another {what} runs now ({file.read().strip() or 'its owner is unknown'})",
                "Wait until it has ended; `status` shows what runs",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {user_name(os.getuid())} on {platform.node()}\n")
        file.flush()
        yield


def lock_holder(path: Path) -> tuple[int, str] | None:
    """(process, host) that holds the lock file `path` now; None where nobody does, or where the file does not say who."""
    try:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                owner = re.fullmatch(r"process (\d{1,9}) of .* on (\S+)\n", file.read(4096))
    except (OSError, ValueError):
        return None
    return (int(owner[1]), owner[2]) if owner else None


def user_name(uid: int) -> str:
    """Return the name of a user, or "uid N" where the system knows none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def is_alive(pid: int) -> bool:
    """Whether process `pid` of this host runs and belongs to the pipeline; the kernel may have given its number to another program."""
    try:
        return b"pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def explain_permission_error(error: PermissionError) -> str:
    """Say which file is closed to this user and who owns it, for a campaign that several people share."""
    path = Path(error.filename or ".")
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises where a folder above is closed
        path = path.parent
    try:
        owner = user_name(path.stat().st_uid)
    except OSError:
        owner = "somebody else"
    me = user_name(os.geteuid())
    return (
        f"{error.filename} is closed to {me}; it belongs to {owner}. Only the person who made a campaign can act on it, because its "
        f"vault holds the secret seeds. Others can use `status`, `logs` and `report`, which only read"
    )


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises NotFound where it is absent, IntegrityError where it is not one strict JSON value."""
    try:
        return strict_json.read(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except strict_json.BadJson as error:
        raise IntegrityError(f"{path} is not valid JSON ({error})") from error


def read_json_lines(path: Path) -> list[Any]:
    """Read the JSON value of every complete line; [] without a file. A last line without a newline is still being written.

    Raises IntegrityError for a complete line that is not strict JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        return [strict_json.read(line) for line in content.split(b"\n")[:-1]]
    except strict_json.BadJson as error:
        raise IntegrityError(f"{path} has a line that is not JSON ({error})") from error


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines that an ended process of the image wrote. Raises IntegrityError where the file is absent or cut short."""
    try:
        return [strict_json.read(line) for line in path.read_bytes().splitlines()]
    except (OSError, strict_json.BadJson) as error:
        raise IntegrityError(f"{path.name} of a judging process cannot be read ({error})") from error
