"""The watchdog: ends a session that repeats itself, stalls or wanders, and warns the model shortly before.

It judges the history alone, so the same transcript gets the same verdict. Each rule counts something, and ends the session at its
number. The numbers leave room for what a diligent agent does: reading a file again after it was removed from the conversation, the
same tests after each of several edits, a long look around before the first edit.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from substrate.agent.socket_client import encode

EDITS = ("write", "patch")
ACTS = (*EDITS, "run", "train")
"""The tools that change the fork or try it. A call of another tool only looks."""

REPEATS = 5
"""Equal calls with equal results, with no other act between. A second look is common, because old outputs are removed from the
conversation, and a third happens; the fifth has shown nothing new three times."""
LONGEST_CYCLE = 4
CYCLES = 3
"""Whole repetitions of 2 to LONGEST_CYCLE calls with equal arguments and results. Two happen when a model checks a repair; in the third
nothing can differ."""
STALLED_ANSWERS = 4
"""Answers in a row without a tool call. Each is told to call a tool; a model that was told so three times will not."""
WANDERING_STEPS = 20
"""Answers in a row without an act that was carried out. The open paths of the shipped constitution are about twenty files, and an answer
may read several."""
FLIPS = 6
"""Edits of one file in a row that alternate between two. Comparing two contents takes three (A, B, A), and going back once more four."""


@dataclass(frozen=True)
class Event:
    """One call that was carried out or refused. `result` has no digits: seconds and counts of two equal runs differ."""

    tool: str
    arguments: bytes
    result: str
    file: str  # of an edit, else ""
    acted: bool  # whether an act was carried out

    @classmethod
    def of(cls, tool: str, arguments: dict[str, Any], result: str, *, carried_out: bool) -> "Event":
        """Makes the event of a call. carried_out: whether it changed or tried something, though a trial may then have failed."""
        path = arguments.get("path")
        edited = path if tool in EDITS and carried_out and isinstance(path, str) else ""
        return cls(tool, encode(arguments), re.sub(r"[0-9]+", "0", result), edited, tool in ACTS and carried_out)


@dataclass(frozen=True)
class Verdict:
    """What a rule says. `outcome` is the stable code of the end; where `ends` is false the sentence is a warning for the model."""

    outcome: str
    what: str
    ends: bool


History = Sequence[Sequence[Event]]
"""The events of each readable answer; empty for an answer without a call."""


def judge(history: History) -> Verdict | None:
    """Returns the first rule that the last answer makes end the session, else the first that warns, else None."""
    events = [event for step in history for event in step]
    ends = range(len(events) - len(history[-1]) + 1, len(events) + 1) if history else ()
    counts = {name: max((rule(events[:end]) for end in ends), default=0) for name, rule in _EVENT_RULES.items()}
    counts["stalls"] = sum(1 for _ in takewhile(lambda step: not step, reversed(history)))
    counts["wanders"] = sum(
        1 for _ in takewhile(lambda step: not any(event.acted for event in step), reversed(history))
    )
    said = [
        Verdict(f"watchdog_{name}", words.format(count=counts[name]), counts[name] >= number)
        for name, number, margin, words in _LIMITS
        if counts[name] >= number - margin
    ]
    return next((verdict for verdict in said if verdict.ends), next(iter(said), None))


def _repeats(events: Sequence[Event]) -> int:
    """How often the last call came with this result since another act was carried out."""
    since = takewhile(lambda event: event == events[-1] or not event.acted, reversed(events))
    return sum(event == events[-1] for event in since)


def _cycles(events: Sequence[Event]) -> int:
    """How many whole times the last 2 to LONGEST_CYCLE events, which are not all equal, came one after another at the end."""
    lengths = [length for length in range(2, LONGEST_CYCLE + 1) if len(set(events[-length:])) > 1]
    return max((_periods(events, length) for length in lengths), default=0)


def _periods(events: Sequence[object], length: int) -> int:
    """How many times the last `length` of some things come one after another at their end."""
    equal = takewhile(lambda back: events[-back] == events[-back - length], range(1, len(events) - length + 1))
    return (length + sum(1 for _ in equal)) // length if len(events) >= length else 0


def _flips(events: Sequence[Event]) -> int:
    """How many edits of the file that the last event edits alternate between two, up to the last event."""
    edits = [(event.tool, event.arguments) for event in events if event.file and event.file == events[-1].file]
    if len(set(edits[-2:])) < 2:
        return 0
    return 2 + sum(1 for _ in takewhile(lambda back: edits[-back] == edits[-back - 2], range(1, len(edits) - 1)))


_EVENT_RULES: dict[str, Callable[[Sequence[Event]], int]] = {"repeats": _repeats, "cycles": _cycles, "flips": _flips}
_LIMITS: tuple[tuple[str, int, int, str], ...] = (
    ("repeats", REPEATS, 1, "the same call with the same arguments gave the same result {count} times"),
    ("cycles", CYCLES, 1, "the same calls with the same results came {count} times one after another"),
    ("stalls", STALLED_ANSWERS, 0, "{count} answers in a row had no tool call"),
    ("wanders", WANDERING_STEPS, 5, "{count} answers in a row made no edit, command or training"),
    ("flips", FLIPS, 2, "the last {count} edits of one file went back and forth between two"),
)
"""Name, number at which it ends the session, how long before it warns (0: never), and its sentence."""
