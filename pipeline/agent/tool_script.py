"""The file tools of an agent (list, read, search, write, patch), run inside the trial's sandbox.

`tool_runner` binds this file and fork_files.py alone below /tools, starts `python -sP -m pipeline.agent.tool_script /request.json` in a
sandbox of its own with the fork at /substrate, and reads the one JSON object that it prints:

    {"ok": true, "output": "substrate/train.py, lines 1 to 2 of 90\\n...", "truncated": true}
    {"ok": false, "failure": "no_match", "what": "what came; what to do"}

The request, {"name", "arguments", "open_paths"}, is a file because an argument of a process ends at 128 KiB. The script imports nothing
from the fork and only the standard library.
"""

import io
import json
import os
import re
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from pipeline.agent.fork_files import (
    ROOT,
    Failure,
    closed,
    content,
    enter,
    entries,
    is_open,
    kind_of,
    parts_of,
    shown,
    status,
    text_of,
)

PART = ".tool-part"  # at the fork's top: what a write that was killed leaves, which tool_runner removes
MAX_OUTPUT_BYTES = 16 * 2**10
MAX_READ_BYTES = 64 * 2**20
MAX_WRITE_BYTES = 2**20
MAX_SEARCHED_BYTES = 16 * 2**20  # of a file that a search was not asked for by name
MAX_PATTERN = 1000
MAX_ENTRIES = 20_000  # of a folder that a search looks at
MAX_LISTED = 500
MAX_HITS = 200
LONGEST_LINE, LONGEST_HIT = 2000, 300  # characters shown of a line that is read, or that matches
SEARCH_SECONDS = 5.0
# For each tool its arguments: type and default; `...` marks one that must be given.
ARGUMENTS: dict[str, dict[str, tuple[type, Any]]] = {
    "list": {"path": (str, ...)},
    "read": {"path": (str, ...), "first_line": (int, 1), "num_lines": (int, 200)},
    "search": {"pattern": (str, ...), "path": (str, ".")},
    "write": {"path": (str, ...), "content": (str, ...)},
    "patch": {"path": (str, ...), "old": (str, ...), "new": (str, ...)},
}


class TooSlow(Exception):
    """The alarm rang. It is no TimeoutError, because that is an OSError, which is handled on the way."""


def shortened(text: str, most: int = MAX_OUTPUT_BYTES) -> tuple[str, bool]:
    """(text of at most `most` bytes, whether it was cut): head and tail stay, and the cut says its size."""
    data = text.encode(errors="replace")
    if len(data) <= most:
        return data.decode(), False
    half = (most - 64) // 2
    head, tail = (part.decode(errors="ignore") for part in (data[:half], data[-half:]))
    return f"{head}\n[{len(data) - 2 * half} bytes were cut here]\n{tail}", True


def checked(name: str, arguments: Any) -> dict[str, Any]:
    """The arguments with their defaults. Raises Failure (bad_arguments, unknown_tool)."""
    if name not in ARGUMENTS:
        raise Failure("unknown_tool", f"there is no file tool {name!r}; use one of {', '.join(ARGUMENTS)}")
    known = ARGUMENTS[name]
    if not isinstance(arguments, dict) or not set(arguments) <= set(known):
        raise Failure("bad_arguments", f"{name} takes an object with {', '.join(known)}, and nothing else")
    values = {key: arguments.get(key, default) for key, (_, default) in known.items()}
    for key, (kind, _) in known.items():
        if type(values[key]) is not kind:
            what = "is missing" if values[key] is ... else f"is not a {'text' if kind is str else 'whole number'}"
            raise Failure("bad_arguments", f"{key} of {name} {what}; give one")
    for key in ("first_line", "num_lines"):
        if not 1 <= values.get(key, 1) < 2**53:
            raise Failure("bad_arguments", f"{key} is {values[key]}; lines count from 1")
    return values


