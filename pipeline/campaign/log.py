"""The sealed log, `log.jsonl`: append-only, hash-chained, and signed when a round closes, so that an outsider can detect any change.

Each line is one record in canonical JSON (canonical.py) and holds the sha256 of the line before it. A `close` record signs the log's
head (heads.py) with the campaign's ed25519 key (keys.py).
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
from pipeline.campaign.shared_path import SharedPath, patiently, take_lock
from pipeline.campaign.strict_json import BadJson, Numbers, read


class Log:
    """One campaign's log. An exclusive lock admits one writer at a time, and `append` returns only once the record is on disk.

    A crash in the middle of a write leaves a line without a newline. Readers ignore it, and the next append moves it to `<log>.torn`
    and continues after the last complete record. Every method that appends raises WorkFailed where it cannot write.
    """

    def __init__(self, path: Path) -> None:
        self.path = SharedPath(path)

    def append(self, event: str, **payload: Any) -> str:
        """Append one record and return the sha256 of its line. Call it before the act that the record announces."""
        with self._held() as file:
            return self._write(file, event, payload)

    def append_once(self, event: str, **payload: Any) -> None:
        """Append a record unless the log holds one with this event and payload: stages may run again, or twice at once."""
        wanted = plain({"event": event, **payload})
        with self._held() as file:
            for record in self.records():
                if {key: value for key, value in record.items() if key not in ("seq", "previous")} == wanted:
                    return
            self._write(file, event, payload)

    def append_news(self, event: str, about: Mapping[str, Any], **payload: Any) -> bool:
        """Append a record unless the newest one of this event about the same thing is identical.

        about: the part of the payload that names the thing. Returns whether the record was appended.
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
        """Call `make` with all records under the lock, and append the (event, payload) that it returns, or nothing for None.

        Returns the records that `make` got. Use it for records whose number is limited, however many processes append at once.
        """
        with self._held() as file:
            records = self.records()
            if new_record := make(records):
                self._write(file, *new_record)
            return records

    def close(self, key: Path, campaign: str, round_name: str) -> dict[str, Any]:
        """Append a `close` record with the signed head and return it.

        Returns the round's newest `close` record instead where no record of the round has followed it. key: path of the signing key.
        """
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
        """Return the anchor of record `seq`, or of the last record."""
        lines, records = self.path.read_bytes().split(b"\n")[:-1], self.records()
        upto = lines if seq is None else lines[: seq + 1]
        return heads.newest_anchor(upto, records[0]["facts"]["campaign"])

    def records(self) -> list[dict[str, Any]]:
        """Return all records. Raises IntegrityError, which names the first record where the hash chain breaks."""
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
                    f"{self.path}: the chain breaks at record {number}", "Compare the log with a signed head or a copy"
                )
            records.append(record)
            previous = hashlib.sha256(line).hexdigest()
        return records

    def head(self) -> str:
        """Return the sha256 of the last complete line."""
        self.records()
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return hashlib.sha256(lines[-1]).hexdigest() if lines else GENESIS

    @contextmanager
    def _held(self) -> Iterator[IO[bytes]]:
        try:
            with patiently(self.path, lambda: open(self.path, "a+b")) as file:
                take_lock(file, fcntl.LOCK_EX)
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
