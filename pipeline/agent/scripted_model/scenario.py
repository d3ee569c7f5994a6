"""Written scenarios of a scripted model: JSON files with a list of turns, and the choice of the next turn.

    {"schema": 1, "about": "a sentence", "parameters": {"name": "text for $name$"}, "turns": [TURN, ...]}

A turn has one of

    "calls"     [{"name": "read", "arguments": {...}}]       tool calls, with "say" for text beside them
    "say"       "text"                                       text alone
    "raw"       "bytes of the answer, as UTF-8"              with "status" and "headers" if it is no 200; "cut": bytes after which it is cut
    "status"    429, with "headers" and a body in "raw"
    "drop"      true                                         the connection ends without an answer

and may have "name", "reasoning" (text), "spends_all" (true: all of max_tokens is used up by reasoning, and nothing is answered),
"times" (the text of say or raw is repeated), "delay_seconds", and "next": [{"when": REGEX, "to": NAME}, ...]. The first rule whose
regular expression is found in the results of the last tool calls names the next turn; without one it is the following turn. The last turn
repeats. In any string, $name$ becomes the text of a parameter, and $name:quoted$ the same as a string of Python. An
argument "$axis$" of a call becomes the axis that the schema of `finish` allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, NotFound

FOLDER = Path(__file__).parent / "scenarios"
_KINDS = ("calls", "say", "raw", "status", "drop", "spends_all")
_MEMBERS: Mapping[str, Any] = {
    "name": str, "calls": list, "say": str, "raw": str, "status": int, "headers": dict, "drop": bool, "reasoning": str,
    "spends_all": bool, "times": int, "delay_seconds": int | float, "next": list, "cut": int,
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One answer of the scripted model. rules: (regular expression, number of the turn)."""

    number: int
    members: Mapping[str, Any]
    rules: Sequence[tuple[re.Pattern[str], int]]

    @property
    def leaves_calls(self) -> bool:
        """Whether the next request shows by the ids of its tool calls that this turn was played."""
        return "calls" in self.members

    def calls(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the turn's tool calls; an argument $axis$ is the arm's axis, as the request's tools name it."""
        axis = _axis_of(request)
        return [
            {
                "name": call["name"],
                "arguments": {key: axis if value == "$axis$" else value for key, value in call["arguments"].items()},
            }
            for call in self.members.get("calls", [])
        ]


@dataclass(frozen=True)
class Scenario:
    """A scenario that was read."""

    name: str
    about: str
    turns: Sequence[Turn]

    def first(self) -> Turn:
        return self.turns[0]

    def after(self, turn: Turn, messages: Sequence[Mapping[str, Any]]) -> Turn:
        """Return the turn that follows `turn`, by the results of the last tool calls in `messages`."""
        results = last_results(messages)
        number = next((to for pattern, to in turn.rules if pattern.search(results)), turn.number + 1)
        return self.turns[min(number, len(self.turns) - 1)]

    def played(self, request: Mapping[str, Any]) -> Turn | None:
        """Return the turn whose tool calls are the last ones of a request's messages; None where there are none of this scenario.

        Calls are known by their names and arguments, because a loop may number them anew.
        """
        for message in reversed(request["messages"]):
            if message.get("role") == "assistant" and message.get("tool_calls"):
                made = [_call_made(call) for call in message["tool_calls"]]
                return next((turn for turn in self.turns if turn.leaves_calls and turn.calls(request) == made), None)
        return None


def _call_made(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": json.loads(function["arguments"])}


def _axis_of(request: Mapping[str, Any]) -> Any:
    """Return what the schema of the tool `finish` allows for the axis; None where it says nothing."""
    for tool in request.get("tools") or []:
        if tool["function"]["name"] == "finish":
            allowed = tool["function"].get("parameters", {}).get("properties", {}).get("axis", {}).get("enum") or [None]
            return allowed[0]
    return None


def last_results(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the texts of the tool messages since the last message of the model."""
    texts: list[str] = []
    for message in reversed(messages):
        if message.get("role") == "assistant":
            break
        if message.get("role") == "tool":
            texts.append(str(message.get("content")))
    return "\n".join(reversed(texts))


def names() -> list[str]:
    """Names of the scenarios that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str, parameters: Mapping[str, str] | None = None) -> Scenario:
    """Read a scenario by its name or path. parameters: texts in place of those of the file.

    Raises NotFound for a name that does not ship, ConfigError for a file that is no scenario or lacks a parameter.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise NotFound(f"there is no scenario {name}", f"Name a JSON file, or one of {', '.join(names())}")
    try:
        content = json.loads(path.read_bytes())
        return _read(path.stem, content, parameters or {})
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ConfigError(
            f"{path} is no scenario: {error!r}", "pipeline/agent/scripted_model/scenario.py says what a scenario has"
        ) from None


def _read(name: str, content: Mapping[str, Any], given: Mapping[str, str]) -> Scenario:
    if content["schema"] != 1 or set(content) - {"schema", "about", "parameters", "turns"}:
        raise ValueError("its members are not schema (1), about, parameters and turns")
    known = content.get("parameters", {})
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"it has no parameter {unknown[0]}, only {sorted(known)}")
    turns = _filled(content["turns"], {**known, **given})
    numbers = {turn["name"]: number for number, turn in enumerate(turns) if "name" in turn}
    calls = [json.dumps(turn["calls"], sort_keys=True) for turn in turns if "calls" in turn]
    if len(calls) != len(set(calls)):
        raise ValueError("two of its turns make the same calls, so that nobody could tell where a conversation is")
    return Scenario(name, content["about"], [_turn(number, turn, numbers) for number, turn in enumerate(turns)])


def _turn(number: int, members: Mapping[str, Any], numbers: Mapping[str, int]) -> Turn:
    wrong = [key for key, value in members.items() if key not in _MEMBERS or not isinstance(value, _MEMBERS[key])]
    if wrong or not any(kind in members for kind in _KINDS):
        raise ValueError(f"turn {number} has a wrong {wrong[0]}" if wrong else f"turn {number} is none of {_KINDS}")
    for call in members.get("calls", []):
        if set(call) != {"name", "arguments"}:
            raise ValueError(f"a call of turn {number} is not name and arguments")
    return Turn(number, members, [(re.compile(rule["when"]), numbers[rule["to"]]) for rule in members.get("next", [])])


def _filled(value: Any, parameters: Mapping[str, str]) -> Any:
    """Return a JSON value with $name$ and $name:quoted$ replaced in all of its strings."""
    if isinstance(value, Mapping):
        return {key: _filled(member, parameters) for key, member in value.items()}
    if isinstance(value, list):
        return [_filled(member, parameters) for member in value]
    if isinstance(value, str):
        for name, text in parameters.items():
            value = value.replace(f"${name}$", text).replace(f"${name}:quoted$", json.dumps(text))
    return value
