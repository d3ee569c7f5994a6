"""The transcript of an agent: every byte that was sent to the model and came from it, and every tool that was called, one line an event.

    {"kind": "request", "call": 0, "prompt_bound": 900, "text": "{\\"messages\\":...", "seq": 0, "previous": "000...", "at_ms": 12}

A line is canonical JSON and holds the sha256 of the line before it (hash chain). Content is `text`, or `base64` where it is not UTF-8.
A request is kept as its body: its headers, in which the key is, are no part of it. The kinds, and their fields beside the content:

    request       call, prompt_bound                     the bytes that were sent, once for all tries; the most tokens of its prompt
    answer        call, tries, prompt_tokens, answer_tokens    the bytes that came, and what was charged
    failure       call, tries, failure, what             a try without an answer, by its number; 0: nothing was sent
    tool          tool, name                             the arguments as JSON
    tool_result   tool, ok, failure, what, truncated, facts   the output; facts are numbers and codes of the worker's own
    end           outcome, what                          what the loop said when it ended by itself
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.campaign.canonical import encoded, sha256
from pipeline.campaign.errors import IntegrityError, WorkFailed
from pipeline.campaign.heads import GENESIS
from pipeline.campaign.strict_json import BadJson, Numbers, read

FIELDS: Mapping[str, frozenset[str]] = {
    kind: frozenset(fields.split())
    for kind, fields in {
        "request": "call prompt_bound",
        "answer": "call tries prompt_tokens answer_tokens",
        "failure": "call tries failure what",
        "tool": "tool name",
        "tool_result": "tool ok failure what truncated facts",
        "end": "outcome what",
    }.items()
}
"""Kind of event -> its fields beside seq, previous, at_ms and the content."""
WITH_CONTENT = ("request", "answer", "tool", "tool_result")


@dataclass(frozen=True)
class Transcript:
    """A transcript that was read. `head` is the sha256 of its last whole line; `cut_bytes` is the length of a last line without an end."""

    records: tuple[dict[str, Any], ...]
    head: str
    cut_bytes: int


class Writer:
    """Appends events; any thread may. A kill leaves at most one line without its end, which the next writer removes.

    Raises IntegrityError where the file is there and its chain does not hold, WorkFailed where it cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds, for tests."""
        self._lock, self._clock, self._begun = threading.Lock(), clock, clock()
        found = load(path) if path.exists() else Transcript((), GENESIS, 0)
        self._seq, self.head = len(found.records), found.head
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if found.cut_bytes:
                os.ftruncate(self._file, os.fstat(self._file).st_size - found.cut_bytes)
        except OSError as error:
            raise WorkFailed(f"cannot write {path}: {error.strerror}", "Free space there, or mend the rights") from None

    def append(self, kind: str, content: bytes | None = None, **fields: Any) -> None:
        """Append one event. Its line is with the kernel when this returns, so a kill of this process does not lose it."""
        if set(fields) != FIELDS[kind] or (content is not None) != (kind in WITH_CONTENT):
            raise TypeError(f"an event {kind} has {sorted(FIELDS[kind])}, and not {sorted(fields)}")
        with self._lock:
            at_ms = int((self._clock() - self._begun) * 1000)
            record = {"seq": self._seq, "previous": self.head, "at_ms": at_ms, "kind": kind, **fields}
            line = encoded({**record, **({} if content is None else _of_bytes(content))})
            try:
                self._write(line + b"\n")
            except OSError as error:
                self._close()  # nothing may follow a line that is perhaps cut
                raise WorkFailed(f"cannot append to the transcript: {error.strerror}", "Free space there") from None
            self._seq, self.head = self._seq + 1, hashlib.sha256(line).hexdigest()

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            left = left[os.write(self._file, left) :]

    def close(self) -> None:
        """Close the file; a later `append` raises WorkFailed."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def load(path: Path) -> Transcript:
    """Read a transcript and check its chain. A last line without an end is left out. Raises IntegrityError, which names the event."""
    *lines, cut = path.read_bytes().split(b"\n")
    previous, records = GENESIS, []
    for number, line in enumerate(lines):
        try:
            record = read(line, numbers=Numbers.WHOLE)
        except BadJson as bad:
            raise IntegrityError(f"{path}: event {number} is no JSON ({bad.code})", "Restore it from a copy") from None
        if not isinstance(record, dict) or record.get("previous") != previous or record.get("seq") != number:
            raise IntegrityError(f"{path}: the chain breaks at event {number}", "Restore it from a copy")
        _check_form(record, path)
        records.append(record)
        previous = sha256(line)
    return Transcript(tuple(records), previous, len(cut))


def verify(path: Path, head: str, digest: str) -> Transcript:
    """Read a transcript that was sealed: its last line has the sha256 `head`, the file `digest`. Raises IntegrityError."""
    found = load(path)
    if found.cut_bytes or found.head != head or sha256(path.read_bytes()) != digest:
        raise IntegrityError(f"{path} is not the transcript that was sealed ({digest[:16]})", "Restore it from a copy")
    return found


def used_so_far(path: Path) -> dict[str, int]:
    """Return setting of `worker.budget` -> what an agent at work used of it, by the whole lines of its transcript, unchecked: for `status`."""
    return dict(_used(path, path.stat().st_size))


@lru_cache(maxsize=64)
def _used(path: Path, size: int) -> dict[str, int]:
    """The cache: `status --watch` asks again and again, and a transcript only grows."""
    used = {"steps": 0, "tokens": 0, "gpu_seconds": 0}
    for line in path.read_bytes()[:size].split(b"\n")[:-1]:
        if b'"kind":"answer"' in line:  # a quotation mark in a content is escaped, so these bytes are the line's own
            record = json.loads(line)
            used["steps"] += 1
            used["tokens"] += record["prompt_tokens"] + record["answer_tokens"]
        elif b'"kind":"tool_result"' in line:
            used["gpu_seconds"] += json.loads(line)["facts"].get("gpu_seconds", 0)
    return used


def content_of(record: Mapping[str, Any]) -> bytes:
    """Return the exact bytes of an event's content."""
    return base64.b64decode(record["base64"], validate=True) if "base64" in record else str(record["text"]).encode()


def _of_bytes(content: bytes) -> dict[str, str]:
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _check_form(record: Mapping[str, Any], path: Path) -> None:
    """Raise IntegrityError unless an event has the fields of its kind."""
    kind = record.get("kind")
    fields = FIELDS.get(kind) if isinstance(kind, str) else None
    contents = set(record) & {"text", "base64"}
    if (
        fields is None
        or set(record) - contents != {"seq", "previous", "at_ms", "kind"} | fields
        or len(contents) != (kind in WITH_CONTENT)
        or not all(isinstance(record[name], str) for name in contents)
        or not all(
            isinstance(record[name], int)
            for name in fields & {"call", "prompt_bound", "tries", "tool", "prompt_tokens", "answer_tokens"}
        )
    ):
        raise IntegrityError(
            f"{path}: event {record['seq']} has not the form of a {kind!a}", "Take the version that wrote it"
        )
    try:
        content_of(record) if contents else b""
    except (ValueError, UnicodeEncodeError):
        raise IntegrityError(f"{path}: event {record['seq']} holds no base64", "Restore it from a copy") from None
