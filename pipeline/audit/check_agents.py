"""Check what agents are said to have done: each report against its transcript and its patch, and each score against what was edited.

A transcript is believed as far as its bytes go: it has the digest that the log sealed, and manifest, outcome and usage follow from it. That a
model wrote the answers is the operator's word. A patch is compared with the report in both directions, because either may leave out an edit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.audit.findings import Report
from pipeline.audit.fork_patch import Part, read_patch
from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.files import read_json
from pipeline.model_calls import derive_run, transcript

Record = Mapping[str, Any]
Key = tuple[str, str]
"""Round and arm."""
Name = tuple[str, str, int]
"""Round, arm and number of an attempt."""
EVIDENCE = ("transcript.jsonl", "fork.diff")
OF_TRANSCRIPT = ("steps", "prompt_tokens", "answer_tokens", "tool_calls", "full_runs", "smoke_runs", "failed_tries")
"""Parts of a report's usage that follow from its transcript; money follows from prices, seconds are the worker's word."""


def check_agents(records: Sequence[Record], folder: Path, there: Callable[[str], bool], report: Report) -> None:
    """Check every `agent` record, and that no score of an agent's arm lacks one. there: whether a path below the campaign is a plain file of it.

    The newest report of an arm must agree with the newest outcome that the log has of it.
    """
    since = len(report.findings)
    facts = next(record["facts"] for record in records if record["event"] == "init")
    open_paths = facts["articles"]["16"]["open_paths"]
    arms = {
        (record["round"], f"a{arm['index']}"): arm
        for record in records
        if record["event"] == "plan"
        for arm in record["plan"]["arms"]
    }
    attempts = {_name(r): r for r in records if r["event"] == "attempt"}
    reports = {_name(r): r for r in records if r["event"] == "agent"}
    newest: dict[Key, Record] = {}
    missing = 0
    for name, record in reports.items():
        arm, attempt = arms.get(name[:2]), attempts.get(name)
        if arm is None or attempt is None:
            report.record(record["seq"], "an agent's report stands without its arm's plan and attempt")
            continue
        is_scored, found = attempt["status"] == "completed", record["report"]
        if is_scored:
            newest[name[:2]] = record
        if why := _misfit(found, arm, attempt):
            report.record(record["seq"], f"the report of {name[0]}/{name[1]} {why}")
        transcript_path, patch_path = (f"{_attempt_folder(name)}/agent/{each}" for each in EVIDENCE)
        missing += sum(not there(path) for path in (transcript_path, patch_path))
        if there(transcript_path):
            if why := _against_transcript(found, arm["axis"], folder / transcript_path):
                report.file(transcript_path, f"does not give the report of record {record['seq']}: {why}")
            elif is_scored and not found["diff"]["files"] and (tools := _edits(folder / transcript_path)):
                at = f"{name[0]}/{name[1]}"
                report.unknown(
                    f"{at} is said to be unedited, although {tools} tool calls of its agent changed files before its full run"
                )
        if there(patch_path) and (why := _against_patch(found, folder / patch_path, open_paths, is_scored)):
            report.file(patch_path, f"is not the patch of record {record['seq']}: {why}")
    _check_seals(attempts, reports, folder, there, report)
    _check_scores(records, arms, newest, folder, there, report)
    if reports:
        report.checked("the agents' reports", since)
    if missing:
        report.unknown(f"{missing} transcripts or patches of agents are missing and known by digest alone")


def _check_seals(
    attempts: Mapping[Name, Record], reports: Mapping[Name, Record], folder: Path, there: Callable[[str], bool], report: Report
) -> None:  # fmt: skip
    """Check that the seal of each scored adapter counts as many edited files as its agent's report. An arm without an agent has none."""
    for name, attempt in attempts.items():
        path = f"{_attempt_folder(name)}/sealed.json"
        if attempt["status"] == "completed" and there(path):
            try:
                sealed = read_json(folder / path)["edited_files"]
            except (IntegrityError, KeyError, TypeError):
                sealed = "no number of"
            said = len(reports[name]["report"]["diff"]["files"]) if name in reports else 0
            if sealed != said:
                report.file(path, f"counts {sealed} edited files, and the agent's report has {said}")


def _check_scores(
    records: Sequence[Record], arms: Mapping[Key, Record], newest: Mapping[Key, Record], folder: Path,
    there: Callable[[str], bool], report: Report,
) -> None:  # fmt: skip
    """Check that each score says whether code was edited, and that a report stands behind each score of an agent's arm."""
    outcomes = {(r["round"], r["arm"]): r for r in records if r["event"] == "outcome"}
    roles = {round_name: _roles(folder, round_name, there) for round_name in {key[0] for key in outcomes}}
    for key, record in outcomes.items():
        outcome = record["outcome"]
        if outcome["status"] != "completed":
            continue
        is_edited, at = bool(outcome.get("edited")), f"{key[0]}/{key[1]}"
        if key not in newest:
            if is_edited:
                report.record(record["seq"], f"{at} was scored as edited code, and no agent's report says so")
            elif key in arms and arms[key]["role"] in roles[key[0]]:
                report.record(
                    record["seq"], f"{at} has a score, an agent was to run it, and no report says what it did"
                )
        elif bool(newest[key]["report"]["diff"]["files"]) != is_edited:
            report.record(
                newest[key]["seq"], f"{at} was scored as {'edited' if is_edited else 'unedited'} code, and was not"
            )


