"""Canonical bytes, hash chain, signatures and commitments: what lets an outsider check that nothing was changed afterwards.

A record is canonical JSON (RFC 8785) without floats: integers under 2^53, strings, booleans, null. `log.jsonl` is one record a
line, each with the sha256 of the line before it; a `close` record signs the head (ed25519) when a round closes. A commitment is the sha256 of a
random 32-byte seed under a label, published at `init`, checked when the seed is revealed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pipeline.campaign import heads
from pipeline.campaign.canonical import encoded, plain
from pipeline.campaign.errors import IntegrityError, WorkFailed
from pipeline.campaign.heads import GENESIS
from pipeline.campaign.keys import sign
from pipeline.campaign.strict_json import BadJson, Numbers, read


class Log:
    """The sealed log of a campaign: append-only, one writer at a time (exclusive lock), synced before `append` returns.

    A crash in the middle of a line leaves an unterminated tail; the next append sets it aside in `<log>.torn` and goes on from
    the last whole record, so that nothing whole is lost and nothing half is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **payload: Any) -> str:
        """Add one record before the act that it announces; returns its hash. Raises WorkFailed when it cannot be written."""
        with self._held() as file:
            return self._write(file, event, payload)

    def append_once(self, event: str, **payload: Any) -> None:
        """Append unless this very record (event and payload) is there: for stages that may be run again, or twice at once."""
        wanted = plain({"event": event, **payload})
        with self._held() as file:
            for record in self.records():
                if {key: value for key, value in record.items() if key not in ("seq", "previous")} == wanted:
                    return
            self._write(file, event, payload)

    def append_news(self, event: str, about: Mapping[str, Any], **payload: Any) -> bool:
        """Append unless the newest record of this event about the same thing says the same: what is true again is told again.

        Returns whether it was appended.
        """
        wanted = plain({**about, **payload})
        with self._held() as file:
            same = [
                record
                for record in self.records()
                if record["event"] == event and all(record.get(name) == value for name, value in plain(about).items())
            ]
            if same and {key: same[-1].get(key) for key in wanted} == wanted:
                return False
            self._write(file, event, wanted)
            return True

    def append_from(
        self, make: Callable[[list[dict[str, Any]]], tuple[str, Mapping[str, Any]] | None]
    ) -> list[dict[str, Any]]:
        """Append what `make` says of the records so far, both under the lock: (event, payload), or None for nothing.

        Returns the records that `make` saw. For what may be written only once, or only so often, whoever asks at the same time.
        """
        with self._held() as file:
            records = self.records()
            if made := make(records):
                self._write(file, made[0], made[1])
            return records

    def close(self, key: Path, campaign: str, round_name: str) -> dict[str, Any]:
        """Sign the head under the lock; returns the round's newest `close` record, which is the one there is if nothing of the round came since."""
        with self._held() as file:
            records = self.records()
            mine = [record for record in records if record.get("round") == round_name]
            if mine and mine[-1]["event"] == "close":
                return mine[-1]
            number = sum(record["event"] == "close" for record in mine)
            lines = self._whole_lines(file)
            head = heads.head_over(lines, records, campaign, round_name, number)
            signed = {"signature": sign(key, head.message)}
            self._write(file, "close", {**asdict(head), **signed})
            return self.records()[-1]

    def anchor(self, seq: int | None = None) -> heads.Anchor:
        """Of one record, or of the last: what is put where the campaign cannot rewrite it."""
        lines, records = self.path.read_bytes().split(b"\n")[:-1], self.records()
        upto = lines if seq is None else lines[: seq + 1]
        return heads.newest_anchor(upto, records[0]["facts"]["campaign"])

    def records(self) -> list[dict[str, Any]]:
        """All records. Raises IntegrityError naming the first record whose chain does not hold."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes().split(b"\n")[:-1]
        previous = GENESIS
        records = []
        for number, line in enumerate(whole):
            try:
                record = read(line, numbers=Numbers.WHOLE)
            except BadJson:
                record = {}
            if not isinstance(record, dict) or record.get("previous") != previous or record.get("seq") != number:
                raise IntegrityError(
                    f"{self.path}: the chain breaks at record {number}", "Compare with a signed head or a copy"
                )
            records.append(record)
            previous = hashlib.sha256(line).hexdigest()
        return records

    def head(self) -> str:
        """Hash of the last whole record."""
        self.records()
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return hashlib.sha256(lines[-1]).hexdigest() if lines else GENESIS

    @contextmanager
    def _held(self) -> Iterator[IO[bytes]]:
        try:
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise WorkFailed(
                f"cannot append to {self.path}: {error.strerror}", "Free space there; nothing was done yet"
            ) from error

    def _write(self, file: IO[bytes], event: str, payload: Mapping[str, Any]) -> str:
        lines = self._whole_lines(file)
        previous = hashlib.sha256(lines[-1]).hexdigest() if lines else GENESIS
        line = encoded({"seq": len(lines), "previous": previous, "event": event, **payload})
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return hashlib.sha256(line).hexdigest()

    def _whole_lines(self, file: IO[bytes]) -> list[bytes]:
        file.seek(0)
        *lines, torn = file.read().split(b"\n")
        if torn:
            with open(f"{self.path}.torn", "ab") as aside:
                aside.write(torn + b"\n")
            file.truncate(sum(len(line) + 1 for line in lines))
        return lines
