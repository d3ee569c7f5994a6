"""Heads and anchors of the sealed log, by which an outsider notices that the log was rewritten.

A head is what the campaign signs when a round closes. It holds the Merkle root of the records since the previous head, and the hash of
the last record, which fixes all earlier ones through the hash chain.

An anchor is one line of text that names a campaign, a record's number and the sha256 of that record's line:

    postrain-log/demo-1f2e3d4c/57/9a0f...

It needs no signature. Whoever keeps one where the campaign cannot rewrite it (a job's comment in Slurm's accounting, a printed report,
a git note) can check the log up to that record.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.campaign import canonical

GENESIS = "0" * 64
"""Stands for the hash of the line before the first record."""
ANCHOR = re.compile(r"postrain-log/([A-Za-z0-9._-]+)/([0-9]{1,9})/([0-9a-f]{64})")


@dataclass(frozen=True)
class Head:
    """`root` is over the records `first` to `last`; `head` is the sha256 of the last one's line; `number` counts the round's heads from 0."""

    campaign: str
    round: str
    number: int
    first: int
    last: int
    head: str
    root: str

    @property
    def message(self) -> bytes:
        """The bytes that the campaign signs."""
        return b"postrain head\0" + canonical.encoded(asdict(self))


@dataclass(frozen=True)
class Anchor:
    """States that the line of record `seq` in the log of `campaign` has the sha256 `head`."""

    campaign: str
    seq: int
    head: str

    def __str__(self) -> str:
        return f"postrain-log/{self.campaign}/{self.seq}/{self.head}"


def anchors_in(text: str) -> list[Anchor]:
    """Find every anchor in a text, such as a comment, a note or a report."""
    return [Anchor(campaign, int(seq), head) for campaign, seq, head in ANCHOR.findall(text)]


def head_over(
    lines: Sequence[bytes], records: Sequence[Mapping[str, Any]], campaign: str, round_name: str, number: int
) -> Head:
    """Return the head over the records from the newest `close` record on, that one included.

    lines: every line of the log, without newlines. records: the same lines, parsed.
    """
    first = next((n for n in range(len(records) - 1, -1, -1) if records[n]["event"] == "close"), 0)
    root = merkle_root(lines[first:])
    head = canonical.sha256(lines[-1]) if lines else GENESIS
    return Head(campaign, round_name, number, first, len(lines) - 1, head, root)


def newest_anchor(lines: Sequence[bytes], campaign: str) -> Anchor:
    """Return the anchor of the last of these lines."""
    return Anchor(campaign, len(lines) - 1, canonical.sha256(lines[-1]) if lines else GENESIS)


def leaf(line: bytes) -> bytes:
    """Return the hash of a Merkle leaf; its prefix keeps a leaf from passing for a node."""
    return hashlib.sha256(b"\0" + line).digest()


def node(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner Merkle node."""
    return hashlib.sha256(b"\1" + left + right).digest()


def merkle_root(lines: Sequence[bytes]) -> str:
    """Return the Merkle root of lines (without newlines) as hex; without lines, the sha256 of no bytes."""
    level = [leaf(line) for line in lines]
    while len(level) > 1:
        level = _above(level)
    return (level[0] if level else hashlib.sha256().digest()).hex()


def _above(level: Sequence[bytes]) -> list[bytes]:
    pairs = [node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return pairs + ([level[-1]] if len(level) % 2 else [])
