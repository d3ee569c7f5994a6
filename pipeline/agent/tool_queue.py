"""Tool calls of a loop, which threads of the relay put in and the worker's main thread serves: a sandbox dies with the thread that started it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.campaign.errors import Interrupted

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ToolAnswer:
    """What a tool gives back. A failure has a stable code and a sentence with the cure.

    facts: numbers and codes for the transcript alone, such as the GPU-seconds; the loop does not get them.
    """

    output: str = ""
    truncated: bool = False
    failure: str = ""
    what: str = ""
    facts: Mapping[str, int | str | bool | None] = field(default_factory=dict)

    @classmethod
    def of(cls, line: Mapping[str, Any], **facts: int | str | bool | None) -> ToolAnswer:
        """Make it from the members of the socket's line: ok, and output and truncated, or failure and what."""
        return cls(**{name: value for name, value in line.items() if name != "ok"}, facts=facts)

    @property
    def is_ok(self) -> bool:
        return not self.failure


Handler = Callable[[str, Mapping[str, Any]], ToolAnswer]
"""From a tool's name and arguments, both as the loop sent them, to its answer. The main thread calls it."""


@dataclass(frozen=True)
class Call:
    """One call that waits for its answer; None where the relay closed before."""

    name: str
    arguments: Mapping[str, Any]
    answer: queue.SimpleQueue[ToolAnswer | None] = field(default_factory=queue.SimpleQueue)


class ToolQueue:
    """Calls in the order in which they came."""

    def __init__(self) -> None:
        self.on_trouble: Callable[[], object] = lambda: None
        """Called where a thread could not go on, so that a running tool ends at once and `serve` raises."""
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._trouble: BaseException | None = None
        self._is_closed = False

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolAnswer | None:
        """Put a call in and wait for its answer; None where the queue closes first."""
        waiting = Call(name, arguments)
        self._calls.put(waiting)
        if self._is_closed:
            self.close()
        return waiting.answer.get()

    def serve(self, handler: Handler, until: Callable[[], bool]) -> None:
        """Answer calls one after the other until `until()`, which is asked before each and ten times a second.

        Call it from the main thread. Raises what `handler` raises, and what ended a thread of the relay (`fail`).
        """
        while not until() or self._trouble:
            if self._trouble:
                raise self._trouble
            try:
                call = self._calls.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            answer = None
            try:
                answer = handler(call.name, call.arguments)
            except Interrupted:
                if self._trouble:
                    raise self._trouble from None
                raise
            finally:
                call.answer.put(answer)

    def fail(self, trouble: BaseException) -> None:
        """Have `serve` raise this in the main thread, because a thread could not go on."""
        self._trouble = self._trouble or trouble
        self.on_trouble()

    def close(self) -> None:
        """Answer everything that waits, and whatever comes later, with None."""
        self._is_closed = True
        while True:
            try:
                self._calls.get_nowait().answer.put(None)
            except queue.Empty:
                return
