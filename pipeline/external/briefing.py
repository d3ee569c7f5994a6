"""What a proposer is sent: numbers that were parsed here and words that were looked up here, never a text that was copied. Pure.

A trial writes logs, manifests, tracebacks and answers, and a text among them may be addressed to whoever reads it. Nobody here does:
each value is made anew from an integer, a ratio, or a word of a closed list; what is neither is left out, and an exit class that is on
no list is `other`. Printed board scores are not sent, but for the one that the ladder told (Blum and Hardt 1502.04585).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import isqrt
from typing import Any

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import NUM_ARMS, ROLES, Arm, Axis, Policy, Setting
from pipeline.decision.proposal_gate import MAX_HYPOTHESIS, plain_number

ARM_NAMES = ("reference", *(f"a{index}" for index in range(NUM_ARMS)))
STATUSES = ("completed", "failed", "absent")
SETS = ("dev", "fresh")
BASELINES = ("reference", "standing", "control")
STATES = ("UNPROVEN", "TRUSTED", "SUSPECT", "REVERSED-overfit", "REVERSED-shift", "RESTORED")
EXTERNALS = ("EXTERNAL-CLEAR", "EXTERNAL-SUSPECT")
EXIT_CLASSES = (
    "completed", "never_started", "unfinished", "integrity", "configuration", "data", "diverged", "out_of_memory", "killed",
    "crashed", "stalled", "timeout", "disk_limit", "bad_output", "contaminated", "judge_failed", "no_progress", "interrupted",
    "refused", "failed",
)  # fmt: skip
OTHER = "other"
_RATIO = re.compile(r"-?[0-9]{1,60}(/[0-9]{1,60})?")
_MARKS = re.compile(r"[01T]{1,100000}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
INSTRUCTIONS = (
    "You propose what the next round of a post-training campaign tries. A round trains arms that each move one setting of the standing recipe; "
    "an arm's lift over its baseline on fresh items decides. The user's message is one JSON object of numbers and enumerated words: earlier "
    "rounds (lifts and their standard errors in hundredths of a percentage point; right, truncated and all items of each family), the state "
    "of each family's dev score, the standing recipe, dead ends, axes, and the open keys with their ranges and the reference's values. Answer "
    'with one JSON object: {"proposals": [{"axis", "key", "value", "hypothesis"}]}, the most promising first, at most as many as `num_slots`. '
    "`key` is one of `open_keys`; `axis` is the name of the axis on that key, or a new lower-case name for a key that has none. `value` is a "
    "string: one of the key's choices, or a plain decimal in its range such as 0.002 (no exponent, no sign +, no leading zeros). Never propose "
    f"a dead end or what the standing recipe has. `hypothesis` says in at most {MAX_HYPOTHESIS} characters what is expected and why."
)


def request_of(
    round_number: int,
    num_slots: int,
    rounds: Sequence[tuple[Sequence[Arm], Mapping[str, Any]]],
    policy: Policy,
    reference: Mapping[str, str],
    families: Iterable[str],
    constitution: Constitution,
    external: str = "",
    ladder: str = "",
) -> dict[str, Any]:
    """The facts as canonical JSON has them: integers, and strings of closed lists or plain decimals.

    rounds: of each earlier round, first to newest, its arms as planned and its evidence as JSON (records.Evidence by seal.plain).
    reference: every open key that this recipe has, with its value there. families: those of the campaign's configuration.
    ladder: the best board score that may be told, "" for none. External's state and the families' come from the newest evidence.
    """
    known = sorted(name for name in families if _NAME.fullmatch(name))
    newest = rounds[-1][1] if rounds else {}
    opened = {
        key: {**rule, "reference": value}
        for key, rule in constitution.articles["2"]["keys"].items()
        if (value := _value(key, reference.get(key), constitution)) is not None
    }
    return {
        "schema": 1,
        "round": round_number,
        "num_slots": num_slots,
        "rounds": [_round(number, arms, seen, known, constitution) for number, (arms, seen) in enumerate(rounds, 1)],
        "families": {family: _word(_at(newest, "families", family, "name"), STATES, STATES[0]) for family in known},
        "external": _word(external or newest.get("external"), EXTERNALS, EXTERNALS[0]),
        "ladder": _decimal(ladder),
        "standing": _settings(policy.standing, constitution),
        "dead_ends": _settings(policy.dead_ends, constitution),
        "axes": [
            _axis(axis, constitution)
            for axis in policy.axes
            if axis.key in opened and axis.name not in policy.retired and _NAME.fullmatch(axis.name)
        ],
        "open_keys": opened,
    }


def _round(
    number: int, arms: Sequence[Arm], seen: Mapping[str, Any], families: Sequence[str], constitution: Constitution
) -> dict[str, Any]:
    """One earlier round: each arm with the setting that it moved, how it ended, its lifts and its counts."""
    planned = {arm.name: arm for arm in arms}
    outcomes = {each.get("arm"): each for each in _dicts(seen.get("outcomes"))}
    told = []
    for name in ARM_NAMES:
        outcome = outcomes.get(name)
        if outcome is None:
            continue
        arm = planned.get(name)
        moved = _settings(arm.overrides[-1:], constitution) if arm and arm.role in ("axis", "contrast") else []
        told.append(
            {
                "arm": name,
                "role": _word(arm.role if arm else "reference", ROLES, OTHER),
                "moved": moved,
                "status": _word(outcome.get("status"), STATUSES, "failed"),
                "exit_class": exit_class(outcome.get("exit_class")),
                "right": {item_set: _counts(outcome, item_set, families) for item_set in SETS},
                "lifts": [
                    lift for each in _dicts(seen.get("lifts")) if each.get("arm") == name for lift in _lift(each)
                ],
            }
        )
    return {"round": number, "seed_error": _root(_ratio(seen.get("seed_variance"))), "arms": told}


def exit_class(text: Any) -> str:
    """A word of EXIT_CLASSES, by what stands before a colon; anything else is `other`."""
    return _word(text.partition(":")[0] if isinstance(text, str) else text, EXIT_CLASSES, OTHER)


def _lift(each: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[] for one that is not whole."""
    mean, variance, size = _ratio(each.get("mean")), _ratio(each.get("variance")), each.get("num_items")
    if mean is None or variance is None or type(size) is not int:
        return []
    baseline, item_set = (
        _word(each.get(name), words, "") for name, words in (("baseline", BASELINES), ("item_set", SETS))
    )
    if not baseline or not item_set:
        return []
    return [
        {"baseline": baseline, "set": item_set, "items": size, "lift": round(mean * 10_000), "error": _root(variance)}
    ]


