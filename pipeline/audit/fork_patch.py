"""Read the patch of an agent's fork: which paths it changes, and how many lines of each.

`agent/fork_diff.py` writes a part for each change: git's header and hunks for a text, and for anything else a line that names it. A last line
says how many changes are not shown. Every line of a hunk begins with a mark, so that no content can pass for a header.

    diff --git a/substrate/data/rows.py b/substrate/data/rows.py
    # data/extra.bin: added file, sha256 5e884898da28...
    # 3 changes are not shown, because a diff has at most 1048576 bytes
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.campaign import canonical

_TEXT = re.compile(rb'diff --git (?:a/\S+|"a/[^"]+") (b/\S+|"b/[^"]+")')
_OTHER = re.compile(
    rb"# (.+): (?:added|changed|removed) (?:file|folder|link|fifo|socket|device), sha256 ([0-9a-f]{64}|-)"
)
_UNSHOWN = re.compile(rb"# ([0-9]{1,9}) changes are not shown, because a diff has at most [0-9]+ bytes")
_OF_HEADER = (b"new file mode ", b"deleted file mode ", b"old mode ", b"new mode ", b"--- ", b"+++ ")


@dataclass
class Part:
    """What a patch says of one path. sha256: of what is no text, "" where it has no content; of a text the lines are shown instead."""

    path: str
    is_text: bool
    sha256: str = ""
    added_lines: int = 0
    removed_lines: int = 0


@dataclass(frozen=True)
class Patch:
    """path -> its part, and the number of changes that are not shown."""

    parts: dict[str, Part]
    unshown: int


def read_patch(content: bytes) -> Patch:
    """Read a patch. Raises ValueError, whose text is a phrase, for a line that no part has, or a path that comes twice."""
    parts: dict[str, Part] = {}
    part: Part | None = None
    unshown, in_hunks = 0, False
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), 1):
        text, other = _TEXT.fullmatch(line), _OTHER.fullmatch(line)
        if text or other:
            in_hunks = False
            if text:
                part = Part(_named(_unquoted(text[1])[2:]), True)
            elif other:
                part = Part(other[1].decode("utf-8", "replace"), False, other[2].decode().strip("-"))
            assert part is not None
            if part.path in parts:
                raise ValueError(f"line {number} names a path for the second time")
            parts[part.path] = part
        elif more := _UNSHOWN.fullmatch(line):
            part, unshown = None, unshown + int(more[1])
        elif part is None or not part.is_text:
            raise ValueError(f"line {number} belongs to no change")
        elif line.startswith(b"@@ "):
            in_hunks = True
        elif in_hunks and line[:1] in (b"+", b"-", b" ", b"\\"):
            part.added_lines += line[:1] == b"+"
            part.removed_lines += line[:1] == b"-"
        elif in_hunks or not line.startswith(_OF_HEADER):
            raise ValueError(f"line {number} belongs to no change")
    return Patch(parts, unshown)


def _unquoted(path: bytes) -> bytes:
    """A path as it is, from git's form in quotation marks."""
    if not path.startswith(b'"'):
        return path
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), path[1:-1])


def _named(path: bytes) -> str:
    """A path as reports have it: by its digest where it is more than a plain name."""
    is_plain = re.fullmatch(rb"[A-Za-z0-9_./-]{1,100}", path)
    return path.decode() if is_plain else f"sha256-{canonical.sha256(path)[:16]}"
