"""The files of a fork: which an agent may change, and how they are opened without trusting the fork.

Commands of an agent ran in a fork, so anything may lie in it. Each part of a path is opened by itself, no link is followed, no fifo,
device or socket is opened, and every size is bounded before anything is read. Both sides use this module: the worker (fork_diff.py), and
the file tools in the trial's sandbox (tool_script.py), where it is bound as a file. It therefore imports only the standard library.
"""

import fnmatch
import hashlib
import io
import os
import re
import stat
from collections.abc import Sequence
from itertools import islice

ARTICLE = "16"
ROOT = "/substrate"
MAX_PATH_BYTES = 1024
MAX_DEPTH = 32
PLAIN = "[A-Za-z0-9_./-]{1,100}"
KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}  # fmt: skip


class Failure(Exception):
    """A tool that did not do what was asked. `code` is stable; `what` is a sentence with the cure."""

    def __init__(self, code: str, what: str) -> None:
        self.code, self.what = code, what
        super().__init__(what)


def is_open(path: str, open_paths: Sequence[str], *, is_folder: bool = False) -> bool:
    """Whether article 16 lets an agent change `path`, which is relative to the fork.

    In a glob of open_paths `**` is any number of parts (at the end at least one), and `*`, `?` and `[...]` stay within a part. A folder is
    open if something below it may be.
    """
    return any(_fits(path.split("/"), each.split("/"), is_folder) for each in open_paths)


def _fits(parts: list[str], globs: list[str], begins: bool) -> bool:
    """Whether the globs match the parts; with `begins`, whether they match something that begins with the parts."""
    if not globs:
        return not parts
    if globs[0] == "**":
        if begins or len(globs) == 1:
            return begins or bool(parts)
        return any(_fits(parts[start:], globs[1:], begins) for start in range(len(parts) + 1))
    if not parts:
        return begins
    return fnmatch.fnmatchcase(parts[0], globs[0]) and _fits(parts[1:], globs[1:], begins)


def closed(path: str, open_paths: Sequence[str]) -> str:
    """The sentence about a path that an agent may not change."""
    return f"article {ARTICLE} closes {shown(path)} to agents; change only {', '.join(open_paths) or 'nothing'}"


def shown(name: str) -> str:
    """A path as text on one line: quoted where it holds what is not printable."""
    return name if name.isprintable() and name else ascii(name)


def plain(name: str) -> str:
    """A path as records and pages have it: itself if it is PLAIN, else a digest, because a name may be any sentence."""
    if re.fullmatch(PLAIN, name):
        return name
    return f"sha256-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def parts_of(path: str) -> list[str]:
    """The parts of a path that is relative to the fork. Raises Failure for one that leads out of it."""
    try:
        too_long = len(os.fsencode(path)) > MAX_PATH_BYTES
    except UnicodeEncodeError:
        too_long = True
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if too_long or "\0" in path or len(parts) > MAX_DEPTH:
        raise Failure("bad_arguments", f"a path has at most {MAX_PATH_BYTES} bytes, {MAX_DEPTH} parts and no zero byte")
    if path.startswith("/") or ".." in parts:
        what = f"{shown(path)} leads out of the fork, which article {ARTICLE} closes to agents"
        raise Failure("closed_path", f"{what}; give a path relative to {ROOT}, such as substrate/train.py")
    return parts


def status(folder: int, part: str, path: str) -> os.stat_result:
    """What is at `part` of an open folder. path: for the message. Raises Failure (no_such_file, and closed_path for a link)."""
    try:
        found = os.stat(part, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        what = f"there is no {shown(path)} in the fork ({error.strerror})"
        raise Failure("no_such_file", f"{what}; list the folder above it") from None
    if stat.S_ISLNK(found.st_mode):
        what = f"{shown(path)} is a link, and article {ARTICLE} lets no tool follow one"
        raise Failure("closed_path", f"{what}; use the path of the file itself")
    return found


def enter(root: int, parts: Sequence[str], *, make: Sequence[str] | None = None) -> int:
    """Open the folder at `parts`, part by part, without following a link.

    make: open paths, on which folders that are missing are made. Raises Failure.
    """
    here = os.dup(root)
    for number, part in enumerate(parts):
        path = "/".join(parts[: number + 1])
        try:
            if make is not None and is_open(path, make, is_folder=True):
                try:
                    os.mkdir(part, 0o755, dir_fd=here)
                except FileExistsError:
                    pass
            if not stat.S_ISDIR(status(here, part, path).st_mode):
                raise Failure("no_such_file", f"{shown(path)} is not a folder; list the folder above it")
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
        except OSError as error:
            raise Failure("no_such_file", f"{shown(path)} cannot be entered ({error.strerror})") from None
        finally:
            os.close(here)
        here = below
    return here


def opened(root: int, path: str) -> io.BufferedReader:
    """Open the regular file at `path` for reading. Raises Failure."""
    parts = parts_of(path)
    if not parts:
        raise Failure("no_such_file", f"{shown(path)} is the fork's folder; use list")
    folder = enter(root, parts[:-1])
    try:
        found = status(folder, parts[-1], path)
        if not stat.S_ISREG(found.st_mode):
            raise Failure("not_text", f"{shown(path)} is a {kind_of(found)}; only files are read, and list shows them")
        # Nothing runs beside a tool. Should something replace the file now, O_NONBLOCK waits for no fifo, and it is looked at again.
        handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise Failure("no_such_file", f"{shown(path)} cannot be opened ({error.strerror})") from None
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Failure("not_text", f"{shown(path)} is no file any more; list its folder")
    return open(handle, "rb")


def content(root: int, path: str, most: int) -> bytes:
    """The bytes of the regular file at `path`. Raises Failure, also for one that is larger than `most` bytes."""
    with opened(root, path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if max(size, len(data)) > most:
        raise Failure("too_large", f"{shown(path)} has {size} bytes; at most {most} are read")
    return data


def kind_of(found: os.stat_result) -> str:
    """file, folder, link, fifo, socket or device."""
    return KINDS.get(stat.S_IFMT(found.st_mode), "device")


def text_of(path: str, data: bytes, size: int) -> str:
    """The text in some bytes of a file. size: of the whole file, for the message. Raises Failure (not_text)."""
    try:
        if b"\0" not in data:
            return data.decode()
    except UnicodeDecodeError:
        pass
    raise Failure("not_text", f"{shown(path)} is binary ({size} bytes); only UTF-8 text is read and changed")


def entries(folder: int, most: int) -> tuple[list[tuple[str, os.stat_result]], bool]:
    """The first `most` entries that the folder gives, in byte order, and whether there are more."""
    with os.scandir(folder) as scan:
        names = [entry.name for entry in islice(scan, most + 1)]
    found = []
    for name in sorted(names[:most], key=os.fsencode):
        try:
            found.append((name, os.stat(name, dir_fd=folder, follow_symlinks=False)))
        except OSError:  # it went away meanwhile
            continue
    return found, len(names) > most
