"""The gate: judge a proposer's answer against the constitution. The bytes of an answer go in, one verdict per proposal comes out.

    {"proposals": [{"axis": "learning_rate", "key": "recipe.learning_rate", "value": "0.002", "hypothesis": "..."}]}

A proposal comes from a language model or an optimizer and is trusted as little as a trial. The gate limits the answer's size before it
parses it, and parses strictly. Names have one spelling, and every value passes the allow-list of article 2 in one canonical form, so a
setting that was tried cannot return in another spelling. The same bytes give the same verdicts everywhere: the functions are pure and
depend on no version of Unicode. `CODES` lists the reason codes; docs/proposals.md explains them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import Refused
from pipeline.campaign.records import Policy, Setting, with_setting

MAX_BYTES = 65_536
MAX_DEPTH = 8
MAX_PROPOSALS = 7  # in the schema that is sent; article 14 has the number by which answers are judged
MAX_HYPOTHESIS = 400  # characters
MAX_NAME, MAX_VALUE = 80, 96
CODES: Mapping[str, str] = {
    # the whole answer
    "too_large": "14", "not_utf8": "14", "too_deep": "14", "not_json": "14", "duplicate_key": "14", "not_finite": "14",
    "no_content": "14", "wrong_shape": "14", "too_many": "14",
    # one proposal
    "missing_field": "14", "unknown_field": "14", "wrong_type": "14", "not_plain": "14", "bad_text": "14",
    "instantiation": "2", "resolver": "2", "budget": "4", "threshold": "7", "closed_key": "2", "absent_key": "2",
    "wrong_axis": "14", "not_a_choice": "2", "not_a_number": "2", "out_of_range": "2", "does_not_fit": "14",
    "unchanged": "14", "dead_end": "8", "repeated": "14", "retired": "11",
}  # fmt: skip
"""Reason code -> number of its article."""
FIELDS = ("axis", "key", "value", "hypothesis")
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["proposals"],
    "properties": {
        "proposals": {
            "type": "array",
            "maxItems": MAX_PROPOSALS,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": list(FIELDS),
                "properties": {name: {"type": "string"} for name in FIELDS},
            },
        }
    },
}
"""The JSON schema that is sent to a model. The gate checks its answer all the same."""
_NAME = re.compile(r"[A-Za-z0-9_.]+")
_AXIS = re.compile(r"[a-z][a-z0-9_]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,11})(\.[0-9]{1,12})?")  # no leading zero: YAML reads 010 as eight
_UNPRINTABLE = re.compile(  # controls, surrogates, and characters that hide, join or reverse the text beside them
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BUDGET = re.compile(
    r"recipe\.(num_steps|batch_size|micro_batch_tokens|sequence_length|checkpoint_every)|tasks\.(num_.*|max_new_tokens)"
    r"|(campaign|cluster|parallelism|budgets?)(\..*)?|.*(gpu_hours|rounds|submissions|num_arms|arms_per_round)"
)
_THRESHOLD = re.compile(
    r"(articles?|constitution|critical|nulls)(\..*)?|(.*\.)?z|.*(_level|quorum|thresholds?|scored_arms|replicates.*)"
)
_HYDRA = re.compile(r"(.*\.)?_[a-z]+_(\..*)?|(hydra|defaults)(\..*)?")
Fits = Callable[[tuple[Setting, ...]], str]
"""A function that says why an arm's settings do not make a valid configuration, "" where they do."""


