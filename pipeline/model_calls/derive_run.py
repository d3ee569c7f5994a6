"""What an agent did, from its transcript alone: the accepted manifest, how it ended, what it used. An audit compares the report with this.

The outcome follows from events in this order:

    a manifest was accepted, and a full run made an adapter       completed
    a manifest was accepted, and the last full run failed         agent_closed_path, agent_gpu_seconds, or the trial's kind of failure (fact `kind`)
    a manifest was accepted, and no full run came so far          agent_no_adapter
    the loop said why it ended                                    agent_watchdog, agent_budget, agent_gpu_seconds, agent_endpoint, ...
    none of these: the loop's process ended otherwise             agent_contract
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import IntegrityError
from pipeline.model_calls.budget import Charge, charge_of
from pipeline.model_calls.manifest import BadManifest, Manifest, read_manifest
from pipeline.model_calls.prompt_bounds import by_bytes
from pipeline.model_calls.transcript import content_of

ENDINGS: Sequence[tuple[str, str]] = (
    ("watchdog", "agent_watchdog"),
    ("budget_gpu_seconds", "agent_gpu_seconds"),
    ("budget", "agent_budget"),
    ("closed_path", "agent_closed_path"),
    ("endpoint", "agent_endpoint"),
    ("replay_ended", "agent_endpoint"),
    ("malformed", "agent_malformed"),
    ("no_adapter", "agent_no_adapter"),
)
"""(beginning of the outcome that a loop says, the arm's outcome); the first that fits counts."""
STARTED = ("trial_failed", "nothing_trained")
"""Failures of `train` after which a process had run. One that a budget cut off has the fact `kind`; every other failure is a refusal before that."""
MOST_SHOWN = 400
"""Characters of a worker's or loop's sentence that `why_ended` repeats."""


@dataclass(frozen=True)
class Usage:
    """What a run used, as far as its transcript says it."""

    steps: int
    prompt_tokens: int
    answer_tokens: int
    tool_calls: int
    full_runs: int
    smoke_runs: int
    failed_tries: int  # calls that got no answer; they are not charged, though an endpoint may be paid for some


@dataclass(frozen=True)
class Run:
    """What an agent did. manifest: None where none was accepted."""

    manifest: Manifest | None
    outcome: str
    usage: Usage


def of_transcript(records: Sequence[Mapping[str, Any]], axis: str | None) -> Run:
    """Derive a run from the events of its transcript. axis: the arm's axis, or None.

    Raises IntegrityError where an accepted manifest is none, or a recorded charge does not follow from the bytes of its answer.
    """
    requests = {record["call"]: record for record in records if record["kind"] == "request"}
    answers = [record for record in records if record["kind"] == "answer"]
    charges = [_charge(requests.get(answer["call"]), answer) for answer in answers]
    results = {record["tool"]: record for record in records if record["kind"] == "tool_result"}
    tools = [(record, results.get(record["tool"])) for record in records if record["kind"] == "tool"]
    manifest, full, smoke, trained = None, 0, 0, "agent_no_adapter"
    for call, result in tools:
        if call["name"] == "finish" and result and result["ok"]:
            manifest = _accepted(call, axis)
        if call["name"] != "train" or not result:
            continue
        has_started = result["ok"] or result["failure"] in STARTED or _kind(result) is not None
        is_full = _is_full(call)
        full, smoke = full + (has_started and is_full), smoke + (has_started and not is_full)
        if is_full and trained != "completed":
            trained = _trained(result) or trained
    usage = Usage(
        len(answers), sum(charge.prompt_tokens for charge in charges), sum(charge.answer_tokens for charge in charges),
        len(tools), full, smoke, sum(record["kind"] == "failure" and record["tries"] > 0 for record in records),
    )  # fmt: skip
    said = next((record["outcome"] for record in reversed(records) if record["kind"] == "end"), "")
    return Run(manifest, trained if manifest else outcome_of(said), usage)


def _trained(result: Mapping[str, Any]) -> str:
    """The outcome that a full run's result stands for if no later one completes; "" for a refusal that says nothing of the run."""
    if result["ok"]:
        return "completed"
    kind = _kind(result)
    if result["failure"] == "trial_failed" and kind is not None:
        return kind
    return {"closed_path": "agent_closed_path", "budget_gpu_seconds": "agent_gpu_seconds"}.get(result["failure"], "")


def why_ended(records: Sequence[Mapping[str, Any]], run: Run, used: str, edited: Sequence[str]) -> str:
    """Say for people why a run ended without an adapter that counts, "" where it has one.

    used: "302 of 300 GPU-seconds". edited: plain names of the files that were edited. Sentences are the worker's and the loop's own; what a
    training or a model wrote, names of files among it, is not repeated.
    """
    if run.outcome == "completed":
        return ""
    if not run.manifest:
        end = next((record for record in reversed(records) if record["kind"] == "end"), None)
        return f"{end['outcome']}: {_plain(end['what'])}" if end else "its loop broke off without saying why"
    results = {record["tool"]: record for record in records if record["kind"] == "tool_result"}
    full = [
        results[record["tool"]]
        for record in records
        if record["kind"] == "tool" and record["name"] == "train" and _is_full(record) and record["tool"] in results
    ]
    if not full:
        return "it handed in its manifest and never asked for the full run"
    # The last one that says how a full run ended, else the last refusal.
    last = next((result for result in reversed(full) if _trained(result)), full[-1])
    if str(last["failure"]).startswith("budget_"):
        what = f"{used} were used" if last["failure"] == "budget_gpu_seconds" else _plain(last["what"])
        return f"its full run was {'cut off' if _kind(last) else 'refused'}, because {what}"
    if last["failure"] == "closed_path":
        named = ", ".join(edited[:5]) + (", ..." if len(edited) > 5 else "")
        return f"article 16 refused its full run, because its edits ({named}) go beyond the open paths"
    words = f" ({_plain(last['what'])})" if _kind(last) == "more_steps" else ""
    return f"its last full run does not count: {_kind(last) or last['failure']}{words}"


def _plain(what: Any) -> str:
    """A sentence without what the agent was told to do next, on one line and of bounded length."""
    text = "".join(char if char.isprintable() else " " for char in str(what)).partition("; ")[0]
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."


def _kind(result: Mapping[str, Any]) -> str | None:
    """How the trial of a training ended, None where none ran."""
    kind = result["facts"].get("kind") if isinstance(result["facts"], dict) else None
    return kind if isinstance(kind, str) else None


def _is_full(call: Mapping[str, Any]) -> bool:
    return _arguments(call).get("num_steps") is None


def outcome_of(said: str) -> str:
    """Return the arm's outcome for what its loop said at its end, "" where it said nothing."""
    return next((outcome for beginning, outcome in ENDINGS if said.startswith(beginning)), "agent_contract")


def _charge(request: Mapping[str, Any] | None, answer: Mapping[str, Any]) -> Charge:
    charge = None
    if request is not None:
        sent = strict_json.read(content_of(request))
        most = sent.get("max_tokens", sent.get("max_completion_tokens"))
        # A bound by counts depends on which answers had come, so the recorded one is taken; it is never above the one by bytes.
        charge = charge_of(content_of(answer), Charge(min(request["prompt_bound"], by_bytes(sent)), most, True))
    if charge is None or (charge.prompt_tokens, charge.answer_tokens) != (
        answer["prompt_tokens"],
        answer["answer_tokens"],
    ):
        raise IntegrityError(
            f"event {answer['seq']} of a transcript charges other tokens than its answer says", "Restore it from a copy"
        )
    return charge


def _accepted(call: Mapping[str, Any], axis: str | None) -> Manifest:
    try:
        return read_manifest(strict_json.read(content_of(call)), axis)
    except (BadManifest, strict_json.BadJson) as bad:
        raise IntegrityError(
            f"event {call['seq']} of a transcript was accepted as a manifest and is none: {bad}",
            "Restore it from a copy",
        ) from None


def _arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        arguments = strict_json.read(content_of(call))
    except strict_json.BadJson:
        arguments = {}
    return arguments if isinstance(arguments, dict) else {}
