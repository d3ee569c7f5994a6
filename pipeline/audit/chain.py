"""Check the log's bytes: parse its lines into records, and verify the hash chain, the Merkle roots, the signatures and the anchors.

This module reads no files. Every line that is wrong becomes a finding that names the record. The audit ignores all records from the first
break of the chain on, because nothing ties them to this campaign.
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
    """The log's lines without newlines, the records up to the first break of the chain, and the sha256 of each record's line."""

    lines: list[bytes] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)

    @property
    def campaign(self) -> str:
        """The campaign's id, which `init` logged; empty if that record is missing."""
        name = self.facts.get("campaign")
        return name if isinstance(name, str) else ""

    @property
    def facts(self) -> Record:
        """What the first record says that `init` froze; empty if that record is missing or has no facts."""
        facts = self.records[0].get("facts") if self.records else None
        return facts if isinstance(facts, dict) else {}


def read_chain(content: bytes, report: Report) -> Chain:
    """Parse the log up to the first record that is not canonical or does not name the hash of the record before it."""
    since = len(report.findings)
    *lines, torn = content.split(b"\n")
    chain = Chain(lines)
    previous = GENESIS
    for number, line in enumerate(lines):
        try:
            record = read(line, numbers=Numbers.WHOLE)
            canonical = dumped(record) == line
        except ValueError:  # the line is not strict JSON, or ends within a character
            record, canonical = None, False
        if not canonical or not isinstance(record, dict):
            report.record(number, "is not canonical JSON, or nests deeper than any record, so the line was changed")
            break
        if type(record.get("seq")) is not int or record["seq"] != number or record.get("previous") != previous:
            report.record(
                number, "does not follow the record before it, so a record was changed, removed, inserted or moved"
            )
            break
        if not isinstance(record.get("event"), str):
            report.record(number, "names no event")
            break
        previous = sha256(line)
        chain.records.append(record)
        chain.hashes.append(previous)
    if torn:
        report.file(
            "log.jsonl", f"ends with an incomplete record of {len(torn)} bytes, after a crash or because it was cut"
        )
    if not chain.records:
        report.file("log.jsonl", "holds no record")
    report.checked(f"hash chain of {len(lines)} records", since)
    return chain


def check_heads(chain: Chain, report: Report) -> None:
    """Check the signature and the Merkle root of each `close` record, and that each begins where the one before it ended."""
    since = len(report.findings)
    key = chain.facts.get("public_key", "")
    closes = [record for record in chain.records if record["event"] == "close"]
    begin, numbers = 0, dict[str, int]()
    for record in closes:
        why = _wrong(record, chain, begin, numbers, key)
        if why:
            report.record(record["seq"], f"the signed head does not hold: {why}")
        begin = record["seq"]
    if not closes:
        report.unknown("no head of the log is signed yet, so whoever wrote the log can rewrite it")
    tail = len(chain.lines) - 1 - (closes[-1]["seq"] if closes else -1)
    if tail and closes:
        report.unknown(f"the last {tail} records come after the newest signed head, so only the chain protects them")
    if closes:
        heads_of = "signed head with its Merkle root" if len(closes) == 1 else "signed heads with their Merkle roots"
        report.checked(f"{len(closes)} {heads_of}", since)


def _wrong(record: Record, chain: Chain, begin: int, numbers: dict[str, int], key: str) -> str:
    """What is wrong with a `close` record; empty if nothing is."""
    names = ("campaign", "round", "number", "first", "last", "head", "root", "signature")
    if set(record) != {"seq", "previous", "event", *names}:
        return "it has other fields"
    try:
        head = Head(**{name: record[name] for name in names[:-1]})
        if not keys.signature_holds(key, head.message, record["signature"]):
            return "the signature is not that of the campaign's key"
        number, last = numbers.get(head.round, 0), record["seq"] - 1  # raises TypeError if `round` is a list
    except (TypeError, ValueError):
        return "it has other types"
    numbers[head.round] = number + 1
    if (head.campaign, head.number, head.first, head.last) != (chain.campaign, number, begin, last):
        return "it belongs to another campaign or other records, or is not the next head of its round"
    if head.head != record["previous"] or head.root != heads.merkle_root(chain.lines[begin : last + 1]):
        return "its root or its hash belongs to other records"
    return ""


def check_anchors(chain: Chain, anchors: Sequence[Anchor], report: Report) -> None:
    """Compare anchors that were kept elsewhere with the log. Without an anchor nobody can tell whether the log was cut or rewritten."""
    since = len(report.findings)
    for anchor in anchors:
        if anchor.campaign != chain.campaign:
            report.file("log.jsonl", f"is the log of {chain.campaign or 'nothing'}, and an anchor of {anchor.campaign}")
        elif anchor.seq >= len(chain.lines):
            report.file(
                "log.jsonl",
                f"ends with record {len(chain.lines) - 1}, but an anchor has record {anchor.seq}, so the log was cut",
            )
        elif sha256(chain.lines[anchor.seq]) != anchor.head:
            report.record(
                anchor.seq,
                f"is not the record that the anchor has ({anchor.head[:16]}), so history was rewritten, unless the anchor is not as it was printed",
            )
    if anchors:
        report.checked(f"{len(anchors)} anchor{'' if len(anchors) == 1 else 's'} from elsewhere", since)
    newest = max((anchor.seq for anchor in anchors), default=-1)
    if newest < len(chain.lines) - 1:
        report.unknown(
            f"no anchor is given for the records after {newest}, which whoever has the key could have rewritten"
            if newest >= 0
            else "no anchor is given: whoever has the key could have rewritten the whole log, or cut it back to an earlier signed head"
        )
    else:
        report.unknown(f"nobody can tell from here whether the log went on after record {newest}")
