"""Heads of the sealed log: what is signed when a round closes, and the short text that is put where the campaign cannot rewrite it.

    postrain-log/demo-1f2e3d4c/57/9a0f...       campaign, number of a record, sha256 of its line: an anchor

A head signs the records since the head before it: their Merkle root, and the hash of the last of them, on which all earlier ones hang.
An anchor needs no signature. Whoever has one from somewhere else (a job's comment in Slurm's accounting, a printed report, a git note)
knows what the log was up to that record.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.campaign import canonical

GENESIS = "0" * 64
ANCHOR = re.compile(r"postrain-log/([A-Za-z0-9._-]+)/([0-9]{1,9})/([0-9a-f]{64})")


@dataclass(frozen=True)
class Head:
    """`first` and `last`: numbers of the records that `root` is over; `head`: sha256 of the line of the last. `number` counts a round's heads."""

    campaign: str
    round: str
    number: int
    first: int
    last: int
    head: str
    root: str

    @property
    def message(self) -> bytes:
        """What is signed."""
        return b"postrain head\0" + canonical.encoded(asdict(self))


@dataclass(frozen=True)
class Anchor:
    """Record number `seq` of a campaign's log has a line of this hash."""

    campaign: str
    seq: int
    head: str

    def __str__(self) -> str:
        return f"postrain-log/{self.campaign}/{self.seq}/{self.head}"


def anchors_in(text: str) -> list[Anchor]:
    """Every anchor in a text from wherever: a comment, a note, a report."""
    return [Anchor(campaign, int(seq), head) for campaign, seq, head in ANCHOR.findall(text)]


def head_over(
    lines: Sequence[bytes], records: Sequence[Mapping[str, Any]], campaign: str, round_name: str, number: int
) -> Head:
    """Of the lines (whole, without newlines) since the newest `close` record, itself included."""
    first = next((n for n in range(len(records) - 1, -1, -1) if records[n]["event"] == "close"), 0)
    root = merkle_root(lines[first:])
    head = canonical.sha256(lines[-1]) if lines else GENESIS
    return Head(campaign, round_name, number, first, len(lines) - 1, head, root)


def newest_anchor(lines: Sequence[bytes], campaign: str) -> Anchor:
    return Anchor(campaign, len(lines) - 1, canonical.sha256(lines[-1]) if lines else GENESIS)


def leaf(line: bytes) -> bytes:
    return hashlib.sha256(b"\0" + line).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def merkle_root(lines: Sequence[bytes]) -> str:
    """Of a round's records, without their newlines; of none the hash of nothing."""
    level = [leaf(line) for line in lines]
    while len(level) > 1:
        level = _above(level)
    return (level[0] if level else hashlib.sha256().digest()).hex()


def _above(level: Sequence[bytes]) -> list[bytes]:
    pairs = [node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return pairs + ([level[-1]] if len(level) % 2 else [])
