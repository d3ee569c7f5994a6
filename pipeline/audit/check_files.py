"""Every file that the log names, against what the log says of it: by digest, or by the very bytes that follow from a record.

Small files that decisions rest on must be there. Heavy ones (HDF5, adapters, the image) may have been left out of a bundle: then they are
listed as what could not be verified. A plan, decision or seal without a record is a finding, be it a file or a link; anything else without
one (a page, a log, a result that is not taken up yet) is told and not looked at.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.audit.findings import Report
from pipeline.audit.log_schema import HEX
from pipeline.campaign import canonical
from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import file_digest, tree_digest
from pipeline.campaign.heads import Anchor

Record = Mapping[str, Any]
HEAVY = (".h5", ".sqsh", ".safetensors")
TAKEN = re.compile(
    r"hydra/round/.+|rounds/[^/]+/(plan\.json|config\.yaml|evidence\.json|closed\.json|decisions/.+|proposals/.+)"
)
"""Paths that no campaign has without a record that names them."""
WORD = re.compile("[A-Za-z0-9_./+-]*")
HOLDS_TAKEN = re.compile(r"hydra|hydra/round|rounds|rounds/[^/]+|rounds/[^/]+/(decisions|proposals)")
"""Folders of such: a link in their place shows a reader what no record names."""
OURS = re.compile(
    r"(.*/)?\.[^/]*|log\.jsonl(\.torn)?|code/.*|image/.*|vault/.*|ro-crate-metadata\.json|rounds/.*/adapter/[^/]+"
)
"""What is there for a reason of its own: locks, and what another part looks at."""


def check_files(records: Sequence[Record], hashes: Sequence[str], folder: Path, report: Report) -> None:
    """All files of a campaign's folder, of a log whose chain holds and whose records have their form."""
    since = len(report.findings)
    wanted, modes = named(records, hashes), dict(entries(folder))
    there = {path for path, mode in modes.items() if stat.S_ISREG(mode)}
    left_out = []
    for path, (digest, seq) in sorted(wanted.items()):
        found = file_digest(folder / path) if path in there else None
        if found is None and path.endswith(HEAVY):
            left_out.append(path)
        elif found is None:
            report.file(path, f"is not there; record {seq} names it")
        elif found != digest:
            report.file(path, f"is not what record {seq} says: {found[:16]} and not {digest[:16]}")
    unnamed = sorted(there - set(wanted))
    taken = [path for path in unnamed if TAKEN.fullmatch(path) and not path.rpartition("/")[2].startswith(".")]
    for path in taken:
        report.file(path, "is named by no record of the log")
    for path in sorted(set(modes) - there):  # links to whatever, fifos, devices
        if TAKEN.fullmatch(path) or HOLDS_TAKEN.fullmatch(path):
            report.file(path, "is a link or no plain file: a campaign has none there")
    others = [path for path in unnamed if path not in taken and not OURS.fullmatch(path)]
    if others:
        report.unknown(
            f"{len(others)} files are named by no record and were not looked at, pages and logs among them: {shown(others)}"
        )
    check_paths(records, report)
    if "campaign.yaml" in there:
        check_facts((folder / "campaign.yaml").read_bytes(), records[0]["facts"], report)
    report.checked(f"{len(wanted) - len(left_out)} files that the log names", since)
    if left_out:
        report.unknown(f"{len(left_out)} files are not there and known by digest alone: {shown(left_out)}")
    facts = records[0]["facts"]
    check_code(folder, facts, report)
    check_image(folder, facts, there, report)
    check_adapters(records, folder, there, report)


