"""A tree of hashes over the records of a round: one signed root, and any single record can be shown to be under it without the others.

The tree is that of RFC 6962: leaves and inner nodes are hashed with different first bytes, so that no node can pass for a record, and
a level of odd size keeps its last node for the next one, so that no record counts twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf(line: bytes) -> bytes:
    return hashlib.sha256(b"\0" + line).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def root(lines: Sequence[bytes]) -> str:
    """Of a round's records, without their newlines; of none the hash of nothing."""
    level = [leaf(line) for line in lines]
    while len(level) > 1:
        level = _above(level)
    return (level[0] if level else hashlib.sha256().digest()).hex()


def proof(lines: Sequence[bytes], position: int) -> list[tuple[str, str]]:
    """What one record needs to be shown under the root: from the leaf up, on which side the other node is, and its hash."""
    level, steps = [leaf(line) for line in lines], []
    while len(level) > 1:
        other = position ^ 1
        if other < len(level):
            steps.append(("left" if other < position else "right", level[other].hex()))
        level, position = _above(level), position // 2
    return steps


def is_under(line: bytes, steps: Sequence[tuple[str, str]], wanted_root: str) -> bool:
    """Whether a record and its proof give this root."""
    found = leaf(line)
    for side, other in steps:
        found = node(bytes.fromhex(other), found) if side == "left" else node(found, bytes.fromhex(other))
    return found.hex() == wanted_root


def _above(level: Sequence[bytes]) -> list[bytes]:
    pairs = [node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return pairs + ([level[-1]] if len(level) % 2 else [])
