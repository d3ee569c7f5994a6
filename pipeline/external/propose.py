"""Ask a proposer once, keep every byte of request and answer, and log the verdicts."""

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
from pipeline.decision.proposals import Proposed, content_of, reference_of, rejudged
from pipeline.external.chat import EndpointFailed

Ask = Callable[[bytes], bytes]
"""Request -> answer, both exact. Raises EndpointFailed where none came."""


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
    """Ask once for this very request, judge, keep and log. The caller holds the round.

    What the recipe has is read from the request, as an audit does. Raises IntegrityError where stored bytes are not those of the log,
    WorkFailed where nothing can be written.
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
        answered = canonical.sha256(answer)
        verdicts = proposal_gate.judge_answer(
            content_of(kind, answer), policy, reference_of(request), constitution, fits
        )
    except EndpointFailed as failed:
        answered, verdicts = "", (proposal_gate.refused(0, failed.kind, failed.what),)
    log.append_once(
        "proposal", round=folder.name, number=number, policy=kind, mode=mode, request_digest=digest, response_digest=answered,
        verdicts=[verdict.to_json() for verdict in verdicts],
    )  # fmt: skip
    for verdict in verdicts:
        if not verdict.accepted:
            log.append_once(
                "refusal", round=folder.name, number=number, slot=verdict.slot, article=verdict.article, code=verdict.code,
                what=verdict.what,
            )  # fmt: skip
    return Proposed(number, digest, answered, verdicts)


def replayed(folder: Round, record: Mapping[str, Any], policy: Policy, constitution: Constitution) -> Proposed:
    """The stored bytes of a logged proposal, judged again. Raises IntegrityError where bytes or verdicts are not the log's."""
    number, kept = record["number"], {}
    for name in ("request", "response"):
        path, wanted = folder.proposal(number, name), record[f"{name}_digest"]
        kept[name] = path.read_bytes() if path.exists() else b""
        if wanted and canonical.sha256(kept[name]) != wanted:
            raise IntegrityError(f"{path} is not what the log has ({wanted[:16]})", "Restore it from a copy")
    return rejudged(record, kept["request"], kept["response"], policy, constitution)


def _number(folder: Round, request: bytes) -> int:
    """Of the stored request of these bytes, or the next free one."""
    number = 0
    while (path := folder.proposal(number, "request")).exists() and path.read_bytes() != request:
        number += 1
    return number
