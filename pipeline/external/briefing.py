"""Build the request for a proposer from parsed numbers and words of closed lists. It contains no text that a trial wrote.

A trial writes logs, data cards, tracebacks and answers, which may hold instructions to a language model. This module therefore copies
nothing. It makes each value from an integer, a ratio or a word of a closed list, leaves out everything else, and sends `other` for an
unknown exit class. It sends no board score except the ladder's (Blum and Hardt, arXiv:1502.04585). The functions are pure.
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
    "refused", "failed", "files_unreachable", "other_rules", "agent_watchdog", "agent_budget", "agent_gpu_seconds", "agent_closed_path",
    "agent_endpoint", "agent_malformed", "agent_no_adapter", "agent_contract", "more_steps",
)  # fmt: skip
OTHER = "other"
_RATIO = re.compile(r"-?[0-9]{1,60}(/[0-9]{1,60})?")
_MARKS = re.compile(r"[01T]{1,100000}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
INSTRUCTIONS = (
    "You propose what the next round of a post-training campaign tries. A round trains arms that each move one setting of the standing recipe; "
    "an arm's lift over its baseline on fresh items decides. The user's message is one JSON object of numbers and enumerated words: earlier "
    "rounds (lifts and their standard errors in hundredths of a percentage point; right, truncated and all items of each family), the state "
    "of each family's dev score, the standing recipe, dead ends, settings aside (one run suggests that they are worse; you may try them again), "
    "axes, and the open keys with their ranges and the reference's values. Answer "
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
    """Return the request's facts: integers, plain decimals as text, and words of closed lists.

    num_slots: how many proposals may be accepted. rounds: of each earlier round, oldest first, the planned arms and the evidence as JSON
    (`canonical.plain`). reference: the reference recipe's value of every open key that it has. families: the campaign's. external: the
    board's state, "" to take it from the newest evidence, as the families' states are. ladder: the best board score that may be told,
    "" for none.
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
        "rounds": [
            _round(number, arms, evidence, known, constitution) for number, (arms, evidence) in enumerate(rounds, 1)
        ],
        "families": {family: _word(_at(newest, "families", family, "name"), STATES, STATES[0]) for family in known},
        "external": _word(external or newest.get("external"), EXTERNALS, EXTERNALS[0]),
        "ladder": _decimal(ladder),
        "standing": _settings(policy.standing, constitution),
        "dead_ends": _settings(policy.dead_ends, constitution),
        "set_aside": _settings(policy.set_aside, constitution),
        "axes": [
            _axis(axis, constitution)
            for axis in policy.axes
            if axis.key in opened and axis.name not in policy.retired and _NAME.fullmatch(axis.name)
        ],
        "open_keys": opened,
    }


def _round(
    number: int, arms: Sequence[Arm], evidence: Mapping[str, Any], families: Sequence[str], constitution: Constitution
) -> dict[str, Any]:
    """Describe an earlier round: each arm with the setting that it moved, how it ended, its lifts and its counts.

    The score of an arm whose code an agent edited belongs to no setting, so none is named as moved (article 16).
    """
    planned = {arm.name: arm for arm in arms}
    outcomes = {outcome.get("arm"): outcome for outcome in _dicts(evidence.get("outcomes"))}
    described = []
    for name in ARM_NAMES:
        outcome = outcomes.get(name)
        if outcome is None:
            continue
        arm = planned.get(name)
        is_moved = arm and arm.role in ("axis", "contrast") and not outcome.get("edited")
        moved = _settings(arm.overrides[-1:], constitution) if arm and is_moved else []
        described.append(
            {
                "arm": name,
                "role": _word(arm.role if arm else "reference", ROLES, OTHER),
                "moved": moved,
                "status": _word(outcome.get("status"), STATUSES, "failed"),
                "exit_class": exit_class(outcome.get("exit_class")),
                "right": {item_set: _counts(outcome, item_set, families) for item_set in SETS},
                "lifts": [
                    entry for lift in _dicts(evidence.get("lifts")) if lift.get("arm") == name for entry in _lift(lift)
                ],
            }
        )
    return {"round": number, "seed_error": _root(_ratio(evidence.get("seed_variance"))), "arms": described}