def list_folder(root: int, path: str) -> tuple[str, bool]:
    """The tool `list`."""
    folder = enter(root, parts_of(path))
    found, more = entries(folder, MAX_LISTED)
    os.close(folder)
    lines = [f"{kind_of(each):6} {each.st_size:>10} {shown(name)}" for name, each in found]
    return "\n".join([*lines, *([f"and more than these {MAX_LISTED}"] if more else [])]) or "the folder is empty", more


def read(root: int, path: str, first_line: int, num_lines: int) -> tuple[str, bool]:
    """The tool `read`: whole lines, as many as the output holds, below a line that says which they are."""
    data = content(root, path, MAX_READ_BYTES)
    total = data.count(b"\n") + (not data.endswith(b"\n")) if data else 0
    if first_line > max(total, 1):
        raise Failure("bad_arguments", f"{shown(path)} has {total} lines, and first_line is {first_line}")
    lines: list[str] = []
    left = MAX_OUTPUT_BYTES - 2048
    for raw in islice(io.BytesIO(data), first_line - 1, first_line - 1 + num_lines):
        line = text_of(path, raw, len(data)).removesuffix("\n")
        if len(line) > LONGEST_LINE:
            line = f"{line[:LONGEST_LINE]} [{len(line) - LONGEST_LINE} more characters]"
        left -= len(line.encode()) + 1
        if left < 0 and lines:
            break
        lines.append(line)
    last = first_line + len(lines) - 1
    more = f"; read on from line {last + 1}" if last < total else ""
    is_cut = last < min(total, first_line + num_lines - 1)
    return "\n".join([f"{shown(path)}, lines {first_line} to {last} of {total}{more}", *lines]), is_cut


