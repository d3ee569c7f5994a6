"""The log as bytes: lines in, records out, and whether chain, Merkle roots, signatures and anchors hold. Reads nothing.

What is not of its form is a finding that names the record. Records from the first break of the chain on are looked at no further: what
follows from them says nothing of this campaign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.audit.findings import Report
from pipeline.campaign import heads, keys
from pipeline.campaign.canonical import dumped, sha256
from pipeline.campaign.heads import GENESIS, Anchor, Head
from pipeline.campaign.strict_json import Numbers, read

Record = dict[str, Any]


@dataclass
class Chain:
    """`lines` without newlines, `records` of as many of them as hold together, `hashes` of these."""

    lines: list[bytes] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)

    @property
    def campaign(self) -> str:
        """The id that `init` gave; empty where there is no such record."""
        facts = self.records[0].get("facts") if self.records else None
        name = facts.get("campaign") if isinstance(facts, dict) else None
        return name if isinstance(name, str) else ""


def read_chain(content: bytes, report: Report) -> Chain:
    """Up to the first record that is not canonical, or does not name the hash of the one before it."""
    since = len(report.findings)
    *lines, torn = content.split(b"\n")
    chain = Chain(lines)
    previous = GENESIS
    for number, line in enumerate(lines):
        try:
            record = read(line, numbers=Numbers.WHOLE)
            canonical = dumped(record) == line
        except ValueError:  # no strict JSON, or half a character
            record, canonical = None, False
        if not canonical or not isinstance(record, dict):
            report.record(number, "is not canonical JSON, or nests deeper than any record: the line was changed")
            break
        if type(record.get("seq")) is not int or record["seq"] != number or record.get("previous") != previous:
            report.record(number, "does not follow the record before it: one was changed, taken out, put in or moved")
            break
        if not isinstance(record.get("event"), str):
            report.record(number, "names no event")
            break
        previous = sha256(line)
        chain.records.append(record)
        chain.hashes.append(previous)
    if torn:
        report.file("log.jsonl", f"ends with an incomplete record of {len(torn)} bytes: a crash, or it was cut")
    if not chain.records:
        report.file("log.jsonl", "holds no record")
    report.checked(f"hash chain of {len(lines)} records", since)
    return chain


def check_heads(chain: Chain, report: Report) -> None:
    """Each `close` record: its signature by the campaign's key, its Merkle root, and that each begins where the one before ended."""
    since = len(report.findings)
    facts = chain.records[0].get("facts", {}) if chain.records else {}
    key = facts.get("public_key", "") if isinstance(facts, dict) else ""
    closes = [record for record in chain.records if record["event"] == "close"]
    begin, numbers = 0, dict[str, int]()
    for record in closes:
        why = _wrong(record, chain, begin, numbers, key)
        if why:
            report.record(record["seq"], f"the signed head does not hold: {why}")
        begin = record["seq"]
    if not closes:
        report.unknown("no head of the log is signed yet: whoever wrote it can rewrite it")
    tail = len(chain.lines) - 1 - (closes[-1]["seq"] if closes else -1)
    if tail and closes:
        report.unknown(f"the last {tail} records come after the newest signed head: only the chain holds them together")
    if closes:
        report.checked(f"{len(closes)} signed heads with their Merkle roots", since)


def _wrong(record: Record, chain: Chain, begin: int, numbers: dict[str, int], key: str) -> str:
    """Why a `close` record does not hold; empty where it does."""
    names = ("campaign", "round", "number", "first", "last", "head", "root", "signature")
    if set(record) != {"seq", "previous", "event", *names}:
        return "it has other fields"
    try:
        head = Head(**{name: record[name] for name in names[:-1]})
        if not keys.signature_holds(key, head.message, record["signature"]):
            return "the signature is not that of the campaign's key"
        number, last = numbers.get(head.round, 0), record["seq"] - 1  # a round that is a list cannot be counted
    except (TypeError, ValueError):
        return "it has other types"
    numbers[head.round] = number + 1
    if (head.campaign, head.number, head.first, head.last) != (chain.campaign, number, begin, last):
        return "it is of another campaign, another place, or not the next of its round"
    if head.head != record["previous"] or head.root != heads.merkle_root(chain.lines[begin : last + 1]):
        return "root or hash are of other records"
    return ""


def check_anchors(chain: Chain, anchors: Sequence[Anchor], report: Report) -> None:
    """What was put elsewhere against the log as it is. Without any, nobody knows whether the log was cut, or written anew."""
    since = len(report.findings)
    for anchor in anchors:
        if anchor.campaign != chain.campaign:
            report.file("log.jsonl", f"is the log of {chain.campaign or 'nothing'}, and an anchor of {anchor.campaign}")
        elif anchor.seq >= len(chain.lines):
            report.file(
                "log.jsonl", f"ends with record {len(chain.lines) - 1}; an anchor has record {anchor.seq}: it was cut"
            )
        elif sha256(chain.lines[anchor.seq]) != anchor.head:
            report.record(
                anchor.seq, f"is not the record that the anchor has ({anchor.head[:16]}): history was rewritten"
            )
    if anchors:
        report.checked(f"{len(anchors)} anchors from elsewhere", since)
    newest = max((anchor.seq for anchor in anchors), default=-1)
    if newest < len(chain.lines) - 1:
        report.unknown(
            f"no anchor is given for the records after {newest}: who has the key could have rewritten them"
            if newest >= 0
            else "no anchor is given: who has the key could have rewritten the whole log, or cut it back to an earlier signed head"
        )
    else:
        report.unknown(f"whether the log went on after record {newest}")
