"""Ask a proposer, keep every byte, judge what came, and give it a place beside the deterministic plan: nothing more.

    rounds/r0003/proposals/00.request.json   what was sent          00.response.json   what came back, as it came

The deterministic arms stand first; in mode `active` an accepted proposal takes the place of an axis arm, in order. The sealed log has
the digests and every verdict (`proposal`), and a `refusal` for each that was refused. What the log says of a request stands: it is not
sent again, and its answer is judged again from the stored bytes, to the same verdicts. A proposer that fails costs a round nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Arm, Policy, Setting, with_setting
from pipeline.decision import proposal_gate
from pipeline.decision.proposal_gate import MAX_ANSWER_BYTES, ProposalVerdict


@dataclass(frozen=True)
class Proposed:
    """One question of a round and what became of it. `response_digest` is "" where no answer came."""

    number: int
    request_digest: str
    response_digest: str
    verdicts: tuple[ProposalVerdict, ...]


def content_of(kind: str, answer: bytes) -> bytes:
    """The proposals' own bytes: a model's are in its endpoint's envelope, an optimiser's are the answer."""
    return proposal_gate.content_of(answer, MAX_ANSWER_BYTES) if kind == "llm" else answer


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
        verdicts = proposal_gate.judge_answer(
            content_of(record["policy"], answer), policy, reference, constitution, fits
        )
    else:
        verdicts = tuple(proposal_gate.refused(each["slot"], each["code"], each["what"]) for each in record["verdicts"])
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
        facts = strict_json.read(request)
        if "messages" in facts:
            facts = strict_json.read(facts["messages"][-1]["content"].encode())
        return {key: rule["reference"] for key, rule in facts["open_keys"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise IntegrityError(f"a stored request is none ({error!r})", "Restore it from a copy") from error


def merge(
    arms: Sequence[Arm], verdicts: Sequence[ProposalVerdict], mode: str, standing: Sequence[Setting]
) -> tuple[Arm, ...]:
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
