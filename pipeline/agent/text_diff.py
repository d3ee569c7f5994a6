"""The lines that differ between two texts, their unified diff in git's form, and whether a person can review a text, at a bounded cost."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Sequence
from typing import Any

from pipeline.campaign import strict_json

MAX_SOURCE_BYTES = 2**20  # of a .py file
_CODING = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")  # PEP 263, in one of the first two lines
NO_NEWLINE = "\\ No newline at end of file"
Code = tuple[str, int, int, int, int]
"""A step from old to new lines as difflib names it: (equal, replace, delete or insert; start and end of old; start and end of new)."""


def why_unreadable(path: str, lines: Sequence[str] | None) -> str:
    """Why nobody can review a file, as a phrase; empty where somebody can.

    lines: its text, None for what is binary or too large. Code has no character that a terminal does not show: a control character or a mark
    of direction would have a reader see other code than Python runs. Data are lines of JSON, so that no program passes for them.
    """
    if lines is None:
        return "is no UTF-8 text, or too large, so nobody can review it"
    if path.endswith(".py"):
        if (size := sum(len(line.encode()) for line in lines)) > MAX_SOURCE_BYTES:
            return f"has {size} bytes of code, and nobody can review more than {MAX_SOURCE_BYTES}"
        if any(found and found[1].lower() != "utf-8" for line in lines[:2] if (found := _CODING.match(line))):
            return "declares another encoding than utf-8, in which Python reads other code than a person"
        for number, line in enumerate(lines, 1):
            hidden = [
                character for character in line.rstrip("\n") if not (character.isprintable() or character == "\t")
            ]
            if hidden:
                return f"has {ascii(hidden[0])} in line {number}, which a reader does not see"
    if path.endswith(".jsonl"):
        for number, line in enumerate(lines, 1):
            try:
                is_row = isinstance(strict_json.read(line.encode()), dict)
            except strict_json.BadJson:
                is_row = False
            if not is_row:
                return f"has no JSON object in line {number}, and data are one a line"
    return ""


def codes_of(old: list[str], new: list[str], *, is_whole: bool) -> list[Code]:
    """The steps from old to new lines, as difflib names them. is_whole: what lies between the equal ends is replaced as one, because
    difflib's time grows with the cube of the lines that somebody may have written for that purpose."""
    least = min(len(old), len(new))
    start = next((n for n in range(least) if old[n] != new[n]), least)
    end = next((n for n in range(least - start) if old[-1 - n] != new[-1 - n]), least - start)
    ours, theirs = old[start : len(old) - end], new[start : len(new) - end]
    middle: list[Code] = [("replace", 0, len(ours), 0, len(theirs))] if ours or theirs else []
    if not is_whole and middle:
        middle = list(difflib.SequenceMatcher(None, ours, theirs).get_opcodes())
    shifted = [(tag, a + start, b + start, c + start, d + start) for tag, a, b, c, d in middle]
    tail = ("equal", len(old) - end, len(old), len(new) - end, len(new))
    return [("equal", 0, start, 0, start), *shifted, tail]


class _Known(difflib.SequenceMatcher[str]):
    """A matcher whose steps are known: difflib groups them with three lines of context."""

    def __init__(self, codes: list[Code]) -> None:
        super().__init__(None, [], [])
        self._codes = codes

    def get_opcodes(self) -> list[Any]:
        return [code for code in self._codes if code[1] < code[2] or code[3] < code[4]]


def unified(
    path: str, old_mode: int | None, new_mode: int | None, before: list[str], after: list[str], codes: list[Code]
) -> str:
    """The change of one text file. old_mode, new_mode: its permissions; None where it is absent."""
    ours, theirs = (_quoted(f"{side}/{path}") for side in "ab")
    modes = [None if each is None else "100755" if each & stat.S_IXUSR else "100644" for each in (old_mode, new_mode)]
    lines = [f"diff --git {ours} {theirs}\n"]
    if old_mode is None:
        lines.append(f"new file mode {modes[1]}\n")
    elif new_mode is None:
        lines.append(f"deleted file mode {modes[0]}\n")
    elif modes[0] != modes[1]:
        lines += [f"old mode {modes[0]}\n", f"new mode {modes[1]}\n"]
    hunks = list(_Known(codes).get_grouped_opcodes())
    changed = any(code[0] != "equal" for code in codes)
    if changed:
        lines += [f"--- {ours if modes[0] else '/dev/null'}\n", f"+++ {theirs if modes[1] else '/dev/null'}\n"]
    for group in hunks if changed else ():
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        lines.append(f"@@ -{i1 + (i1 < i2)},{i2 - i1} +{j1 + (j1 < j2)},{j2 - j1} @@\n")
        for tag, a, b, c, d in group:
            if tag == "equal":
                lines += [f" {line}" for line in before[a:b]]
            else:
                lines += [f"-{line}" for line in before[a:b]] + [f"+{line}" for line in after[c:d]]
    return "".join(line if line.endswith("\n") else f"{line}\n{NO_NEWLINE}\n" for line in lines)


def _quoted(path: str) -> str:
    """A path as git writes it: in quotation marks with octal escapes where it holds more than plain characters."""
    data = os.fsencode(path)
    if all(0x20 < byte < 0x7F and byte not in b'"\\' for byte in data):
        return path
    return '"' + "".join(chr(b) if 0x20 <= b < 0x7F and b not in b'"\\' else f"\\{b:03o}" for b in data) + '"'
