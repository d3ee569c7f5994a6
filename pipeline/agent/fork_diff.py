"""What an agent changed in its fork: compared from outside with the pristine image, and believed because the worker compares.

Nothing of the agent may run while this reads. Every path of both trees is looked at without following a link: content, kind and
permissions count, times and owners do not. Files of equal size are read whole on both sides, which takes a fraction of a second, because
large weights lie outside the image; no attribute of an overlay is believed.

`closed` lists what article 16 refuses before a training: a change outside of the open paths, and anywhere a thing that Python could run in
place of reviewed text (bytecode, extension modules, links), or that is no file at all.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.agent import fork_files
from pipeline.agent.fork_files import ARTICLE, Failure, enter, entries, is_open, plain, shown
from pipeline.agent.text_diff import codes_of, unified, why_unreadable
from pipeline.campaign.errors import TrialFailed

MAX_ENTRIES = 50_000
MAX_CHANGES = 200
MAX_BYTES = 256 * 2**20  # of all changed files together
MAX_TEXT_BYTES = 64 * 2**20  # of a file whose lines are compared
MAX_LINES, MAX_LINES_IN_ALL = 2000, 10_000
"""On both sides of such a file, and of all; what is longer counts as replaced as one. difflib then takes a second or two of whatever is written."""
MAX_DIFF_BYTES = 2**20
CHUNK = 2**20
# Python finds these before or in place of a .py file, or runs them at its start (site).
RUNNABLE = (".pyc", ".pyo", ".so", ".pyd", ".pth", ".egg", ".zip", ".egg-link")


@dataclass(frozen=True)
class Change:
    """One path that differs.

    kind: added, changed or removed. what: file, folder, link, fifo, socket or device, as it is in the fork (or was, if removed). sha256: of
    the file's new bytes (the old ones, if removed) or of a link's target; "" for what has no content. is_text: whether its lines were
    compared; they are counted in text alone. fault: why nobody can review it, as a phrase.
    """

    path: str
    kind: str
    what: str
    sha256: str
    size: int
    mode: int
    is_text: bool = True
    added_lines: int = 0
    removed_lines: int = 0
    fault: str = ""

    def record(self) -> dict[str, Any]:
        """As the report has it."""
        lines = {"added_lines": self.added_lines, "removed_lines": self.removed_lines}
        return {"path": plain(self.path), "kind": self.kind, "sha256": self.sha256, **lines}


@dataclass(frozen=True)
class ForkDiff:
    """All changes, in the byte order of their paths. text: a unified diff that `git apply` takes, of at most MAX_DIFF_BYTES."""

    changes: tuple[Change, ...]
    text: str

    @property
    def digest(self) -> str:
        """The sha256 over path, kind, content and permissions of every change; that of two equal forks is equal."""
        digest = hashlib.sha256()
        for each in self.changes:
            fields = (each.path, each.kind, each.what, f"{each.mode:o}", each.sha256)
            digest.update(b"".join(os.fsencode(field) + b"\0" for field in fields))
        return digest.hexdigest()

    def records(self) -> list[dict[str, Any]]:
        """The changes as the report has them: at most as many as a person reviews, because a refused fork may hold many thousands."""
        return [each.record() for each in self.changes[:MAX_CHANGES]]


@dataclass(frozen=True)
class _Node:
    """A path of one tree. `mode` is what stat gives, `target` that of a link."""

    mode: int
    size: int
    target: str = ""

    @property
    def what(self) -> str:
        return fork_files.KINDS.get(stat.S_IFMT(self.mode), "device")


@dataclass(frozen=True)
class _Content:
    """sha256 and lines of one side; None in place of lines for what is binary or too large."""

    sha256: str
    lines: list[str] | None


def difference(pristine: Path, fork: Path) -> ForkDiff:
    """Compare `fork` with the mounted image at `pristine`.

    Raises TrialFailed (bad_output) for a fork that nobody can review: more than MAX_ENTRIES entries, folders nested deeper than
    MAX_DEPTH, changed files of more than MAX_BYTES, or a file that cannot be read.
    """
    roots = [os.open(each, os.O_RDONLY | os.O_DIRECTORY) for each in (pristine, fork)]
    try:
        return _compare(*roots)
    except (Failure, OSError) as error:
        said = error.what if isinstance(error, Failure) else str(error)
        raise TrialFailed("bad_output", f"the fork cannot be compared with the image: {said}") from error
    finally:
        for each in roots:
            os.close(each)


def closed(diff: ForkDiff, open_paths: Sequence[str]) -> list[tuple[str, str]]:
    """(path, why) of each change that article 16 refuses, with `why` as a phrase."""
    found = []
    if len(diff.changes) > MAX_CHANGES:
        found.append(
            (
                diff.changes[MAX_CHANGES].path,
                f"is one of {len(diff.changes)} changes, and a person reviews at most {MAX_CHANGES}",
            )
        )
    for each in diff.changes:
        is_folder = each.what == "folder"
        if each.what not in ("file", "folder"):
            found.append((each.path, f"is a {each.what}"))
        elif not is_open(each.path, open_paths, is_folder=is_folder):
            found.append((each.path, "is outside of the open paths"))
        elif each.mode & 0o7000:
            found.append((each.path, "has special permissions"))
        elif each.kind != "removed" and (each.path.endswith(RUNNABLE) or "__pycache__" in each.path.split("/")):
            found.append((each.path, "could run in place of the text that is reviewed"))
        elif each.fault:
            found.append((each.path, each.fault))
        elif plain(each.path) != each.path:
            found.append((each.path, f"has a name that is not {fork_files.PLAIN}"))
    return found


def apply(diff: ForkDiff, source: Path, target: Path, owner: int) -> None:
    """Make the changes of a diff that `closed` allows in another fork of the same image, in which nothing has run yet.

    source: the fork that was compared. owner: of what is made. Raises TrialFailed (bad_output) where a file cannot be read any more.
    """
    root = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for each in diff.changes:  # a folder comes before what is in it
            place = target / each.path
            if each.kind == "removed":
                continue
            if each.what == "folder":
                place.mkdir(exist_ok=True)
            else:
                place.write_bytes(fork_files.content(root, each.path, MAX_BYTES))
            place.chmod(each.mode)
            os.chown(place, owner, owner)
        for each in reversed(diff.changes):
            if each.kind == "removed":
                (target / each.path).rmdir() if each.what == "folder" else (target / each.path).unlink()
    except (Failure, OSError) as error:
        raise TrialFailed("bad_output", f"the fork's changes cannot be made again: {error}") from error
    finally:
        os.close(root)


def refusal(found: Sequence[tuple[str, str]], open_paths: Sequence[str]) -> str:
    """The sentence about what `closed` found, with the article and the cure."""
    named = ", ".join(f"{shown(path)} ({why})" for path, why in found[:5]) + (", ..." if len(found) > 5 else "")
    return (
        f"article {ARTICLE}: the fork differs from the image where it must not: {named}; undo these changes, and change only "
        f"{', '.join(open_paths) or 'nothing'}"
    )


def _compare(pristine: int, fork: int) -> ForkDiff:
    before, after = _scan(pristine), _scan(fork)
    changes: list[Change] = []
    pieces: list[str] = []  # of code, which must not be pushed out by data that sorts before it
    of_data: list[str] = []
    bytes_left, lines_left, room = MAX_BYTES, MAX_LINES_IN_ALL, MAX_DIFF_BYTES
    for path in sorted(before.keys() | after.keys(), key=os.fsencode):
        old, new = before.get(path), after.get(path)
        if old and new and _same(pristine, fork, path, old, new):
            continue
        bytes_left -= sum(each.size for each in (old, new) if each and each.what == "file")
        if bytes_left < 0:
            raise Failure("too_large", f"{shown(path)} brings the changed files above {MAX_BYTES} bytes; remove it")
        one, other = _content(pristine, path, old), _content(fork, path, new)
        kind, node, content = ("changed" if old else "added", new, other) if new else ("removed", old, one)
        assert node is not None
        piece, added, removed = f"# {plain(path)}: {kind} {node.what}, sha256 {content.sha256 or '-'}\n", 0, 0
        is_text = node.what == "file" and one.lines is not None and other.lines is not None
        if one.lines is not None and other.lines is not None:
            num_lines = len(one.lines) + len(other.lines)
            codes = codes_of(one.lines, other.lines, is_whole=num_lines > min(MAX_LINES, lines_left))
            lines_left -= min(num_lines, lines_left)
            added = sum(end - start for tag, _, _, start, end in codes if tag != "equal")
            removed = sum(end - start for tag, start, end, _, _ in codes if tag != "equal")
            if is_text:
                modes = [each.mode if each and each.what == "file" else None for each in (old, new)]
                piece = unified(path, modes[0], modes[1], one.lines, other.lines, codes)
        fault = why_unreadable(path, other.lines) if new and node.what == "file" else ""
        if path.endswith(".py"):
            size = len(piece.encode(errors="replace"))
            if size > room:
                fault = fault or f"does not fit into a patch of {MAX_DIFF_BYTES} bytes, so nobody can review it"
            pieces += [piece] if size <= room else []
            room -= size if size <= room else 0
        else:
            of_data.append(piece)
        mode = stat.S_IMODE(node.mode)
        changes.append(Change(path, kind, node.what, content.sha256, node.size, mode, is_text, added, removed, fault))
    for piece in of_data:
        size = len(piece.encode(errors="replace"))
        pieces += [piece] if size <= room else []
        room -= size if size <= room else 0
    if unshown := len(changes) - len(pieces):
        pieces.append(f"# {unshown} changes are not shown, because a diff has at most {MAX_DIFF_BYTES} bytes\n")
    return ForkDiff(tuple(changes), "".join(pieces))


def _scan(root: int) -> dict[str, _Node]:
    """Every path below an open folder."""
    found: dict[str, _Node] = {}
    waiting: list[list[str]] = [[]]
    while waiting:
        parts = waiting.pop()
        folder = enter(root, parts)
        try:
            below, more = entries(folder, MAX_ENTRIES - len(found))
            if more:
                raise Failure("too_large", f"it holds more than {MAX_ENTRIES} entries; remove what you made")
            for name, status in below:
                is_link = stat.S_ISLNK(status.st_mode)
                target = os.readlink(name, dir_fd=folder) if is_link else ""
                found["/".join([*parts, name])] = _Node(status.st_mode, status.st_size, target)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append([*parts, name])
        finally:
            os.close(folder)
        if waiting and len(waiting[-1]) > fork_files.MAX_DEPTH:
            raise Failure("too_large", f"folders are nested deeper than {fork_files.MAX_DEPTH}; remove them")
    return found


def _same(pristine: int, fork: int, path: str, old: _Node, new: _Node) -> bool:
    if old.what != new.what:
        return False
    if old.what == "link":  # it has no permissions
        return old.target == new.target
    if old.mode != new.mode or old.what != "file":
        return old.mode == new.mode
    if old.size != new.size:
        return False
    with fork_files.opened(pristine, path) as one, fork_files.opened(fork, path) as other:
        while (first := one.read(CHUNK)) == (second := other.read(CHUNK)):
            if not second:
                return True
        return first == second


def _content(root: int, path: str, node: _Node | None) -> _Content:
    """What is compared of one side. An absent path has no lines, as git counts it."""
    if node is None:
        return _Content("", [])
    if node.what == "link":
        return _Content(hashlib.sha256(os.fsencode(node.target)).hexdigest(), [])
    if node.what != "file":
        return _Content("", [])
    if node.size > MAX_TEXT_BYTES:
        with fork_files.opened(root, path) as file:
            return _Content(hashlib.file_digest(file, "sha256").hexdigest(), None)
    data = fork_files.content(root, path, MAX_TEXT_BYTES)
    try:
        lines = None if b"\0" in data else io.StringIO(data.decode(), newline="\n").readlines()
    except UnicodeDecodeError:
        lines = None
    return _Content(hashlib.sha256(data).hexdigest(), lines)