@dataclass(frozen=True)
class ProposalVerdict:
    """The verdict on one proposal (`slot` from 1) or on the whole answer (`slot` 0, and then the only one).

    `code` is "" for an accepted proposal. `setting` is None for a refused one, except with the code `does_not_fit`. `what` quotes nothing
    of the answer but names and values in plain characters.
    """

    slot: int
    accepted: bool
    axis: str = ""
    setting: Setting | None = None
    article: str = ""
    code: str = ""
    what: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return {slot, accepted, axis, key, value} for the sealed log, and of a refused proposal also {article, code, what}."""
        key, value = self.setting or ("", "")
        data = {"slot": self.slot, "accepted": self.accepted, "axis": self.axis, "key": key, "value": value}
        return data if self.accepted else {**data, "article": self.article, "code": self.code, "what": self.what}


class _Refusal(Exception):
    """Ends the judging of one proposal, or of the whole answer; it never leaves this module."""

    def __init__(self, code: str, what: str) -> None:
        self.code, self.what = code, what


def judge_answer(
    answer: bytes,
    policy: Policy,
    reference: Mapping[str, str],
    constitution: Constitution,
    fits: Fits = lambda settings: "",
) -> tuple[ProposalVerdict, ...]:
    """Return a verdict for each proposal in the answer's order, or one verdict of slot 0 where the whole answer is refused.

    policy: this round's axes, standing recipe, dead ends and retired axes. reference: the reference recipe's value of every open key that
    it has. Never raises for a bad answer.
    """
    try:
        proposals = parse_proposals(answer, int(constitution.articles["14"]["most_proposals"]))
    except _Refusal as refusal:
        return (refused(0, refusal.code, refusal.what),)
    verdicts: list[ProposalVerdict] = []
    for slot, proposal in enumerate(proposals, start=1):
        earlier = {verdict.setting for verdict in verdicts if verdict.accepted}
        try:
            axis, setting = _checked(proposal, policy, reference, constitution)
            if setting in earlier:
                raise _Refusal("repeated", f"{setting[0]} = {setting[1]} was proposed before in this answer")
            if any(
                (axis == other.axis) != (setting[0] == other.setting[0])
                for other in verdicts
                if other.accepted and other.setting
            ):
                raise _Refusal("wrong_axis", f"{axis} or {setting[0]} has another partner in this answer")
            if fits(with_setting(policy.standing, setting)):
                misfit = refused(slot, "does_not_fit", f"{setting[0]} = {setting[1]} makes no configuration")
                # The verdict names the setting, so that an audit can replay it without a configuration.
                verdicts.append(replace(misfit, axis=axis, setting=setting))
                continue
            verdicts.append(ProposalVerdict(slot, True, axis, setting))
        except _Refusal as refusal:
            verdicts.append(refused(slot, refusal.code, refusal.what))
    return tuple(verdicts)


def refused(slot: int, code: str, what: str) -> ProposalVerdict:
    """Return the verdict that refuses a proposal. A code that is not in CODES, such as an endpoint's, belongs to article 14."""
    return ProposalVerdict(slot, False, article=CODES.get(code, "14"), code=code, what=what)


def content_of(envelope: bytes, max_bytes: int) -> bytes:
    """Return the model's text from an answer of /v1/chat/completions; b"" where there is none.

    Never raises: `judge_answer` refuses an empty text.
    """
    try:
        message = strict(envelope, max_bytes, max_depth=32)["choices"][0]["message"]["content"]
        return message.encode() if isinstance(message, str) else b""
    except (_Refusal, KeyError, IndexError, TypeError, UnicodeEncodeError):
        return b""


