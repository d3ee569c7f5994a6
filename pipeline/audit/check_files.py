"""Compare every file that the log names with the digest in the log, or with the bytes that follow from a record.

Small files, on which decisions rest, must exist. Heavy ones (HDF5, adapters, the image) may be missing from a bundle and are then reported
as not verifiable. A plan, a decision or a seal that no record names is a finding, whether it is a file or a link. Any other file that no
record names, such as a page, a log or a result that is not logged yet, is listed and not checked.
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
NAMED_BY_RECORDS = re.compile(
    r"hydra/round/.+|rounds/[^/]+/(plan\.json|forecast\.json|config\.yaml|slurm_request\.json|evidence\.json|closed\.json|decisions/.+|proposals/.+)"
)
"""Paths that a campaign may only have if a record names them."""
WORD = re.compile("[A-Za-z0-9_./+-]*")
FOLDERS_OF_NAMED = re.compile(r"hydra|hydra/round|rounds|rounds/[^/]+|rounds/[^/]+/(decisions|proposals)")
"""Folders of such paths. A link in place of one would show a reader files that no record names."""
CHECKED_ELSEWHERE = re.compile(
    r"(.*/)?\.[^/]*|log\.jsonl(\.torn)?|code/.*|image/.*|vault/.*|ro-crate-metadata\.json|rounds/.*/adapter/[^/]+"
)
"""Files that are not listed as unchecked: locks, and files that other functions check."""


def check_files(records: Sequence[Record], hashes: Sequence[str], folder: Path, report: Report) -> None:
    """Check all files of a campaign's folder. records: of a log whose chain holds and whose records have the right form.

    hashes: the sha256 of each record's line.
    """
    since = len(report.findings)
    wanted, modes = files_named(records, hashes), dict(entries(folder))
    there = {path for path, mode in modes.items() if stat.S_ISREG(mode)}
    left_out = []
    for path, (digest, seq) in sorted(wanted.items()):
        actual = file_digest(folder / path) if path in there else None
        if actual is None and path.endswith(HEAVY):
            left_out.append(path)
        elif actual is None:
            report.file(path, f"is missing, although record {seq} names it")
        elif actual != digest:
            report.file(path, f"has the sha256 {actual[:16]}..., but record {seq} says {digest[:16]}...")
    unnamed = sorted(there - set(wanted))
    taken = [
        path for path in unnamed if NAMED_BY_RECORDS.fullmatch(path) and not path.rpartition("/")[2].startswith(".")
    ]
    for path in taken:
        report.file(path, "is named by no record of the log")
    for path in sorted(set(modes) - there):  # links, fifos and devices
        if NAMED_BY_RECORDS.fullmatch(path) or FOLDERS_OF_NAMED.fullmatch(path):
            report.file(path, "is a link or not a plain file, and a campaign has no such thing there")
    others = [path for path in unnamed if path not in taken and not CHECKED_ELSEWHERE.fullmatch(path)]
    if others:
        report.unknown(
            f"{len(others)} files are named by no record and were not checked, such as pages and logs: {first_few(others)}"
        )
    check_paths(records, report)
    if "campaign.yaml" in there:
        check_facts((folder / "campaign.yaml").read_bytes(), records[0]["facts"], report)
    report.checked(f"{len(wanted) - len(left_out)} files that the log names", since)
    if left_out:
        report.unknown(f"{len(left_out)} files are missing and known by digest alone: {first_few(left_out)}")
    facts = records[0]["facts"]
    check_code(folder, facts, report)
    check_image(folder, facts, there, report)
    check_adapters(records, folder, there, report)


def first_few(paths: Sequence[str], most: int = 4) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def files_named(records: Sequence[Record], hashes: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Path -> (sha256, number of the newest record that names the path)."""
    digests: dict[str, tuple[str, int]] = {}
    for record in records:
        for path, digest in NAMES.get(record["event"], nothing)(record, records, hashes).items():
            digests[path] = digest, record["seq"]
    return digests


def plain_files(folder: Path) -> set[str]:
    """Paths of the plain files below a campaign. Links are left out, and so are fifos, whose reader would wait for ever."""
    return {path for path, mode in entries(folder) if stat.S_ISREG(mode)}


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    """(path below a campaign, mode) of everything that is not a folder."""
    for at, folders, names in os.walk(folder):
        for name in names + [name for name in folders if os.path.islink(os.path.join(at, name))]:
            path = os.path.join(at, name)
            yield os.path.relpath(path, folder).replace(os.sep, "/"), os.lstat(path).st_mode


