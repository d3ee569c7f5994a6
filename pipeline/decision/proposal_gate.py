"""What an outsider proposes, against the constitution: the bytes of an answer in, one verdict a proposal out. Pure.

    {"proposals": [{"axis": "learning_rate", "key": "recipe.learning_rate", "value": "0.002", "hypothesis": "..."}]}

A proposal comes from a language model or an optimiser, and is trusted as little as a trial. Its bytes are capped before they are
parsed and parsed strictly; names have one spelling; every value passes the allow-list of article 2 in one canonical form, so that
what was tried cannot come back as another spelling of itself. The same bytes give the same verdicts anywhere: nothing here depends
on a version of Unicode, on time or on what else the process did. Codes: `CODES`, explained in docs/proposals.md.
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

MAX_ANSWER_BYTES = 1 << 20
MAX_BYTES = 65_536
MAX_DEPTH = 8
MAX_PROPOSALS = 7  # article 14's, by which answers are judged; this one stands in the schema that is sent
MAX_HYPOTHESIS = 400  # characters
MAX_NAME, MAX_VALUE = 80, 64
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
"""Each reason code and the number of its article."""
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
"""The JSON schema that a model is held to; what it sends is checked here all the same."""
_NAME = re.compile(r"[A-Za-z0-9_.]+")
_AXIS = re.compile(r"[a-z][a-z0-9_]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,11})(\.[0-9]{1,12})?")  # no leading zero: YAML reads 010 as eight
_UNPRINTABLE = re.compile(  # controls, surrogates, and what hides, joins or turns around the text beside it
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BUDGET = re.compile(
    r"recipe\.(num_steps|(micro_)?batch_size|sequence_length|checkpoint_every)|tasks\.(num_.*|max_new_tokens)"
    r"|(campaign|cluster|parallelism|budgets?)(\..*)?|.*(gpu_hours|rounds|submissions|num_arms|arms_per_round)"
)
_THRESHOLD = re.compile(
    r"(articles?|constitution|critical|nulls)(\..*)?|(.*\.)?z|.*(_level|quorum|thresholds?|scored_arms|replicates.*)"
)
_HYDRA = re.compile(r"(.*\.)?_[a-z]+_(\..*)?|(hydra|defaults)(\..*)?")
Fits = Callable[[tuple[Setting, ...]], str]
"""A whole arm's settings -> "" where they make a configuration, else why not: what the types and cross-rules of a recipe say."""


@dataclass(frozen=True)
class ProposalVerdict:
    """On one proposal (`slot` from 1), or on the whole answer (`slot` 0, then there is no other).

    `code` is "" where it is accepted; `setting` is None where it is refused, but for `does_not_fit`. `what` quotes nothing of the answer but
    names and values in plain characters.
    """

    slot: int
    accepted: bool
    axis: str = ""
    setting: Setting | None = None
    article: str = ""
    code: str = ""
    what: str = ""

    def to_json(self) -> dict[str, Any]:
        """{slot, accepted, axis, key, value} and, of a refused one, {article, code, what}: for the sealed log."""
        key, value = self.setting or ("", "")
        data = {"slot": self.slot, "accepted": self.accepted, "axis": self.axis, "key": key, "value": value}
        return data if self.accepted else {**data, "article": self.article, "code": self.code, "what": self.what}


class _No(Exception):
    """Ends the reading of one proposal, or of all; never leaves this module."""

    def __init__(self, code: str, what: str) -> None:
        self.code, self.what = code, what


def judge_answer(
    answer: bytes,
    policy: Policy,
    reference: Mapping[str, str],
    constitution: Constitution,
    fits: Fits = lambda settings: "",
) -> tuple[ProposalVerdict, ...]:
    """A verdict for each proposal in the answer's order; one verdict of slot 0 where the answer is none.

    reference: every open key that this campaign's recipe has, with its value there.
    """
    try:
        proposals = parse_proposals(answer, int(constitution.articles["14"]["most_proposals"]))
    except _No as no:
        return (refused(0, no.code, no.what),)
    verdicts: list[ProposalVerdict] = []
    for slot, proposal in enumerate(proposals, start=1):
        earlier = {verdict.setting for verdict in verdicts if verdict.accepted}
        try:
            axis, setting = _checked(proposal, policy, reference, constitution)
            if setting in earlier:
                raise _No("repeated", f"{setting[0]} = {setting[1]} was proposed before in this answer")
            if any(
                (axis == one.axis) != (setting[0] == one.setting[0]) for one in verdicts if one.accepted and one.setting
            ):
                raise _No("wrong_axis", f"{axis} or {setting[0]} has another partner in this answer")
            if fits(with_setting(policy.standing, setting)):
                misfit = refused(slot, "does_not_fit", f"{setting[0]} = {setting[1]} makes no configuration")
                # Named, so that whoever replays it needs no configuration.
                verdicts.append(replace(misfit, axis=axis, setting=setting))
                continue
            verdicts.append(ProposalVerdict(slot, True, axis, setting))
        except _No as no:
            verdicts.append(refused(slot, no.code, no.what))
    return tuple(verdicts)


def refused(slot: int, code: str, what: str) -> ProposalVerdict:
    """A refusal with its code's article; a code of somebody else's (an endpoint's) is article 14's."""
    return ProposalVerdict(slot, False, article=CODES.get(code, "14"), code=code, what=what)


def content_of(envelope: bytes, max_bytes: int) -> bytes:
    """What the model wrote, out of the envelope of /v1/chat/completions; an empty text where it wrote none or there is no envelope.

    Never raises: what is no envelope has no content, and `judge` refuses that.
    """
    try:
        message = strict(envelope, max_bytes, max_depth=32)["choices"][0]["message"]["content"]
        return message.encode() if isinstance(message, str) else b""
    except (_No, KeyError, IndexError, TypeError, UnicodeEncodeError):
        return b""


