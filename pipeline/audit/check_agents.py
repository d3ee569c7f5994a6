"""Check what agents are said to have done: each report against its transcript, and each score against what was edited.

A transcript is believed as far as its bytes go: it has the digest that the log sealed, and manifest, outcome and usage follow from it. That a
model wrote the answers is the operator's word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.audit.findings import Report
from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError
from pipeline.model_calls import derive_run, transcript

Record = Mapping[str, Any]
Key = tuple[str, str]
OF_TRANSCRIPT = ("steps", "prompt_tokens", "answer_tokens", "tool_calls", "full_runs", "smoke_runs")
"""Parts of a report's usage that follow from its transcript; money follows from prices, seconds are the worker's word."""


def check_agents(records: Sequence[Record], folder: Path, there: Callable[[str], bool], report: Report) -> None:
    """Check every `agent` record. there: whether a path below the campaign is a plain file of it.

    The newest report of an arm must agree with the newest outcome that the log has of it.
    """
    since = len(report.findings)
    arms = {
        (record["round"], f"a{arm['index']}"): arm
        for record in records
        if record["event"] == "plan"
        for arm in record["plan"]["arms"]
    }
    attempts = {(r["round"], r["arm"], r["attempt"]): r for r in records if r["event"] == "attempt"}
    outcomes = {(r["round"], r["arm"]): r["outcome"] for r in records if r["event"] == "outcome"}
    newest: dict[Key, Record] = {}
    missing = 0
    for record in (record for record in records if record["event"] == "agent"):
        arm, attempt = arms.get((record["round"], record["arm"])), attempts.get(_name(record))
        if arm is None or attempt is None:
            report.record(record["seq"], "an agent's report stands without its arm's plan and attempt")
            continue
        if attempt["status"] == "completed":
            newest[record["round"], record["arm"]] = record
        if why := _misfit(record["report"], arm, attempt):
            report.record(record["seq"], f"the report of {record['round']}/{record['arm']} {why}")
        path = f"rounds/{record['round']}/{record['arm']}/attempt_{record['attempt']:02d}/agent/transcript.jsonl"
        if not there(path):
            missing += 1
        elif why := _against_transcript(record["report"], arm["axis"], folder / path):
            report.file(path, f"does not give the report of record {record['seq']}: {why}")
    for at in (record for record in records if record["event"] == "outcome"):
        is_scored = at["outcome"]["status"] == "completed"
        if is_scored and at["outcome"].get("edited") and (at["round"], at["arm"]) not in newest:
            report.record(
                at["seq"], f"{at['round']}/{at['arm']} was scored as edited code, and no agent's report says so"
            )
    for key, record in newest.items():
        outcome, is_edited = outcomes.get(key), bool(record["report"]["diff"]["files"])
        if outcome and outcome["status"] == "completed" and bool(outcome.get("edited")) != is_edited:
            report.record(
                record["seq"],
                f"{key[0]}/{key[1]} was scored as {'unedited' if is_edited else 'edited'} code, and was not",
            )
    if any(record["event"] == "agent" for record in records):
        report.checked("the agents' reports", since)
    if missing:
        report.unknown(f"{missing} transcripts of agents are missing and known by digest alone")


def _name(record: Record) -> tuple[str, str, int]:
    return record["round"], record["arm"], record["attempt"]


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