def search(root: int, pattern: str, path: str) -> tuple[str, bool]:
    """The tool `search`. An alarm ends a pattern that backtracks for ever: Python's matcher lets a signal's handler run and raise."""

    def stop(*_: object) -> None:
        raise TooSlow

    hits: list[str] = []
    skipped: list[str] = []
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, SEARCH_SECONDS)
        if len(pattern) > MAX_PATTERN:
            raise Failure("bad_arguments", f"the pattern has {len(pattern)} characters; at most {MAX_PATTERN}")
        wanted = re.compile(pattern)
        found = (
            f"{place}: {line.strip()[:LONGEST_HIT]}"
            for place, line in _lines(root, path, MAX_READ_BYTES, skipped)
            if wanted.search(line)
        )
        hits += islice(found, MAX_HITS)
    except TooSlow:
        what = f"the search took longer than {SEARCH_SECONDS:g} s"
        raise Failure("bad_arguments", f"{what}; use a simpler pattern, or a narrower path") from None
    except (re.error, RecursionError, OverflowError) as error:
        raise Failure("bad_arguments", f"{pattern[:200]!r} is no regular expression of Python: {error}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    tail = [f"only the first {MAX_HITS} lines are shown"] if len(hits) == MAX_HITS else []
    tail += [f"not searched: {', '.join(skipped[:20])}"] if skipped else []
    return "\n".join([*(hits or ["no line matches"]), *tail]), len(hits) == MAX_HITS


def _lines(root: int, path: str, most: int, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """("file:number", line) of the text files at or below a path, in byte order; what cannot be searched goes to `skipped`."""
    parts = parts_of(path)
    if parts:
        folder = enter(root, parts[:-1])
        is_folder = stat.S_ISDIR(status(folder, parts[-1], path).st_mode)
        os.close(folder)
        if not is_folder:
            data = content(root, path, most)
            if b"\0" in data[:8192]:
                skipped.append(f"{shown(path)} (binary, {len(data)} bytes)")
                return
            for number, line in enumerate(io.BytesIO(data), 1):
                yield f"{shown(path)}:{number}", line.decode(errors="replace")
            return
    folder = enter(root, parts)
    found, more = entries(folder, MAX_ENTRIES)
    os.close(folder)
    for name, _ in found:
        below = "/".join([*parts, name])
        try:
            yield from _lines(root, below, MAX_SEARCHED_BYTES, skipped)
        except Failure as failure:
            skipped.append(failure.what)
    skipped += [f"more than {MAX_ENTRIES} entries of {shown(path)}"] if more else []


def write(root: int, path: str, text: str, open_paths: Sequence[str]) -> tuple[str, bool]:
    """The tool `write`: replace or make a file at once, so that no reader sees half of it."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise Failure("bad_arguments", "the text has a lone surrogate, which no file can hold; leave it out") from None
    if len(data) > MAX_WRITE_BYTES:
        raise Failure("too_large", f"the file would have {len(data)} bytes; at most {MAX_WRITE_BYTES} are written")
    parts = parts_of(path)
    name = "/".join(parts)
    if not is_open(name, open_paths):
        raise Failure("closed_path", closed(name or ".", open_paths))
    folder = enter(root, parts[:-1], make=open_paths)
    try:
        try:
            found = status(folder, parts[-1], path)
        except Failure as failure:
            if failure.code != "no_such_file":
                raise
            found = None
        if found and not stat.S_ISREG(found.st_mode):
            raise Failure("not_text", f"{shown(name)} is a {kind_of(found)}; write to another path")
        handle = os.open(PART, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=root)
        with open(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, stat.S_IMODE(found.st_mode) if found else 0o644)
        os.replace(PART, parts[-1], src_dir_fd=root, dst_dir_fd=folder)
    except FileExistsError:
        what = f"{PART} at the top of the fork is in the way, where a file is written before it takes its place"
        raise Failure("closed_path", f"{what}; remove it by the tool run: rm -r /substrate/{PART}") from None
    except OSError as error:
        raise Failure(
            "too_large", f"{shown(name)} cannot be written ({error.strerror}); free space in the fork"
        ) from None
    finally:
        os.close(folder)
    return f"wrote {shown(name)}: {len(data)} bytes, {len(data.splitlines())} lines", False


def patch(root: int, path: str, old: str, new: str, open_paths: Sequence[str]) -> tuple[str, bool]:
    """The tool `patch`: replace the one place where `old` occurs."""
    name = "/".join(parts_of(path))
    if not is_open(name, open_paths):
        raise Failure("closed_path", closed(name or ".", open_paths))
    if not old or old == new:
        raise Failure(
            "bad_arguments", "`old` is empty or equal to `new`; give the lines that are there, and other ones"
        )
    data = content(root, name, MAX_WRITE_BYTES)
    text = text_of(path, data, len(data))
    count = text.count(old)
    if count == 0:
        raise Failure(
            "no_match", f"`old` does not occur in {shown(name)}; read it and copy the lines with their spaces"
        )
    if count > 1:
        first = text[: text.index(old)].count("\n") + 1
        what = f"`old` occurs {count} times in {shown(name)}, first in line {first}"
        raise Failure("many_matches", f"{what}; add lines around it until it occurs once")
    return write(root, path, text.replace(old, new), open_paths)


def answer(request: dict[str, Any], root: str = ROOT) -> dict[str, Any]:
    """What the tool of a request says."""
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        name = request["name"]
        values = checked(name, request["arguments"])
        text, is_cut = {
            "list": lambda: list_folder(here, **values),
            "read": lambda: read(here, **values),
            "search": lambda: search(here, **values),
            "write": lambda: write(here, values["path"], values["content"], request["open_paths"]),
            "patch": lambda: patch(here, **values, open_paths=request["open_paths"]),
        }[name]()
        output, was_cut = shortened(text)
        return {"ok": True, "output": output, "truncated": is_cut or was_cut}
    except Failure as failure:
        return {"ok": False, "failure": failure.code, "what": failure.what}
    except MemoryError:
        return {"ok": False, "failure": "too_large", "what": "the tool ran out of memory; ask for a smaller part"}
    finally:
        os.close(here)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as asked:
        print(json.dumps(answer(json.load(asked))))
