"""Ways to tamper with a finished campaign. Each takes lines of the log and files, and changes something at random.

`Change.cut` marks a log that was cut back to an earlier signed head, without the later files. Only an anchor shows that.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.sealed import SealedCampaign, rechained

HEAVY = (".h5", ".sqsh", ".safetensors", "adapter_config.json")
Records = list[dict[str, Any]]


@dataclass
class Change:
    """What a tampered campaign holds instead: lines of the log, and files (None: gone)."""

    lines: list[bytes]
    files: dict[str, bytes | None]
    torn: bytes = b""
    cut: bool = False


Kind = Callable[[random.Random, SealedCampaign, SealedCampaign], Change]


def flipped_byte(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """Any byte of the log becomes any other, the newlines too."""
    whole = bytearray(b"".join(line + b"\n" for line in ours.lines))
    whole[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
    *lines, torn = bytes(whole).split(b"\n")
    return Change(lines, {}, torn)


def edited(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    records = copies(ours)
    position = rng.randrange(len(records))
    edit(rng, records[position])
    lines = list(ours.lines)
    lines[position] = json.dumps(records[position], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return Change(lines, {})


def deleted(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    lines = list(ours.lines)
    del lines[rng.randrange(len(lines))]
    return Change(lines, {})


def reordered(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    lines = list(ours.lines)
    one, two = rng.sample(range(len(lines)), 2)
    lines[one], lines[two] = lines[two], lines[one]
    return Change(lines, {})


def duplicated(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    lines = list(ours.lines)
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return Change(lines, {})


def replayed(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """A record of another campaign, put in the place of ours or between two."""
    lines, foreign = list(ours.lines), rng.randrange(len(other.lines))
    at = rng.randrange(len(lines))
    lines[at : at + rng.randrange(2)] = [other.lines[foreign]]
    return Change(lines, {})


def rewritten(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """Without the key, but with the whole chain, every Merkle root and every closed.json made consistent again."""
    records = copies(ours)
    position = rng.randrange(len(records))
    match rng.randrange(5):
        case 0:
            del records[position]
        case 1:
            records.insert(position, rng.choice(records))
        case 2:
            at = rng.randrange(len(records))
            records[position], records[at] = records[at], records[position]
            if at == position:
                edit(rng, records[position])
        case 3:
            records.insert(position, rng.choice(copies(other)))
        case _:
            edit(rng, records[position])
    lines = rechained(records)
    return Change(lines if lines != ours.lines else lines[:-2], {})


def rewritten_with_own_key(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """Signed anew by somebody else's key."""
    records = copies(ours)
    edit(rng, records[rng.randrange(1, len(records))])
    return Change(rechained(records, other.key), {})


def swapped_files(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    names = [name for name in ours.files if name != "log.jsonl"]
    one, two = rng.sample(names, 2)
    while ours.files[one] == ours.files[two]:
        one, two = rng.sample(names, 2)
    return Change(ours.lines, {one: ours.files[two], two: ours.files[one]})


def changed_file(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    name = rng.choice([name for name, content in ours.files.items() if content and name != "log.jsonl"])
    content = bytearray(ours.files[name])
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    return Change(ours.lines, {name: bytes(content)})


def cut_file(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    name = rng.choice([name for name, content in ours.files.items() if content and name != "log.jsonl"])
    return Change(ours.lines, {name: ours.files[name][: rng.randrange(len(ours.files[name]))]})


def lost_file(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    names = [name for name in ours.files if not name.endswith(HEAVY) and name != "log.jsonl"]
    return Change(ours.lines, {rng.choice(names): None})


def foreign_file(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """A file of another campaign of the same name."""
    names = [
        name
        for name in ours.files
        if other.files.get(name, ours.files[name]) != ours.files[name] and name != "log.jsonl"
    ]
    name = rng.choice(names)
    return Change(ours.lines, {name: other.files[name]})


def foreign_log(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """Another campaign's log, whole or up to some record, beside our files."""
    return Change(other.lines[: rng.randrange(1, len(other.lines) + 1)], {})


def added_file(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """A decision, override or plan that no record has."""
    number = rng.randrange(5, 60)
    name = rng.choice(
        [
            f"hydra/round/r{number + 1:04d}.yaml",
            f"rounds/r{number:04d}/plan.json",
            f"rounds/r0002/decisions/{number:02d}.json",
        ]
    )
    return Change(ours.lines, {name: rng.randbytes(9)})


def cut_log(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """At any byte, or between two records; the files stay."""
    whole = b"".join(line + b"\n" for line in ours.lines)
    if rng.randrange(2):
        *lines, torn = whole[: rng.randrange(1, len(whole))].split(b"\n")
        return Change(lines, {}, torn)
    return Change(ours.lines[: rng.randrange(1, len(ours.lines))], {})


def cut_to_a_head(rng: random.Random, ours: SealedCampaign, other: SealedCampaign) -> Change:
    """Back to a signed head, and all files of what came later removed, or put back to what they were: a whole earlier campaign."""
    heads = [record["seq"] for record in ours.records if record["event"] == "close"][:-1]
    seq = rng.choice(heads)
    round_name = ours.records[seq]["round"]
    files: dict[str, bytes | None] = {}
    for name in ours.files:
        of = next(
            (part.removesuffix(".yaml") for part in name.split("/") if part[:1] == "r" and part[1:5].isdigit()), ""
        )
        last = f"r{int(round_name[1:]) + 1:04d}" if name.startswith("hydra/") else round_name
        if of > last:
            files[name] = None
    files["ledger.h5"] = None  # a view, rebuilt by anybody
    return Change(ours.lines[: seq + 1], files, cut=True)


KINDS: Mapping[str, Kind] = {
    kind.__name__: kind
    for kind in (
        flipped_byte, edited, deleted, reordered, duplicated, replayed, rewritten, rewritten_with_own_key, swapped_files, changed_file,
        cut_file, lost_file, foreign_file, foreign_log, added_file, cut_log, cut_to_a_head,
    )
}  # fmt: skip


def copies(campaign: SealedCampaign) -> Records:
    return [json.loads(line) for line in campaign.lines]


def edit(rng: random.Random, record: dict[str, Any]) -> None:
    """One leaf somewhere in a record, to another value of its kind or of another."""
    place: Any = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        value = place[key]
        if not isinstance(value, dict | list) or not value:
            break
        place = value
    place[key] = other_than(rng, value)


def other_than(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return rng.choice(["", 7])
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 10])
    if value and value[0] in "01" and rng.randrange(2):
        return ("1" if value[0] == "0" else "0") + value[1:]
    return value[:-1] if len(value) > 1 and rng.randrange(2) else value + "0"
