"""Canonical bytes, hash chain, signatures and commitments: what lets an outsider check that nothing was changed afterwards.

A record is canonical JSON (RFC 8785) without floats: integers under 2^53, strings, booleans, null. `log.jsonl` is one record a
line, each with the sha256 of the line before it; its head is signed (ed25519) when a round closes. A commitment is the sha256 of a
random 32-byte seed under a label, published at `init`, checked when the seed is revealed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from pipeline.errors import IntegrityError, WorkFailed

GENESIS = "0" * 64


def plain(value: Any) -> Any:
    """Records to JSON values: fractions become "p/q", tuples lists; a float is a defect and raises TypeError."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a sealed record: {value!r}")


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a record. Raises TypeError for a type that a record may not hold, ValueError for an integer from 2^53 on."""
    return rfc8785.dumps(plain(value))


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_seed() -> str:
    """32 random bytes as hex, from the operating system."""
    return secrets.token_hex(32)


def commitment(label: str, seed_hex: str) -> str:
    """sha256("label" NUL seed): hides the seed, binds to it; the label keeps one seed from standing for another."""
    return hashlib.sha256(label.encode() + b"\0" + bytes.fromhex(seed_hex)).hexdigest()


def make_key(path: Path) -> str:
    """Write a new ed25519 key, mode 0600, exclusively; returns the public key as hex."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(path: Path, message: bytes) -> str:
    """Signature as hex, by the key at `path`."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return key.sign(message).hex()


def signature_holds(public_key_hex: str, message: bytes, signature_hex: str) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key_hex)).verify(bytes.fromhex(signature_hex), message)
    except InvalidSignature:
        return False
    return True


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

    def records(self) -> list[dict[str, Any]]:
        """All records. Raises IntegrityError naming the first record whose chain does not hold."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes().split(b"\n")[:-1]
        previous = GENESIS
        records = []
        for number, line in enumerate(whole):
            try:
                record = json.loads(line)
            except ValueError:
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
        line = canonical({"seq": len(lines), "previous": previous, "event": event, **payload})
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