def _roles(folder: Path, round_name: str, there: Callable[[str], bool]) -> Sequence[str]:
    """The roles whose arms agents run, by the frozen configuration of a round; none where it is missing, which check_files reports."""
    path = f"rounds/{round_name}/config.yaml"
    values = canonical.scalars((folder / path).read_bytes().decode("utf-8", "replace")) if there(path) else {}
    return values.get("worker.roles", "").split(",") if values.get("worker.agent", "none") != "none" else ()


def _name(record: Record) -> Name:
    return record["round"], record["arm"], record["attempt"]


def _attempt_folder(name: Name) -> str:
    return f"rounds/{name[0]}/{name[1]}/attempt_{name[2]:02d}"


def _misfit(found: Record, arm: Record, attempt: Record) -> str:
    """What in a report contradicts the plan or the attempt; empty if nothing does."""
    is_scored = attempt["status"] == "completed"
    if is_scored and found["outcome"] != "completed":
        return f"says {found['outcome']}, and its attempt has a score"
    if found["outcome"] != "completed" and found["outcome"] != attempt["exit_class"]:
        return f"says {found['outcome']}, and its attempt ended as {attempt['exit_class']}"
    if is_scored and found["diff"]["files"] and arm["role"] != "axis":
        return f"has edits of an arm that repeats a recipe ({arm['role']}; article 16)"
    return ""


def _against_transcript(found: Record, axis: str | None, path: Path) -> str:
    """What of a report does not follow from its transcript; empty if all does."""
    try:
        read = transcript.verify(path, found["transcript_head"], found["transcript_sha256"])
        run = derive_run.of_transcript(read.records, axis)
    except IntegrityError as error:
        return error.what.replace(str(path), "it")
    manifest = run.manifest
    derived = {
        "outcome": run.outcome,
        "manifest": manifest.typed if manifest else None,
        "texts_sha256": manifest.texts_sha256 if manifest else "",
        "usage": {name: asdict(run.usage)[name] for name in OF_TRANSCRIPT},
    }
    said = {**{name: found[name] for name in derived}, "usage": {name: found["usage"][name] for name in OF_TRANSCRIPT}}
    return ", ".join(
        name for name in derived if canonical.encoded({"": derived[name]}) != canonical.encoded({"": said[name]})
    )


def _edits(path: Path) -> int:
    """How many calls that change a file were carried out before the last full run. A later command may have taken them back."""
    records = transcript.load(path).records
    done = {record["tool"] for record in records if record["kind"] == "tool_result" and record["ok"]}
    calls = [record for record in records if record["kind"] == "tool" and record["tool"] in done]
    last = max((number for number, call in enumerate(calls) if call["name"] == "train"), default=0)
    return sum(call["name"] in ("write", "patch") for call in calls[:last])


def _against_patch(found: Record, path: Path, open_paths: Sequence[str], is_scored: bool) -> str:
    """What differs between a report's files and its patch, and what of a scored arm nobody could review; empty if nothing."""
    try:
        patch = read_patch(path.read_bytes())
    except ValueError as error:
        return str(error)
    files, total = {each["path"]: each for each in found["diff"]["files"]}, found["diff"]["num_files"]
    unlisted, unshown = sorted(patch.parts.keys() - files.keys()), sorted(files.keys() - patch.parts.keys())
    if unlisted and len(files) == total:
        return f"it changes {unlisted[0]}, which the report leaves out"
    if len(patch.parts) + patch.unshown != total or len(unshown) > patch.unshown:
        return f"it leaves out {unshown[0] if unshown else 'a change'}, and counts {patch.unshown} changes that it does not show"
    if is_scored and len(files) != total:
        return f"the report lists {len(files)} of {total} changes, and the arm has a score"
    if wrong := [name for name, part in patch.parts.items() if name in files and not _is_same(files[name], part)]:
        return f"it changes {wrong[0]} otherwise than the report says"
    if is_scored and (hidden := [name for name in unshown if name.endswith(".py")]):
        return f"it does not show {hidden[0]}, whose code was trained"
    if is_scored and (closed := [name for name, each in files.items() if not _is_open(each, open_paths)]):
        return f"it changes {closed[0]}, which article 16 closes, and the arm has a score"
    return ""


def _is_same(said: Record, part: Part) -> bool:
    if part.is_text:
        return (said["added_lines"], said["removed_lines"]) == (part.added_lines, part.removed_lines)
    return bool(said["sha256"] == part.sha256)


def _is_open(changed: Record, open_paths: Sequence[str]) -> bool:
    """Whether article 16 opens a change: `**` is anything, and `*` stays within one part. The audit reads the globs by itself."""
    pieces = {"**": ".*", "*": "[^/]*"}
    globs = list(open_paths)
    if not changed["sha256"]:  # a folder is open if something below it may be
        globs += [each.rsplit("/", number)[0] for each in open_paths for number in range(1, each.count("/") + 1)]
    patterns = (
        "".join(pieces.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*|\*)", each)) for each in globs
    )
    return any(re.fullmatch(pattern, changed["path"]) for pattern in patterns)