def strict(data: bytes, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Strict JSON. A number's value is not kept: no field may hold one."""
    try:
        return strict_json.read(data, max_bytes=max_bytes, max_depth=max_depth, numbers=strict_json.Numbers.UNREAD)
    except strict_json.BadJson as bad:  # the parser's own words are another version's tomorrow
        raise _No(bad.code, "the answer is no JSON" if bad.code == "not_json" else bad.what) from None


def parse_proposals(answer: bytes, most: int = MAX_PROPOSALS) -> list[Any]:
    """The list of proposals, each not looked at yet."""
    if not answer.strip():
        raise _No("no_content", "the answer holds no text")
    found = strict(answer)
    if not isinstance(found, dict) or set(found) != {"proposals"} or not isinstance(found["proposals"], list):
        raise _No("wrong_shape", 'the answer is not {"proposals": [...]} alone')
    if len(found["proposals"]) > most:
        raise _No("too_many", f"{len(found['proposals'])} proposals; at most {most} are read")
    return found["proposals"]


def plain_number(text: str) -> str:
    """One spelling a number: 0.0100 -> 0.01, -0 -> 0. Raises ValueError for what is no plain decimal: 1e-3, +1, 0x10, 007, 1_0."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:MAX_VALUE]!a} is no plain decimal")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def same_setting(key: str, one: str, other: str, numeric: bool) -> bool:
    """Equal as numbers where the key holds one (a configuration may write 4e-3 for 0.004), else as text."""
    try:
        return Decimal(one) == Decimal(other) if numeric else one == other
    except ArithmeticError:
        return one == other


def _checked(
    proposal: Any, policy: Policy, reference: Mapping[str, str], constitution: Constitution
) -> tuple[str, Setting]:
    """Axis and canonical setting of one proposal."""
    axis, key, value = _fields(proposal)
    _open_key(key, reference, constitution)
    if "${" in value or "{{" in value:
        raise _No("resolver", "the value asks for another one's")
    if not (value.isascii() and value.isprintable() and len(value) <= MAX_VALUE):
        raise _No("not_plain", f"the value is not plain ASCII of at most {MAX_VALUE} characters")
    _check_axis(axis, key, policy)
    numeric = constitution.articles["2"]["keys"][key]["type"] != "choice"
    if numeric:
        try:
            value = plain_number(value)
        except ValueError:
            raise _No("not_a_number", f"{key} = {value!r} is no plain decimal") from None
    try:
        constitution.check_settings([(key, value)])
    except Refused as error:
        raise _No(error.code, error.what.partition("): ")[2]) from None
    if same_setting(key, value, {**reference, **dict(policy.standing)}[key], numeric):
        raise _No("unchanged", f"{key} = {value} is what the standing recipe has")
    if any(key == dead and same_setting(key, value, at, numeric) for dead, at in policy.dead_ends):
        raise _No("dead_end", f"{key} = {value} is a dead end")
    return axis, (key, value)


def _fields(proposal: Any) -> tuple[str, str, str]:
    """Axis, key and value as text; the hypothesis is looked at and left where it is."""
    if not isinstance(proposal, dict):
        raise _No("wrong_shape", "a proposal is an object")
    missing = [name for name in FIELDS if name not in proposal]
    if missing:
        raise _No("missing_field", f"it lacks {', '.join(missing)}")
    if len(proposal) > len(FIELDS):
        raise _No("unknown_field", f"it has {len(proposal) - len(FIELDS)} fields beside {', '.join(FIELDS)}")
    wrong = [name for name in FIELDS if not isinstance(proposal[name], str)]
    if wrong:
        raise _No("wrong_type", f"{', '.join(wrong)} must be a string")
    for name in ("axis", "key"):
        if not (len(proposal[name]) <= MAX_NAME and _NAME.fullmatch(proposal[name])):
            raise _No(
                "not_plain", f"{name} is not letters, digits, _ and . of ASCII alone, at most {MAX_NAME} characters"
            )
    if len(proposal["hypothesis"]) > MAX_HYPOTHESIS or _UNPRINTABLE.search(proposal["hypothesis"]):
        raise _No(
            "bad_text", f"the hypothesis is longer than {MAX_HYPOTHESIS} characters or does not print as it reads"
        )
    return proposal["axis"], proposal["key"], proposal["value"]


def _open_key(key: str, reference: Mapping[str, str], constitution: Constitution) -> None:
    """The constitution says what is open; a closed key that someone would want to open has a code of its own."""
    if key in constitution.articles["2"]["keys"]:
        if key not in reference:
            raise _No("absent_key", f"{key} is no key of this campaign's recipe")
        return
    for code, pattern, what in (
        ("instantiation", _HYDRA, "would have Hydra make an object"),
        ("budget", _BUDGET, "is what a round spends"),
        ("threshold", _THRESHOLD, "is what a round is judged by"),
    ):
        if pattern.fullmatch(key):
            raise _No(code, f"{key} {what}")
    raise _No("closed_key", f"{key} may not change between rounds")


def _check_axis(axis: str, key: str, policy: Policy) -> None:
    """An axis has one key and a key one axis; a key that has none yet is an axis by its own last name."""
    by_key = next((each.name for each in policy.axes if each.key == key), None)
    taken = any(each.name == axis for each in policy.axes)
    if by_key is None and taken or by_key not in (None, axis) or not _AXIS.fullmatch(axis):
        raise _No("wrong_axis", f"{axis} is not the name of an axis on {key}")
    if axis in policy.retired:
        raise _No("retired", f"{axis} gained nothing in its last looks and is retired")
