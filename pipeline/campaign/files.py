"""Read and write a campaign's files: atomic writes, lock files, digests, strict JSON, and readable permission errors.

Every reader is patient (shared_path.py). A file is written aside, flushed to disk and renamed, a folder likewise, so that nobody reads half of one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import pwd
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.campaign.shared_path import SharedPath, open_regular, patiently, take_lock

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def tree_digest(root: Path) -> str:
    """Return the sha256 over the sorted paths, modes and contents below `root`. Raises ConfigError for a device, fifo or socket."""
    digest = hashlib.sha256()
    # Sorted by bytes: a locale would sort differently from node to node.
    for name in sorted(walk(root), key=os.fsencode):
        path = SharedPath(root, name)
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            kind, content = "120000", path.link_target()
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

    def names() -> list[tuple[str, bool]]:
        with os.scandir(root / below) as entries:
            return [(below + entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]

    for name, is_folder in patiently(root / below, names):
        yield name
        if is_folder:
            yield from walk(root, f"{name}/")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(path, digest)


def write_file(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """Write a file atomically and durably: to a temporary file beside it, fsync, os.replace, fsync of the folder.

    Raises WorkFailed when the disk is full or the folder cannot be written; an earlier file then stays as it was.
    """
    try:
        _write(path, data, mode, os.replace)
    except OSError as error:
        raise _unwritten(path, error) from error


def write_new_file(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """As `write_file`, but raise FileExistsError where the file exists: of two writers at once exactly one succeeds."""
    try:
        _write(path, data, mode, _place_new)
    except FileExistsError:
        raise
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> WorkFailed:
    return WorkFailed(
        f"cannot write {path}: {error.strerror}", "Free space or rights there, then run the command again"
    )


def _place_new(aside: str, path: Path) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        if os.stat(aside).st_nlink < 2:  # it is 2 where the file server made our link and its answer was lost
            raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(path, "xb"):
            os.replace(aside, path)
        return
    os.unlink(aside)


def _write(path: Path, data: bytes | str, mode: int, place: Callable[[str, Path], None]) -> None:
    payload = data.encode() if isinstance(data, str) else data

    def write() -> None:
        aside = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, mode)
            place(aside, path)
            aside = None
            flush_folder(path.parent)
        finally:
            if aside is not None:
                Path(aside).unlink(missing_ok=True)

    # Repeated as a whole: after an error, fsync of the same file would report success for pages that the kernel has dropped.
    patiently(path, write)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, so that a rename in it outlasts a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_tree(source: Path, target: Path, but: str = "") -> None:
    """Copy the files, folders and links below `source` to `target`, which is absent or an empty folder until the copy is complete.

    but: names that begin with this are left out. Raises OSError, and FilesUnreachable, as reading and writing do.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name in walk(source):
            if but and any(part.startswith(but) for part in Path(name).parts):
                continue
            path = SharedPath(source, name)
            if path.is_symlink():
                os.symlink(path.link_target(), aside / name)
            elif path.is_dir():
                (aside / name).mkdir()
            else:
                copy_file(path, aside / name)
        aside.chmod(0o755)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content to `target`, from the beginning again where the file system fails for a moment."""
    patiently(source, lambda: shutil.copyfile(source, target))


def append_new(source: Path, target: Path) -> None:
    """Append to `target` what `source`, which only grows, has got since the last call. A kill leaves the beginning of it."""

    def append() -> None:
        with open(source, "rb") as new, open(target, "ab") as kept:
            new.seek(kept.tell())
            shutil.copyfileobj(new, kept)

    target.parent.mkdir(parents=True, exist_ok=True)
    patiently(target, append)


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    what: what the lock allows only once at a time, for the message. Raises ConfigError, which names the process and the person who
    hold it: several people may share a campaign.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with patiently(path, lambda: open(path, "a+")) as file:
        try:
            take_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def read_bytes(path: Path) -> bytes:
    """Read a whole regular file. Raises OSError, and FilesUnreachable where the file system fails for longer than a moment."""

    def read() -> bytes:
        with open_regular(path) as file:
            return file.read()

    return patiently(path, read)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises NotFound where it is absent, IntegrityError where it is not one strict JSON value."""
    try:
        return strict_json.read(read_bytes(path))
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except strict_json.BadJson as error:
        raise IntegrityError(f"{path} is not valid JSON ({error})") from error


def read_json_lines(path: Path) -> list[Any]:
    """Read the JSON value of every complete line; [] without a file. A last line without a newline is still being written.

    Raises IntegrityError for a complete line that is not strict JSON.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return []
    try:
        return [strict_json.read(line) for line in content.split(b"\n")[:-1]]
    except strict_json.BadJson as error:
        raise IntegrityError(f"{path} has a line that is not JSON ({error})") from error


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines that an ended process of the image wrote. Raises IntegrityError where the file is absent or cut short."""
    try:
        return [strict_json.read(line) for line in read_bytes(path).splitlines()]
    except (OSError, strict_json.BadJson) as error:
        raise IntegrityError(f"{path.name} of a judging process cannot be read ({error})") from error
