"""Judge stored proposals again, and place accepted ones among the arms of the plan. The functions are pure; `external.propose` asks the proposer.

    rounds/r0003/proposals/00.request.json   the request that was sent        00.response.json   the answer, byte for byte

The arms of the deterministic plan come first; in mode `active` an accepted proposal replaces an axis arm, in order. The sealed log has
the digests, every verdict (`proposal`) and a `refusal` for each proposal that was refused. A request in the log is not sent again: its
answer is judged again from the stored bytes, with the same verdicts. A proposer that fails costs a round nothing.

A `proposal` record names the reading (`READING`) by which a model's text was taken out of its endpoint's envelope, and an audit takes the
same one. The first reading, that of records without the field, gave one and the same empty text for whatever held none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Arm, Policy, Setting, with_setting
from pipeline.decision import proposal_gate
from pipeline.decision.proposal_gate import ProposalVerdict
from pipeline.model_calls.failures import MAX_ANSWER_BYTES, named_in

READING = 2
"""How a model's text is taken out of its envelope now."""
ANSWER_CODES: Mapping[str, str] = {
    "answer_page": "Set policy.proposals.url to the API's own address; a login page or proxy may stand before it",
    "answer_stream": "Start a new campaign with +policy.proposals.add.stream=false, or use an endpoint that does not stream",
    "answer_other": "Set policy.proposals.url to an address of /v1/chat/completions, in the interface of OpenAI",
    "answer_error": "Leave the named parameter out with policy.proposals.leave_out, or look into the endpoint's own log",
    "answer_no_choice": "Ask again in the next round; if it stays so, look into the endpoint's own log",
    "answer_cut": "Give the model more tokens, such as +policy.proposals.add.max_completion_tokens=16000 in a new campaign",
    "answer_declined": "Use another model: this one will not answer the request",
    "answer_filtered": "Use another endpoint or model, or have its content filter changed",
    "answer_tool_call": "Use an endpoint without tools of its own, or +policy.proposals.add.tool_choice=none in a new campaign",
    "answer_only_reasoning": "Give the model more tokens, or have its server tell reasoning and answer apart (its reasoning parser)",
    "answer_empty": "Ask again in the next round; if it stays so, use another model",
    "answer_part": "Use a model that answers with text alone",
    "answer_prose": "Use a model or server that keeps to response_format, or another model",
    "answer_around": "Use a model or server that keeps to response_format, or another model",
}  # fmt: skip
"""Code of an answer that holds no text to judge -> its cure. The codes are stable, and belong to article 14 (docs/proposals.md)."""
_FENCE = re.compile(r"```[A-Za-z]*\s(.*?)```", re.DOTALL)
_ENDED = {
    "length": "answer_cut",
    "max_tokens": "answer_cut",
    "content_filter": "answer_filtered",
    "refusal": "answer_declined",
}
_WORDS = {
    "answer_cut": "the model used up its tokens before its answer was whole",
    "answer_filtered": "the endpoint's content filter took the answer away",
    "answer_declined": "the model declined to answer",
}


@dataclass(frozen=True)
class Proposed:
    """One request of a round and the verdicts on its answer. `response_digest` is an empty string where no answer came."""

    number: int
    request_digest: str
    response_digest: str
    verdicts: tuple[ProposalVerdict, ...]


class _NoText(Exception):
    """An answer holds no text that could be judged; it never leaves this module. `code` is one of ANSWER_CODES."""

    def __init__(self, code: str, what: str = "") -> None:
        self.code, self.what = code, what or _WORDS[code]


def judge(
    kind: str,
    reading: int,
    answer: bytes,
    policy: Policy,
    reference: Mapping[str, str],
    constitution: Constitution,
    fits: proposal_gate.Fits = lambda settings: "",
) -> tuple[ProposalVerdict, ...]:
    """Return the gate's verdicts on an answer, or one verdict of slot 0 that says why it holds no text. Never raises for a bad answer.

    kind: llm, whose text is inside its endpoint's JSON envelope, or optuna, whose answer is the text. reading: 1 to READING.
    """
    content = answer
    if kind == "llm" and reading == 1:
        content = proposal_gate.content_of(answer, MAX_ANSWER_BYTES)
    elif kind == "llm":
        try:
            content = text_of(answer)
        except _NoText as none:
            return (proposal_gate.refused(0, none.code, none.what),)
    return proposal_gate.judge_answer(content, policy, reference, constitution, fits)


