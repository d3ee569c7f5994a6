"""Judge stored proposals again, and place accepted ones among the arms of the plan. The functions are pure; `external.propose` asks the proposer.

    rounds/r0003/proposals/00.request.json   the request that was sent        00.response.json   the answer, byte for byte

The arms of the deterministic plan come first; in mode `active` an accepted proposal replaces an axis arm, in order. The sealed log has
the digests, every verdict (`proposal`) and a `refusal` for each proposal that was refused. A request in the log is not sent again: its
answer is judged again from the stored bytes, with the same verdicts. A proposer that fails costs a round nothing.
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
    """One request of a round and the verdicts on its answer. `response_digest` is an empty string where no answer came."""

    number: int
    request_digest: str
    response_digest: str
    verdicts: tuple[ProposalVerdict, ...]


def content_of(kind: str, answer: bytes) -> bytes:
    """The proposals' own bytes. A model's are inside its endpoint's JSON envelope; an optimizer's are the whole answer."""
    return proposal_gate.content_of(answer, MAX_ANSWER_BYTES) if kind == "llm" else answer


def rejudged(
    record: Mapping[str, Any],
    request: bytes,
    answer: bytes,
    policy: Policy,
    constitution: Constitution,
) -> Proposed:
    """Judge again the answer of a `proposal` record, from the stored bytes of request and answer.

    Whether a recipe fits the configuration is taken from the record. This can only refuse a proposal, never accept one. Raises
    IntegrityError where the verdicts are not those of the record.
    """
    misfits = [(past["key"], past["value"]) for past in record["verdicts"] if past.get("code") == "does_not_fit"]

    def fits(settings: tuple[Setting, ...]) -> str:
        return "as recorded" if settings[-1] in misfits else ""

    if record["response_digest"]:
        reference = reference_of(request)
        verdicts = proposal_gate.judge_answer(
            content_of(record["policy"], answer), policy, reference, constitution, fits
        )
    else:
        verdicts = tuple(proposal_gate.refused(past["slot"], past["code"], past["what"]) for past in record["verdicts"])
    if [verdict.to_json() for verdict in verdicts] != record["verdicts"] or (
        not record["response_digest"] and any(verdict.accepted for verdict in verdicts)
    ):
        raise IntegrityError(
            f"The answer {record['response_digest'][:16]} of {record['round']} gets other verdicts than the log has",
            "The stored bytes, the policy or the constitution were changed: restore them from a copy",
        )
    return Proposed(record["number"], record["request_digest"], record["response_digest"], verdicts)


def reference_of(request: bytes) -> dict[str, str]:
    """The values of the recipe's open keys in a stored request, with which an audit judges. Raises IntegrityError where it is no request."""
    try:
        facts = strict_json.read(request)
        if "messages" in facts:
            facts = strict_json.read(facts["messages"][-1]["content"].encode())
        return {key: rule["reference"] for key, rule in facts["open_keys"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise IntegrityError(
            f"A stored request to a proposer is not valid ({error!r})", "Restore it from a copy"
        ) from error


def merge(
    arms: Sequence[Arm], verdicts: Sequence[ProposalVerdict], mode: str, standing: Sequence[Setting]
) -> tuple[Arm, ...]:
    """The plan's arms, in which accepted proposals replace the axis arms in order if the mode is `active`.

    Anchor, replicates, contrasts, control and every seed stay the same. Where a proposal equals the setting of a later axis arm, that
    arm gets one of the settings that were displaced, so that nothing runs twice.
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