def check_paths(records: Sequence[Record], report: Report) -> None:
    """Check that records of attempts name files inside the campaign, each with a digest: nobody else could compare other files."""
    for record in records:
        files = record["files"] if record["event"] == "attempt" else {}
        outside = [path for path in files if not is_below(path)]
        if outside:
            report.record(record["seq"], f"names files outside of the campaign: {first_few(outside)}")
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


def _forecast(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    return {f"rounds/{record['round']}/forecast.json": canonical.sha256(canonical.encoded(record["forecast"]))}


def _slurm_request(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    return {f"rounds/{record['round']}/slurm_request.json": record["sha256"]}


def _attempt(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    files = {path: digest for path, digest in record["files"].items() if is_below(path)}
    if record["round"] == "r0000" and record["status"] == "completed":
        # The base has no outcome record, which would name the published file.
        folder = f"rounds/r0000/{record['arm']}"
        files |= {f"{folder}.h5": digest for path, digest in files.items() if path.endswith("/result.h5")}
    return files


def _agent(record: Record, records: Sequence[Record], hashes: Sequence[str]) -> dict[str, str]:
    folder = f"rounds/{record['round']}/{record['arm']}/attempt_{record['attempt']:02d}"
    return {f"{folder}/agent/report.json": canonical.sha256(canonical.encoded(record["report"]))}


def is_below(path: str) -> bool:
    """Whether a path stays inside of the folder that it is relative to."""
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
    "init": _init, "forecast": _forecast, "plan": _plan,
    "slurm_request": _slurm_request, "attempt": _attempt, "agent": _agent, "outcome": _outcome, "evidence": _evidence,
    "decision": _decision, "overrides": _overrides, "proposal": _proposal, "close": _close,
}  # fmt: skip


def check_facts(content: bytes, facts: Mapping[str, Any], report: Report) -> None:
    """Check that campaign.yaml, which people read, agrees with the init record, from which everything is derived.

    The audit has no YAML reader, so it compares only values that stand on one line.
    """
    values = canonical.scalars(content.decode("utf-8", "replace"))
    wrong = sorted(key for key, value in leaves(facts, "") if key in values and values[key] != value)
    if wrong:
        report.file("campaign.yaml", f"says something else than the init record about {first_few(wrong)}")


def leaves(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every value that is one word or whole number, which YAML writes on one line."""
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif type(value) is int or (isinstance(value, str) and WORD.fullmatch(value)):
            yield prefix + key, str(value)


def check_code(folder: Path, facts: Mapping[str, Any], report: Report) -> None:
    """Check the frozen code, which judged and decided, by its tree digest, and the constitution in it by its digest."""
    since, name = len(report.findings), f"code/{facts['code_digest'][:16]}"
    if not (folder / name).is_dir():
        report.unknown("the campaign's frozen code is missing and known by digest alone")
        return
    try:
        digest = tree_digest(folder / name)
    except (OSError, PipelineError) as error:
        digest = repr(error)
    if digest != facts["code_digest"]:
        report.file(name, "is not the code that was frozen")
    elif not (rules := folder / name / "constitution" / "constitution.yaml").is_file() or (
        file_digest(rules) != facts["constitution_digest"]
    ):
        report.file(f"{name}/constitution/constitution.yaml", "is not the constitution that was frozen")
    report.checked("the frozen code and its constitution", since)


def check_image(folder: Path, facts: Mapping[str, Any], there: set[str], report: Report) -> None:
    """Check the sha256 of the image's file. `--rescore` checks its tree digest, which needs unsquashfs."""
    path = "image/substrate.sqsh"
    if path not in there:
        report.unknown("the image is missing and known by digest alone")
    elif file_digest(folder / path) != facts["image"]["sqsh_sha256"]:
        report.file(path, "is not the image that was frozen")
    else:
        report.verified.append("the image's file")


def check_adapters(records: Sequence[Record], folder: Path, there: set[str], report: Report) -> None:
    """Check that every adapter is the one that was sealed, by the sha256 of its tensors followed by its configuration."""
    since, missing, count = len(report.findings), [], 0
    for record in records:
        if record["event"] != "attempt" or not record["adapter_digest"] or record["arm"] == "reference":
            continue
        path = f"rounds/{record['round']}/{record['arm']}/attempt_{record['attempt']:02d}/adapter"
        parts = [f"{path}/{name}" for name in ("adapter_model.safetensors", "adapter_config.json")]
        if not there.issuperset(parts):
            missing.append(path)
        elif canonical.sha256(b"".join((folder / part).read_bytes() for part in parts)) != record["adapter_digest"]:
            report.file(path, f"is not the adapter that record {record['seq']} names")
        else:
            count += 1
    if count:
        report.checked(f"{count} adapters", since)
    if missing:
        report.unknown(f"{len(missing)} adapters are missing and known by digest alone: {first_few(missing)}")