def shown(paths: Sequence[str], most: int = 4) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def named(records: Sequence[Record], hashes: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Path -> (sha256, number of the record that has it); the newest record of a path counts."""
    found: dict[str, tuple[str, int]] = {}
    for record in records:
        for path, digest in NAMES.get(record["event"], nothing)(record, records, hashes).items():
            found[path] = digest, record["seq"]
    return found


def plain_files(folder: Path) -> set[str]:
    """Paths below a campaign; links are not followed, and stand for nothing. Nor does a fifo, of which no reader would see the end."""
    return {path for path, mode in entries(folder) if stat.S_ISREG(mode)}


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    """(path below a campaign, mode) of everything in it that is no folder."""
    for at, folders, names in os.walk(folder):
        for name in names + [name for name in folders if os.path.islink(os.path.join(at, name))]:
            path = os.path.join(at, name)
            yield os.path.relpath(path, folder).replace(os.sep, "/"), os.lstat(path).st_mode


def check_paths(records: Sequence[Record], report: Report) -> None:
    """Files of attempts are in the campaign, with a digest: what stands elsewhere is nothing that anybody else could compare."""
    for record in records:
        files = record["files"] if record["event"] == "attempt" else {}
        outside = [path for path in files if not is_below(path)]
        if outside:
            report.record(record["seq"], f"names files outside of the campaign: {shown(outside)}")
        if not all(isinstance(digest, str) and HEX.fullmatch(digest) for digest in files.values()):
            report.record(record["seq"], "names a file without a digest")


def nothing(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    return {}


def _init(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    texts = {f"hydra/round/{name}.yaml": canonical.overrides_text({"round": name}) for name in ("r0000", "r0001")}
    return {
        "campaign.yaml": record["campaign_yaml"],
        **{path: canonical.sha256(text.encode()) for path, text in texts.items()},
    }


def _plan(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    folder = f"rounds/{record['round']}"
    return {
        f"{folder}/plan.json": canonical.sha256(canonical.encoded(record["plan"])),
        f"{folder}/config.yaml": record["plan"]["config_digest"],
    }


def _attempt(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    found = {path: digest for path, digest in record["files"].items() if is_below(path)}
    if (
        record["round"] == "r0000" and record["status"] == "completed"
    ):  # the base has no outcome that would name what is published
        folder = f"rounds/r0000/{record['arm']}"
        found |= {f"{folder}.h5": digest for path, digest in found.items() if path.endswith("/result.h5")}
    return found


def is_below(path: str) -> bool:
    """A path that stays in the campaign's folder, wherever it is read."""
    return not path.startswith("/") and ".." not in path.split("/") and "\0" not in path


def _outcome(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    name = "rounds/r0000/a0" if record["arm"] == "reference" else f"rounds/{record['round']}/{record['arm']}"
    digest = record["outcome"].get("result_digest")
    return {f"{name}.h5": digest} if digest else {}


def _evidence(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    return {f"rounds/{record['round']}/evidence.json": record["sha256"], "ledger.h5": record["ledger"]}


def _decision(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    rested_on = [r for r in records[: record["seq"]] if (r["event"], r.get("round")) == ("evidence", record["round"])]
    digest = rested_on[-1]["sha256"] if rested_on else ""
    content = canonical.encoded({**record["decision"], "evidence_digest": digest})
    return {f"rounds/{record['round']}/decisions/{record['number']:02d}.json": canonical.sha256(content)}


def _overrides(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    return {
        f"hydra/round/{record['round']}.yaml": canonical.sha256(canonical.overrides_text(record["overrides"]).encode())
    }


def _proposal(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    path = f"rounds/{record['round']}/proposals/{record['number']:02d}"
    answered = {f"{path}.response.json": record["response_digest"]} if record["response_digest"] else {}
    return {f"{path}.request.json": record["request_digest"], **answered}


def _close(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    seeds = [r["seed"] for r in records if r["event"] == "reveal" and r["name"] == f"fresh/{record['round']}"]
    anchor = Anchor(records[0]["facts"]["campaign"], record["seq"], hashes[record["seq"]])
    content = canonical.encoded({"fresh_seed": seeds[0] if seeds else "", **record, "anchor": str(anchor)})
    return {f"rounds/{record['round']}/closed.json": canonical.sha256(content)}


NAMES = {
    "init": _init, "plan": _plan, "attempt": _attempt, "outcome": _outcome, "evidence": _evidence, "decision": _decision,
    "overrides": _overrides, "proposal": _proposal, "close": _close,
}  # fmt: skip


def check_facts(content: bytes, facts: Mapping[str, Any], report: Report) -> None:
    """campaign.yaml, which people read, says what the init record says, which everything is derived from; as far as it stands in plain lines."""
    found = canonical.scalars(content.decode("utf-8", "replace"))
    wrong = sorted(key for key, value in leaves(facts, "") if key in found and found[key] != value)
    if wrong:
        report.file("campaign.yaml", f"says something else than the init record of {shown(wrong)}")


def leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of what is one word or number, so that YAML has it on one line, in quotes or not."""
    for key, each in value.items():
        if isinstance(each, dict):
            yield from leaves(each, f"{prefix}{key}.")
        elif type(each) is int or (isinstance(each, str) and WORD.fullmatch(each)):
            yield prefix + key, str(each)


def check_code(folder: Path, facts: Mapping[str, Any], report: Report) -> None:
    """What judged and decided, as frozen: its tree digest, and the constitution in it."""
    since, name = len(report.findings), f"code/{facts['code_digest'][:16]}"
    if not (folder / name).is_dir():
        report.unknown("the campaign's frozen code is not there: known by digest alone")
        return
    try:
        found = tree_digest(folder / name)
    except (OSError, PipelineError) as error:
        found = repr(error)
    if found != facts["code_digest"]:
        report.file(name, "is not the code that was frozen")
    elif not (rules := folder / name / "constitution" / "constitution.yaml").is_file() or (
        file_digest(rules) != facts["constitution_digest"]
    ):
        report.file(f"{name}/constitution/constitution.yaml", "is not the constitution that was frozen")
    report.checked("the frozen code and its constitution", since)


def check_image(folder: Path, facts: Mapping[str, Any], there: set[str], report: Report) -> None:
    """The image's file, by its checksum. Its tree digest needs unsquashfs: --rescore unpacks it."""
    path = "image/substrate.sqsh"
    if path not in there:
        report.unknown("the image is not there: known by digest alone")
    elif file_digest(folder / path) != facts["image"]["sqsh_sha256"]:
        report.file(path, "is not the image that was frozen")
    else:
        report.verified.append("the image's file")


def check_adapters(records: Sequence[Record], folder: Path, there: set[str], report: Report) -> None:
    """Every kept adapter is the one that was sealed: sha256 of its tensors and its configuration, one after the other."""
    since, missing, count = len(report.findings), [], 0
    for record in records:
        if record["event"] != "attempt" or not record["adapter_digest"] or record["arm"] == "reference":
            continue
        path = f"rounds/{record['round']}/{record['arm']}/attempt_{record['attempt']:02d}/adapter"
        parts = [f"{path}/{name}" for name in ("adapter_model.safetensors", "adapter_config.json")]
        if not there.issuperset(parts):
            missing.append(path)
        elif canonical.sha256(b"".join((folder / part).read_bytes() for part in parts)) != record["adapter_digest"]:
            report.file(path, f"is not the adapter that record {record['seq']} has")
        else:
            count += 1
    if count:
        report.checked(f"{count} adapters", since)
    if missing:
        report.unknown(f"{len(missing)} adapters are not there and known by digest alone: {shown(missing)}")