def _counts(outcome: Mapping[str, Any], item_set: str, families: Sequence[str]) -> dict[str, list[int]]:
    """Family -> [right, truncated, items], of those whose marks are marks."""
    marks = {family: _at(outcome, "outcomes", item_set, family) for family in families}
    return {
        family: [text.count("1"), text.count("T"), len(text)]
        for family, text in marks.items()
        if isinstance(text, str) and _MARKS.fullmatch(text)
    }


def _settings(settings: Iterable[Setting], constitution: Constitution) -> list[dict[str, str]]:
    """Those under an open key whose value is one of its choices or a number."""
    values = [(key, _value(key, value, constitution)) for key, value in settings]
    return [{"key": key, "value": value} for key, value in values if value is not None]


def _value(key: str, value: Any, constitution: Constitution) -> str | None:
    rule = constitution.articles["2"]["keys"].get(key)
    if rule is None or not isinstance(value, str):
        return None
    if rule["type"] == "choice":
        return value if value in rule["choices"] else None
    return _decimal(value) or None


def _axis(axis: Axis, constitution: Constitution) -> dict[str, Any]:
    """With the range that a person chose, or the choices."""
    choices = [value for each in axis.choices if (value := _value(axis.key, each, constitution)) is not None]
    bounds = {"choices": choices} if choices else {"low": _decimal(axis.low), "high": _decimal(axis.high)}
    return {"name": axis.name, "key": axis.key, **bounds}


def _decimal(text: Any) -> str:
    """One spelling of a number, whatever a configuration wrote (4e-3, 1.0); "" for what is none."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,12})?([eE][+-]?[0-9]{1,2})?", text):
        return ""
    value = Fraction(text)
    scaled = round(value * 10**12)
    digits = f"{scaled // 10**12}.{scaled % 10**12:012d}"
    return plain_number(digits) if len(digits) <= 25 else ""


def _ratio(text: Any) -> Fraction | None:
    """Of "p/q" or an integer, also where canonical JSON kept one as such."""
    if not isinstance(text, str) or not _RATIO.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    return Fraction(int(numerator), int(denominator or "1")) if int(denominator or "1") else None


def _root(variance: Fraction | None) -> int:
    """Standard error in hundredths of a percentage point, rounded down; 0 where there is none."""
    return 0 if variance is None or variance < 0 else isqrt(int(variance * 10**8))


def _word(text: Any, words: Sequence[str], otherwise: str) -> str:
    """The list's own string, never the one that came."""
    return next((word for word in words if isinstance(text, str) and word == text), otherwise)


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list | tuple) else []


def _at(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