def exit_class(text: Any) -> str:
    """Return the word of EXIT_CLASSES that equals the text before a colon; `other` for any other value."""
    return _word(text.partition(":")[0] if isinstance(text, str) else text, EXIT_CLASSES, OTHER)


def _lift(lift: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a list with the lift in hundredths of a percentage point; [] where a field is absent or invalid."""
    mean, variance, size = _ratio(lift.get("mean")), _ratio(lift.get("variance")), lift.get("num_items")
    if mean is None or variance is None or type(size) is not int:
        return []
    baseline, item_set = (
        _word(lift.get(name), words, "") for name, words in (("baseline", BASELINES), ("item_set", SETS))
    )
    if not baseline or not item_set:
        return []
    return [
        {"baseline": baseline, "set": item_set, "items": size, "lift": round(mean * 10_000), "error": _root(variance)}
    ]


def _counts(outcome: Mapping[str, Any], item_set: str, families: Sequence[str]) -> dict[str, list[int]]:
    """Map each family to [right, truncated, items]; leave out those whose outcome string is invalid."""
    marks = {family: _at(outcome, "outcomes", item_set, family) for family in families}
    return {
        family: [text.count("1"), text.count("T"), len(text)]
        for family, text in marks.items()
        if isinstance(text, str) and _MARKS.fullmatch(text)
    }


def _settings(settings: Iterable[Setting], constitution: Constitution) -> list[dict[str, str]]:
    """Return the settings whose key is open and whose value is valid there."""
    values = [(key, _value(key, value, constitution)) for key, value in settings]
    return [{"key": key, "value": value} for key, value in values if value is not None]


def _value(key: str, value: Any, constitution: Constitution) -> str | None:
    """Return a value as one of its key's choices or a plain decimal; None where the key is closed or the value neither."""
    rule = constitution.articles["2"]["keys"].get(key)
    if rule is None or not isinstance(value, str):
        return None
    if rule["type"] == "choice":
        return value if value in rule["choices"] else None
    return _decimal(value) or None


def _axis(axis: Axis, constitution: Constitution) -> dict[str, Any]:
    """Describe an axis with its range or its choices."""
    choices = [value for choice in axis.choices if (value := _value(axis.key, choice, constitution)) is not None]
    bounds = {"choices": choices} if choices else {"low": _decimal(axis.low), "high": _decimal(axis.high)}
    return {"name": axis.name, "key": axis.key, **bounds}


def _decimal(text: Any) -> str:
    """Return the plain decimal of a number that a configuration may write as 4e-3 or 1.0; "" for any other value."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,12})?([eE][+-]?[0-9]{1,2})?", text):
        return ""
    value = Fraction(text)
    scaled = round(value * 10**12)
    digits = f"{scaled // 10**12}.{scaled % 10**12:012d}"
    return plain_number(digits) if len(digits) <= 25 else ""


def _ratio(text: Any) -> Fraction | None:
    """Parse "p/q" or an integer as text; None for any other value."""
    if not isinstance(text, str) or not _RATIO.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    return Fraction(int(numerator), int(denominator or "1")) if int(denominator or "1") else None


def _root(variance: Fraction | None) -> int:
    """Return the standard error in hundredths of a percentage point, rounded down; 0 for None or a negative variance."""
    return 0 if variance is None or variance < 0 else isqrt(int(variance * 10**8))


def _word(text: Any, words: Sequence[str], otherwise: str) -> str:
    """Return the string of `words` that equals `text`, never `text` itself; else `otherwise`."""
    return next((word for word in words if isinstance(text, str) and word == text), otherwise)


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings in a list; [] for any other value."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list | tuple) else []


def _at(value: Any, *path: str) -> Any:
    """Return the value under nested keys, None where a key is absent."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
