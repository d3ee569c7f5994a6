"""Ask a proposer once per request, store the exact bytes of request and answer, and log the gate's verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Round
from pipeline.campaign.log import Log
from pipeline.campaign.records import Policy
from pipeline.decision import proposal_gate
from pipeline.decision.proposals import READING, Proposed, judge, reference_of, rejudged
from pipeline.model_calls.failures import EndpointFailed

Ask = Callable[[bytes], bytes]
"""A function from the exact bytes of a request to those of its answer. It raises EndpointFailed without an answer."""


def propose(
    folder: Round,
    kind: str,
    mode: str,
    request: bytes,
    ask: Ask,
    policy: Policy,
    constitution: Constitution,
    fits: proposal_gate.Fits = lambda settings: "",
) -> Proposed:
    """Ask the proposer, judge its answer, and store and log both; a request that the log has is judged again instead.

    kind: llm or optuna. mode: shadow or active. fits: as for `proposals.judge`. The caller holds the round's lock. The recipe's
    values come from the request, as in an audit. Raises IntegrityError where stored bytes differ from the log, WorkFailed where nothing
    can be written.
    """
    log, digest = Log(folder.campaign.log), canonical.sha256(request)
    for record in log.records():
        if (record["event"], record.get("round"), record.get("request_digest")) == ("proposal", folder.name, digest):
            return replayed(folder, record, policy, constitution)
    number = _number(folder, request)
    answer_path = folder.proposal(number, "response")
    write_file(folder.proposal(number, "request"), request)
    try:
        if not answer_path.exists():
            write_file(answer_path, ask(request))
        answer = answer_path.read_bytes()
        answer_digest = canonical.sha256(answer)
        verdicts = judge(kind, READING, answer, policy, reference_of(request), constitution, fits)
    except EndpointFailed as failed:
        answer_digest, verdicts = "", (proposal_gate.refused(0, failed.kind, failed.what),)
    log.append_once(
        "proposal", round=folder.name, number=number, policy=kind, mode=mode, request_digest=digest, response_digest=answer_digest,
        reading=READING, verdicts=[verdict.to_json() for verdict in verdicts],
    )  # fmt: skip
    for verdict in verdicts:
        if not verdict.accepted:
            log.append_once(
                "refusal", round=folder.name, number=number, slot=verdict.slot, article=verdict.article, code=verdict.code,
                what=verdict.what,
            )  # fmt: skip
    return Proposed(number, digest, answer_digest, verdicts)


def replayed(folder: Round, record: Mapping[str, Any], policy: Policy, constitution: Constitution) -> Proposed:
    """Judge the stored bytes of a logged proposal again. Raises IntegrityError where bytes or verdicts differ from the log."""
    number, stored = record["number"], {}
    for name in ("request", "response"):
        path, wanted = folder.proposal(number, name), record[f"{name}_digest"]
        stored[name] = path.read_bytes() if path.exists() else b""
        if wanted and canonical.sha256(stored[name]) != wanted:
            raise IntegrityError(f"{path} is not what the log has ({wanted[:16]})", "Restore it from a copy")
    return rejudged(record, stored["request"], stored["response"], policy, constitution)


def _number(folder: Round, request: bytes) -> int:
    """Return the number of the stored request with these bytes, else the next free number."""
    number = 0
    while (path := folder.proposal(number, "request")).exists() and path.read_bytes() != request:
        number += 1
    return number
