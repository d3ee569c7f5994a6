"""Check the records of a log: which kinds there are, which fields each has, and in which order they may stand.

A record with wrong fields, or in a place where no campaign would have written it, is a finding. Records of an unknown kind are reported as
not verifiable, because a later version may write them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.audit.findings import Report

Record = Mapping[str, Any]
Form = type | re.Pattern[str]
HEX = re.compile("[0-9a-f]{64}")
HEX_OR_NONE = re.compile("([0-9a-f]{64})?")
ROUND = re.compile("r[0-9]{4}")
ARM = re.compile("a[0-9]+|reference")
JUDGED = re.compile("reference|submission ([1-9][0-9]{0,8})")
DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_ATTEMPT: dict[str, Form] = {
    "round": ROUND, "arm": ARM, "attempt": int, "status": str, "exit_class": str, "role": str, "seed": int, "gpu_seconds": int,
    "train_gpu_seconds": int, "train_steps": int,
    "image_digest": str, "runtime_digest": str, "constitution_digest": str, "config_digest": str, "adapter_digest": HEX_OR_NONE,
    "plan_digest": HEX_OR_NONE, "files": dict,
}  # fmt: skip
_BASIS: dict[str, Form] = {
    "round": ROUND, "config_digest": HEX, "seed": int, "reference": dict, "tasks": dict, "proposals": dict, "external": str,
    "tokens_per_arm": int, "gpus_per_arm": int, "time_limit_minutes": int, "spent_gpu_seconds": int,
}  # fmt: skip
FIELDS: Mapping[str, Mapping[str, Form]] = {
    "init": {"facts": dict, "campaign_yaml": HEX},
    "basis": _BASIS,
    "forecast": {"round": ROUND, "forecast": dict},
    "plan": {"round": ROUND, "plan_digest": HEX, "plan": dict},
    "slurm_submission": {"round": ROUND, "plan_digest": HEX, "kind": str},
    "slurm_request": {"round": ROUND, "plan_digest": HEX, "sha256": HEX, "changed": dict},
    "judge_request": {"round": ROUND, "what": list},
    "unjudged": {"round": ROUND, "what": list},
    "attempt": _ATTEMPT,
    "agent": {"round": ROUND, "arm": ARM, "attempt": int, "report": dict},
    "outcome": {"round": ROUND, "arm": ARM, "outcome": dict},
    "late_arm": {"round": ROUND, "arm": ARM},
    "by_hand": {"round": ROUND},
    "evidence": {"round": ROUND, "sha256": HEX, "ledger": HEX},
    "decision": {"round": ROUND, "number": int, "decision": dict},
    "overrides": {"round": ROUND, "overrides": dict},
    "reveal": {"round": ROUND, "name": str, "seed": HEX},
    "close": {"campaign": str, "round": ROUND, "number": int, "first": int, "last": int, "head": HEX, "root": HEX, "signature": str},
    "submission": {"number": int, "round": ROUND, "arm": ARM, "purpose": str, "adapter_digest": str, "target": str, "day": DAY},
    "board_attempt": {"number": int, "day": DAY},
    "board_sent": {"number": int},
    "board_score": {"number": int},
    "proposal": {"round": ROUND, "number": int, "policy": str, "mode": str, "request_digest": HEX, "response_digest": HEX_OR_NONE, "verdicts": list},
    "refusal": {"round": ROUND, "number": int, "slot": int, "article": str, "code": str, "what": str},
    "submissions_chosen": {"round": ROUND, "arms": list},
    "finalists_chosen": {"finalists": list},
    "submission_refused": {
        "round": ROUND, "submission": str, "purpose": str, "copy": int, "article": str, "code": str, "what": str, "cure": str,
    },
    "end": {"round": ROUND},
}  # fmt: skip
MAY_HAVE: Mapping[str, frozenset[str]] = {
    "board_score": frozenset({"score", "why", "withdrawn", "by", "note"}),
    "proposal": frozenset({"reading"}),  # logs from before it have none
}


@dataclass
class RecordsSoFar:
    """What the records so far hold, by round."""

    basis: set[str] = field(default_factory=set)
    plans: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)  # of a judge job: "r0001/reference", "submission 3"
    num_submissions: int = 0
    settled: set[int] = field(default_factory=set)  # submissions that have a score or were withdrawn
    references: set[str] = field(default_factory=set)  # rounds whose reference has a score
    by_hand: set[str] = field(default_factory=set)
    outcomes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    evidence: set[str] = field(default_factory=set)
    decisions: dict[str, int] = field(default_factory=dict)
    revealed: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    ended: bool = False


def check_records(records: list[dict[str, Any]], report: Report) -> bool:
    """Check form and order of every record. Returns whether all have the form that the rest of an audit relies on."""
    since, all_have_form = len(report.findings), True
    seen = RecordsSoFar()
    for record in records:
        wrong = misfit(record)
        if wrong:
            report.record(record["seq"], wrong)
            all_have_form = False
            continue
        if record["event"] not in FIELDS:
            report.unknown(f"records of kind {record['event']!r} are not known to this version")
            continue
        why = ORDER[record["event"]](record, seen) if record["event"] in ORDER else ""
        if (record["event"] == "init") != (record["seq"] == 0):
            why = "a log begins with its init record and has no other"
        if why:
            report.record(record["seq"], f"{record['event']} stands where it cannot: {why}")
    report.checked("form and order of all records", since)
    return all_have_form


def misfit(record: Record) -> str:
    """What is wrong with the fields of a record; empty if nothing is, or if its kind is unknown."""
    fields = FIELDS.get(record["event"])
    if fields is None:
        return ""
    surplus = set(record) - set(fields) - {"seq", "previous", "event"} - MAY_HAVE.get(record["event"], frozenset())
    if surplus:
        return f"{record['event']} has the field {min(surplus)}, which it should not have"
    for name, form in fields.items():
        value = record.get(name)
        if isinstance(form, re.Pattern):
            fits = isinstance(value, str) and bool(form.fullmatch(value))
        else:
            fits = type(value) is form and not (
                isinstance(value, int) and value < 0
            )  # nothing that is counted is negative
        if not fits:
            return f"{record['event']} has no valid {name}"
    return ""


def _basis(record: Record, seen: RecordsSoFar) -> str:
    seen.basis.add(record["round"])
    return "the round is planned already" if record["round"] in seen.plans else ""


def _forecast(record: Record, seen: RecordsSoFar) -> str:
    return "the round is planned already" if record["round"] in seen.plans else ""


def _plan(record: Record, seen: RecordsSoFar) -> str:
    name = record["round"]
    expected = f"r{len(seen.plans):04d}"
    if name in seen.plans or name != expected:
        return f"{expected} is the next to be planned"
    before = f"r{len(seen.plans) - 1:04d}"
    seen.plans[name] = record["plan_digest"]
    if name not in seen.basis:
        return "its basis is not logged before it"
    if seen.ended:
        return "the campaign has ended"
    return f"{before} has no decision" if name > "r0001" and before not in seen.decisions else ""


def _planned(record: Record, seen: RecordsSoFar) -> str:
    return "" if record["round"] in seen.plans else f"{record['round']} has no plan"


def _submitted(record: Record, seen: RecordsSoFar) -> str:
    planned = seen.plans.get(record["round"])
    return "" if planned == record["plan_digest"] else f"{record['round']} has no plan of that digest"


def _requested(record: Record, seen: RecordsSoFar) -> str:
    if seen.outcomes[record["round"]]:
        return f"{record['round']} has outcomes, so its jobs were taken"
    return _submitted(record, seen)


def _of_campaign(what: str, round_name: str) -> str:
    """The name of a thing to judge in the whole campaign: each round judges the reference anew, and a submission is judged once."""
    return f"{round_name}/{what}" if what == "reference" else what


def _not_to_judge(record: Record, seen: RecordsSoFar) -> str:
    """Why a record names something that nobody could have judged at its place; empty where all is well."""
    if not record["what"]:
        return "it names nothing"
    for what in record["what"]:
        match = JUDGED.fullmatch(what) if isinstance(what, str) else None
        if not match:
            return f"{what!r} is nothing that a judge job judges"
        if record["what"].count(what) > 1:
            return f"it names {what} twice"
        if match[1] and int(match[1]) > seen.num_submissions:
            return f"{what} is not reserved"
        if int(match[1]) in seen.settled if match[1] else record["round"] in seen.references:
            return f"{what} has its score"
    return ""


def _judge_request(record: Record, seen: RecordsSoFar) -> str:
    if why := _not_to_judge(record, seen):
        return why
    for what in record["what"]:
        name = _of_campaign(what, record["round"])
        if name in seen.asked:
            return f"{what} was asked for before"
        seen.asked.add(name)
    return _planned(record, seen)


def _unjudged(record: Record, seen: RecordsSoFar) -> str:
    if why := _not_to_judge(record, seen):
        return why
    missing = [what for what in record["what"] if _of_campaign(what, record["round"]) not in seen.asked]
    return f"no judge job was asked for {missing[0]}" if missing else _planned(record, seen)


def _outcome(record: Record, seen: RecordsSoFar) -> str:
    name, arm, outcome = record["round"], record["arm"], record["outcome"]
    seen.outcomes[name].add(arm)
    if arm == "reference" and outcome.get("status") == "completed":
        seen.references.add(name)
    if arm == "reference" and outcome.get("exit_class") == "not_judged":
        if name in seen.references:
            return "its reference has its score"
        if _of_campaign(arm, name) not in seen.asked and name not in seen.by_hand:
            return "nobody was asked to judge it, and no person closes the round"
    return _planned(record, seen)


def _by_hand(record: Record, seen: RecordsSoFar) -> str:
    seen.by_hand.add(record["round"])
    return _planned(record, seen)


def _submission(record: Record, seen: RecordsSoFar) -> str:
    seen.num_submissions = max(seen.num_submissions, record["number"])
    return _planned(record, seen)


def _board_score(record: Record, seen: RecordsSoFar) -> str:
    has_end = record.get("withdrawn") or record.get("score") is not None
    (seen.settled.add if has_end else seen.settled.discard)(record["number"])
    return ""


def _late_arm(record: Record, seen: RecordsSoFar) -> str:
    if record["round"] not in seen.closed:
        return f"{record['round']} is not closed"
    return "" if record["arm"] in seen.outcomes[record["round"]] else "its outcome is not logged before it"


def _evidence(record: Record, seen: RecordsSoFar) -> str:
    seen.evidence.add(record["round"])
    return "" if seen.outcomes[record["round"]] else "the round has no outcome"


def _decision(record: Record, seen: RecordsSoFar) -> str:
    name, number = record["round"], record["number"]
    newest = seen.decisions.get(name, -1)
    seen.decisions[name] = max(newest, number)
    # If a crash came between a decision's record and its file, another decision of the same number may follow.
    if number != newest + 1 and (number != newest or name in seen.closed):
        return f"decision {newest + 1} of {name} is the next"
    return "" if name in seen.evidence else "its evidence is not logged before it"


def _overrides(record: Record, seen: RecordsSoFar) -> str:
    before = f"r{int(record['round'][1:]) - 1:04d}"
    if record["round"] in seen.plans:
        return f"{record['round']} is planned already"
    return "" if before in seen.decisions else f"{before} has no decision"


def _reveal(record: Record, seen: RecordsSoFar) -> str:
    name = record["name"]
    if name in seen.revealed:
        return f"{name} is revealed already"
    seen.revealed.add(name)
    if name.startswith("fresh/"):
        if name != f"fresh/{record['round']}":
            return f"{name} belongs to another round"
        return "" if record["round"] in seen.decisions else f"{record['round']} has no decision"
    return "" if seen.ended else f"{name} stays secret until the campaign ends"


def _close(record: Record, seen: RecordsSoFar) -> str:
    seen.closed.add(record["round"])
    return "" if f"fresh/{record['round']}" in seen.revealed else "the seed of its fresh items is not revealed"


def _end(record: Record, seen: RecordsSoFar) -> str:
    was_ended, seen.ended = seen.ended, True
    if was_ended:
        return "the campaign ended before"
    return "" if record["round"] in seen.closed else f"{record['round']} is open"


ORDER: Mapping[str, Callable[[Record, RecordsSoFar], str]] = {
    "basis": _basis, "forecast": _forecast, "plan": _plan, "slurm_submission": _submitted, "slurm_request": _requested,
    "judge_request": _judge_request, "unjudged": _unjudged, "attempt": _planned, "agent": _planned,
    "outcome": _outcome, "late_arm": _late_arm, "by_hand": _by_hand, "evidence": _evidence, "decision": _decision,
    "overrides": _overrides, "reveal": _reveal, "close": _close, "submission": _submission, "board_score": _board_score,
    "submissions_chosen": _planned, "submission_refused": _planned, "end": _end,
}  # fmt: skip
