"""An agent's manifest: what it says it did. Typed fields enter evidence; free texts are sealed by their digest and shown to no model.

A loop hands it in as the arguments of the tool `finish` (docs/agents.md has the form). It is read strictly: a manifest with a member
too many, a text too long or a word that is on no list is refused, so that the agent can mend it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign import canonical
from pipeline.model_calls.failures import CallFailed

CHANGES = ("none", "data", "loss", "schedule", "mixture", "selection", "optimizer", "other")
TRIED = ("better", "worse", "same", "broken", "unclear")
FAILED = ("edit", "smoke", "training", "budget", "tool")
EFFECTS = ("large_gain", "small_gain", "none", "loss", "unknown")
CHOICES = ("last", "best", "average")
MOST_TRIED, MOST_FAILED, MOST_SETTINGS = 20, 20, 5
FIELDS = (
    "hypothesis",
    "axis",
    "change",
    "summary",
    "tried",
    "failed",
    "expected_effect",
    "checkpoint",
    "equivalent_settings",
)
_KEY = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+")
_VALUE = re.compile(r"[A-Za-z0-9_.,+\-\[\]]{1,96}")
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)


class BadManifest(CallFailed):
    """A manifest is refused; the message says what came, what is valid, and what to do."""

    def __init__(self, what: str, valid: str) -> None:
        super().__init__("bad_manifest", what, f"Valid: {valid}. Call finish again with it mended")


@dataclass(frozen=True)
class Manifest:
    """A manifest that was accepted. typed: what enters evidence; texts_sha256: digest of the free texts' canonical JSON."""

    typed: Mapping[str, Any]
    texts_sha256: str


def read_manifest(value: Any, axis: str | None) -> Manifest:
    """Read the arguments of `finish`. axis: the arm's axis, or None. Raises BadManifest for the first fault."""
    whole = _members(value, FIELDS, "the manifest")
    texts: dict[str, Any] = {"hypothesis": _text(whole, "hypothesis", 600), "summary": _text(whole, "summary", 1200)}
    if whole["axis"] != axis:
        raise BadManifest(
            f"axis is {_shown(whole['axis'])}",
            "null, because this arm has no axis" if axis is None else f"{axis}, the arm's axis",
        )
    tried, failed = _list(whole, "tried", MOST_TRIED), _list(whole, "failed", MOST_FAILED)
    typed: dict[str, Any] = {
        "axis": axis,
        "change": _word(whole, "change", CHANGES, "change"),
        "expected_effect": _word(whole, "expected_effect", EFFECTS, "expected_effect"),
    }
    texts["tried"], typed["tried"] = [], []
    for number, entry in enumerate(tried):
        entry = _members(entry, ("what", "outcome"), f"tried[{number}]")
        texts["tried"].append(_text(entry, "what", 200, f"tried[{number}]."))
        typed["tried"].append(_word(entry, "outcome", TRIED, f"tried[{number}].outcome"))
    texts["failed"], typed["failed"] = [], []
    for number, entry in enumerate(failed):
        entry = _members(entry, ("what", "kind", "repaired"), f"failed[{number}]")
        texts["failed"].append(_text(entry, "what", 200, f"failed[{number}]."))
        if not isinstance(entry["repaired"], bool):
            raise BadManifest(f"failed[{number}].repaired is {_shown(entry['repaired'])}", "true or false")
        typed["failed"].append(
            {"kind": _word(entry, "kind", FAILED, f"failed[{number}].kind"), "repaired": entry["repaired"]}
        )
    checkpoint = _members(whole["checkpoint"], ("choice", "why"), "checkpoint")
    typed["checkpoint"] = _word(checkpoint, "choice", CHOICES, "checkpoint.choice")
    texts["checkpoint"] = _text(checkpoint, "why", 300, "checkpoint.")
    typed["equivalent_settings"] = [
        _setting(each, number) for number, each in enumerate(_list(whole, "equivalent_settings", MOST_SETTINGS))
    ]
    return Manifest(typed, canonical.digest(texts))


def _setting(value: Any, number: int) -> list[str]:
    """A setting as [key, value]: plain texts, because evidence has them. Whether article 2 opens the key is judged where it is used."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    if not is_pair or len(value[0]) > 80 or not _KEY.fullmatch(value[0]) or not _VALUE.fullmatch(value[1]):
        raise BadManifest(
            f"equivalent_settings[{number}] is {_shown(value)}",
            'a pair of texts, such as ["recipe.learning_rate", "0.0071"]',
        )
    return value


def _members(value: Any, names: Sequence[str], at: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadManifest(f"{at} is {_shown(value)}", f"an object with {', '.join(names)}")
    wrong = [f"lacks {name}" for name in names if name not in value] + [
        f"has {_shown(name)}" for name in value if name not in names
    ]
    if wrong:
        raise BadManifest(f"{at} {wrong[0]}", f"exactly {', '.join(names)}")
    return value


def _text(value: Mapping[str, Any], name: str, most: int, at: str = "") -> str:
    text = value[name]
    if not isinstance(text, str) or len(text) > most:
        came = f"has {len(text)} characters" if isinstance(text, str) else f"is {_shown(text)}"
        raise BadManifest(f"{at}{name} {came}", f"a text of at most {most} characters")
    if _UNPRINTABLE.search(text):
        raise BadManifest(
            f"{at}{name} does not print as it reads", "text without control, direction or invisible characters"
        )
    return text


def _word(value: Mapping[str, Any], name: str, words: Sequence[str], at: str) -> str:
    word = value[name]
    if not isinstance(word, str) or word not in words:
        raise BadManifest(f"{at} is {_shown(word)}", f"one of {', '.join(words)}")
    return word


def _list(value: Mapping[str, Any], name: str, most: int) -> list[Any]:
    entries = value[name]
    if not isinstance(entries, list) or len(entries) > most:
        came = f"has {len(entries)} entries" if isinstance(entries, list) else f"is {_shown(entries)}"
        raise BadManifest(f"{name} {came}", f"a list of at most {most} entries")
    return entries


def _shown(value: Any) -> str:
    """A value as it may stand in a message: ASCII and short."""
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
