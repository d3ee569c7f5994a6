"""Ask a proposer, keep every byte, judge what came, and give it a place beside the deterministic plan: nothing more.

    rounds/r0003/proposals/00.request.json   what was sent          00.response.json   what came back, as it came

The deterministic arms stand first; in mode `active` an accepted proposal takes the place of an axis arm, in order. The sealed log has
the digests and every verdict (`proposal`), and a `refusal` for each that was refused. What the log says of a request stands: it is not
sent again, and its answer is judged again from the stored bytes, to the same verdicts. A proposer that fails costs a round nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import gate, seal
from pipeline.chat import MAX_ANSWER_BYTES, EndpointFailed
from pipeline.constitution import Constitution
from pipeline.errors import IntegrityError
from pipeline.gate import Verdict
from pipeline.layout import Round, write_file
from pipeline.records import Arm, Policy, Setting, with_setting

KINDS = ("none", "llm", "optuna")
MODES = ("shadow", "active")
Ask = Callable[[bytes], bytes]
"""Request -> answer, both exact. Raises EndpointFailed where none came."""


@dataclass(frozen=True)
class Proposed:
    """One question of a round and what became of it. `response_digest` is "" where no answer came."""

    number: int
    request_digest: str
    response_digest: str
    verdicts: tuple[Verdict, ...]


def propose(
    folder: Round,
    kind: str,
    mode: str,
    request: bytes,
    ask: Ask,
    policy: Policy,
    constitution: Constitution,
    fits: gate.Fits = lambda settings: "",
) -> Proposed:
    """Ask once for this very request, judge, keep and log. The caller holds the round.

    What the recipe has is read from the request, as an audit does. Raises IntegrityError where stored bytes are not those of the log,
    WorkFailed where nothing can be written.
    """
    log, digest = seal.Log(folder.campaign.log), seal.digest_bytes(request)
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
        answered = seal.digest_bytes(answer)
        verdicts = gate.judge(content_of(kind, answer), policy, reference_of(request), constitution, fits)
    except EndpointFailed as failed:
        answered, verdicts = "", (gate.refused(0, failed.kind, failed.what),)
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


def content_of(kind: str, answer: bytes) -> bytes:
    """The proposals' own bytes: a model's are in its endpoint's envelope, an optimiser's are the answer."""
    return gate.content_of(answer, MAX_ANSWER_BYTES) if kind == "llm" else answer


def replayed(folder: Round, record: Mapping[str, Any], policy: Policy, constitution: Constitution) -> Proposed:
    """The stored bytes of a logged proposal, judged again. Raises IntegrityError where bytes or verdicts are not the log's."""
    number, kept = record["number"], {}
    for name in ("request", "response"):
        path, wanted = folder.proposal(number, name), record[f"{name}_digest"]
        kept[name] = path.read_bytes() if path.exists() else b""
        if wanted and seal.digest_bytes(kept[name]) != wanted:
            raise IntegrityError(f"{path} is not what the log has ({wanted[:16]})", "Restore it from a copy")
    return rejudged(record, kept["request"], kept["response"], policy, constitution)


def rejudged(
    record: Mapping[str, Any],
    request: bytes,
    answer: bytes,
    policy: Policy,
    constitution: Constitution,
) -> Proposed:
    """Verdicts of a log's `proposal` record from the bytes of request and answer. Raises IntegrityError where they are others. Pure.

    Whether a recipe makes a configuration is taken from the record: that can refuse a proposal and never let one in.
    """
    misfits = [(each["key"], each["value"]) for each in record["verdicts"] if each.get("code") == "does_not_fit"]

    def fits(settings: tuple[Setting, ...]) -> str:
        return "as recorded" if settings[-1] in misfits else ""

    if record["response_digest"]:
        reference = reference_of(request)
        verdicts = gate.judge(content_of(record["policy"], answer), policy, reference, constitution, fits)
    else:
        verdicts = tuple(gate.refused(each["slot"], each["code"], each["what"]) for each in record["verdicts"])
    if [verdict.to_json() for verdict in verdicts] != record["verdicts"] or (
        not record["response_digest"] and any(verdict.accepted for verdict in verdicts)
    ):
        raise IntegrityError(
            f"the answer {record['response_digest'][:16]} of {record['round']} has other verdicts than the log",
            "The stored bytes, the policy or the constitution were changed",
        )
    return Proposed(record["number"], record["request_digest"], record["response_digest"], verdicts)


def reference_of(request: bytes) -> dict[str, str]:
    """The recipe's open keys as a stored request has them: what an audit judges with. Raises IntegrityError for no request of ours."""
    try:
        facts = json.loads(request)
        if "messages" in facts:
            facts = json.loads(facts["messages"][-1]["content"])
        return {key: rule["reference"] for key, rule in facts["open_keys"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise IntegrityError(f"a stored request is none ({error!r})", "Restore it from a copy") from error


def merge(arms: Sequence[Arm], verdicts: Sequence[Verdict], mode: str, standing: Sequence[Setting]) -> tuple[Arm, ...]:
    """The plan's arms: in mode `active` accepted proposals take the axis arms' places in order, else they stay as they are.

    Anchor, replicates, contrasts, control and every seed stay. Where a proposal is what a later axis arm has already, that arm takes a
    choice that was displaced, so that nothing runs twice.
    """
    if mode != "active":
        return tuple(arms)
    slots = [position for position, arm in enumerate(arms) if arm.role == "axis"]
    taken = [(v.axis, v.setting) for v in verdicts if v.accepted and v.setting is not None][: len(slots)]
    given = {setting for _, setting in taken}
    own = [(arms[slot].axis or "", arms[slot].overrides[-1]) for slot in slots]
    displaced = iter([choice for choice in own[: len(taken)] if choice[1] not in given])
    chosen = taken + [next(displaced) if choice[1] in given else choice for choice in own[len(taken) :]]
    merged = list(arms)
    for slot, (axis, setting) in zip(slots, chosen, strict=True):
        merged[slot] = replace(arms[slot], axis=axis, overrides=with_setting(tuple(standing), setting))
    return tuple(merged)


def _number(folder: Round, request: bytes) -> int:
    """Of the stored request of these bytes, or the next free one."""
    number = 0
    while (path := folder.proposal(number, "request")).exists() and path.read_bytes() != request:
        number += 1
    return number