def strict(data: bytes, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Parse strict JSON without the values of numbers, because no field may hold one. Raises _Refusal."""
    try:
        return strict_json.read(data, max_bytes=max_bytes, max_depth=max_depth, numbers=strict_json.Numbers.UNREAD)
    except strict_json.BadJson as bad:  # the parser's message differs between versions of Python
        raise _Refusal(bad.code, "the answer is no JSON" if bad.code == "not_json" else bad.what) from None


def parse_proposals(answer: bytes, most: int = MAX_PROPOSALS) -> list[Any]:
    """Return the list of proposals, whose content is not checked yet. Raises _Refusal where the answer as a whole is bad."""
    if not answer.strip():
        raise _Refusal("no_content", "the answer holds no text")
    content = strict(answer)
    if not isinstance(content, dict) or set(content) != {"proposals"} or not isinstance(content["proposals"], list):
        raise _Refusal("wrong_shape", 'the answer is not {"proposals": [...]} alone')
    if len(content["proposals"]) > most:
        raise _Refusal("too_many", f"{len(content['proposals'])} proposals; at most {most} are read")
    return content["proposals"]


def plain_number(text: str) -> str:
    """Return a number's one spelling: 0.0100 as 0.01, -0 as 0. Raises ValueError unless it is a plain decimal, as 1e-3, +1 or 007."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:MAX_VALUE]!a} is no plain decimal")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def same_value(first: str, second: str, numeric: bool) -> bool:
    """Whether two values are equal: as numbers where `numeric` (a configuration may write 4e-3 for 0.004), else as text."""
    try:
        return Decimal(first) == Decimal(second) if numeric else first == second
    except ArithmeticError:
        return first == second


def _checked(
    proposal: Any, policy: Policy, reference: Mapping[str, str], constitution: Constitution
) -> tuple[str, Setting]:
    """Return the axis and the canonical setting of one proposal. Raises _Refusal."""
    axis, key, value = _fields(proposal)
    _check_open(key, reference, constitution)
    if "${" in value or "{{" in value:
        raise _Refusal("resolver", "the value asks for another one's")
    if not (value.isascii() and value.isprintable() and len(value) <= MAX_VALUE):
        raise _Refusal("not_plain", f"the value is not plain ASCII of at most {MAX_VALUE} characters")
    _check_axis(axis, key, policy)
    numeric = constitution.articles["2"]["keys"][key]["type"] != "choice"
    if numeric:
        try:
            value = plain_number(value)
        except ValueError:
            raise _Refusal("not_a_number", f"{key} = {value!r} is no plain decimal") from None
    try:
        constitution.check_settings([(key, value)])
    except Refused as error:
        raise _Refusal(error.code, error.what.partition("): ")[2]) from None
    if same_value(value, {**reference, **dict(policy.standing)}[key], numeric):
        raise _Refusal("unchanged", f"{key} = {value} is what the standing recipe has")
    if any(key == dead_key and same_value(value, dead, numeric) for dead_key, dead in policy.dead_ends):
        raise _Refusal("dead_end", f"{key} = {value} is a dead end")
    return axis, (key, value)


def _fields(proposal: Any) -> tuple[str, str, str]:
    """Return axis, key and value as text. The hypothesis is checked and not returned."""
    if not isinstance(proposal, dict):
        raise _Refusal("wrong_shape", "a proposal is an object")
    missing = [name for name in FIELDS if name not in proposal]
    if missing:
        raise _Refusal("missing_field", f"it lacks {', '.join(missing)}")
    if len(proposal) > len(FIELDS):
        raise _Refusal("unknown_field", f"it has {len(proposal) - len(FIELDS)} fields beside {', '.join(FIELDS)}")
    wrong = [name for name in FIELDS if not isinstance(proposal[name], str)]
    if wrong:
        raise _Refusal("wrong_type", f"{', '.join(wrong)} must be a string")
    for name in ("axis", "key"):
        if not (len(proposal[name]) <= MAX_NAME and _NAME.fullmatch(proposal[name])):
            raise _Refusal(
                "not_plain", f"{name} is not letters, digits, _ and . of ASCII alone, at most {MAX_NAME} characters"
            )
    if len(proposal["hypothesis"]) > MAX_HYPOTHESIS or _UNPRINTABLE.search(proposal["hypothesis"]):
        raise _Refusal(
            "bad_text", f"the hypothesis is longer than {MAX_HYPOTHESIS} characters or does not print as it reads"
        )
    return proposal["axis"], proposal["key"], proposal["value"]


def _check_open(key: str, reference: Mapping[str, str], constitution: Constitution) -> None:
    """Raise _Refusal unless article 2 opens the key and the recipe has it. Dangerous kinds of closed keys have their own codes."""
    if key in constitution.articles["2"]["keys"]:
        if key not in reference:
            raise _Refusal("absent_key", f"{key} is no key of this campaign's recipe")
        return
    for code, pattern, what in (
        ("instantiation", _HYDRA, "would have Hydra make an object"),
        ("budget", _BUDGET, "is what a round spends"),
        ("threshold", _THRESHOLD, "is what a round is judged by"),
    ):
        if pattern.fullmatch(key):
            raise _Refusal(code, f"{key} {what}")
    raise _Refusal("closed_key", f"{key} may not change between rounds")


def _check_axis(axis: str, key: str, policy: Policy) -> None:
    """Raise _Refusal unless `axis` names the key's axis, or a new axis for a key without one, and is not retired."""
    by_key = next((known.name for known in policy.axes if known.key == key), None)
    taken = any(known.name == axis for known in policy.axes)
    if by_key is None and taken or by_key not in (None, axis) or not _AXIS.fullmatch(axis):
        raise _Refusal("wrong_axis", f"{axis} is not the name of an axis on {key}")
    if axis in policy.retired:
        raise _Refusal("retired", f"{axis} gained nothing in its last looks and is retired")