def text_of(envelope: bytes) -> bytes:
    """Return the model's text from an answer of /v1/chat/completions, without a fence around it. Raises _NoText, which says what came."""
    data = envelope.removeprefix(b"\xef\xbb\xbf").strip()
    if data.startswith(b"<"):
        raise _NoText("answer_page", "the endpoint sent a web page")
    if re.match(rb"(data|event|id|retry)?:", data):
        raise _NoText("answer_stream", "the endpoint sent a stream of events, which nobody asked for")
    try:
        value = strict_json.read(data, max_bytes=MAX_ANSWER_BYTES, max_depth=32, numbers=strict_json.Numbers.UNREAD)
    except strict_json.BadJson as bad:
        raise _NoText("answer_other", f"what the endpoint sent is no JSON envelope ({bad.code})") from None
    choices = value.get("choices") if isinstance(value, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if isinstance(value, dict) and (_holds(value, "error") or _holds(choice, "error") or (
        choices is None and (_holds(value, "errors") or _holds(value, "detail") or value.get("object") == "error")
    )):  # fmt: skip
        raise _NoText("answer_error", f"the endpoint sent an error with status 200{named_in(data)}")
    if choices == []:
        raise _NoText("answer_no_choice", "the endpoint's list of choices is empty")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise _NoText("answer_other", "what the endpoint sent is no answer of /v1/chat/completions")
    ended = choice.get("finish_reason")
    at_end = _ENDED.get(ended, "") if isinstance(ended, str) else ""
    text = _joined(message.get("content"))
    if not text.strip():
        raise _without_text(message, at_end)
    return _unwrapped(text, at_end).encode("utf-8", "surrogatepass")


def _holds(value: Mapping[str, Any], name: str) -> bool:
    """Whether a field says anything. A number, which the reader gives as NotImplemented, does not."""
    return value.get(name) not in (None, False, "", [], {}, NotImplemented)


def _joined(content: Any) -> str:
    """Return a message's text, of which the endpoint may have made a list of parts; "" for what is neither. Raises _NoText."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else ("text", part)
        if kind in ("text", "output_text") and isinstance(text, str):
            texts.append(text)
        elif kind == "refusal":
            raise _NoText("answer_declined")
        elif kind not in ("reasoning", "thinking", "redacted_thinking"):
            raise _NoText("answer_part", "a part of the answer is no text")
    return "".join(texts)


def _without_text(message: Mapping[str, Any], at_end: str) -> _NoText:
    """Say why a message has no text, as far as the envelope shows it. at_end: the code of its finish_reason, or ""."""
    if _holds(message, "refusal"):
        return _NoText("answer_declined")
    if at_end:
        return _NoText(at_end)
    if _holds(message, "tool_calls") or _holds(message, "function_call"):
        return _NoText("answer_tool_call", "the model called a tool, which nobody gave it, and answered nothing")
    if _holds(message, "reasoning_content") or _holds(message, "reasoning"):
        return _NoText("answer_only_reasoning", "the model reasoned and then answered nothing")
    return _NoText("answer_empty", "the model answered nothing")


def _unwrapped(text: str, at_end: str) -> str:
    """Return the JSON of a text: the text itself, what follows its </think>, or its only fence. Raises _NoText where that is not clear."""
    text = text.strip().removeprefix("\ufeff").strip()
    if not _is_json(text) and text.count("</think>") == 1:
        text = text.partition("</think>")[2].strip()
    if _is_json(text):
        return text
    fences = _FENCE.findall(text)
    if len(fences) == 1 and text.count("```") == 2 and "{" not in _FENCE.sub("", text) and _is_json(fences[0]):
        return str(fences[0]).strip()
    if at_end:
        raise _NoText(at_end)
    if text.startswith("{"):
        return text  # the gate says that it is no JSON
    if "{" in text:
        raise _NoText("answer_around", "other text stands around the JSON, so it is not clear what the answer is")
    raise _NoText("answer_prose", "the model answered with prose and no JSON")


def _is_json(text: str) -> bool:
    """Whether a text is one JSON value; the gate says what is wrong with one that it must not hold."""
    try:
        strict_json.read(text.encode("utf-8", "surrogatepass"), numbers=strict_json.Numbers.UNREAD)
    except strict_json.BadJson as bad:
        return bad.code != "not_json"
    return True


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
        reading = record.get("reading", 1)
        if reading not in range(1, READING + 1):
            raise IntegrityError(
                f"The answer of {record['round']} was read in way {reading}", f"This version knows 1 to {READING}: take a newer one"
            )  # fmt: skip
        verdicts = judge(record["policy"], reading, answer, policy, reference_of(request), constitution, fits)
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
