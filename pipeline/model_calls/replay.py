"""Answers of a transcript in place of an endpoint: the same arm runs again without a model."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.model_calls.failures import CallFailed
from pipeline.model_calls.transcript import content_of


@dataclass(frozen=True)
class Difference:
    """Where a replayed request first differs from the recorded one. call: number of the request, from 0; offset: its first other byte."""

    call: int
    offset: int


class Replay:
    """Plays the outcomes of a transcript's requests in their order, failures too.

    A request that differs is answered all the same, because a log that the loop read may have other times in it; `difference` says
    where the first one is.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._lock = threading.Lock()
        requests: dict[int, bytes] = {}
        outcomes: dict[int, list[bytes | Mapping[str, Any]]] = {}
        for record in records:
            if record["kind"] == "request":
                requests[record["call"]], outcomes[record["call"]] = content_of(record), []
            elif record["kind"] == "answer":
                outcomes[record["call"]].append(content_of(record))
            elif record["kind"] == "failure" and record["tries"]:
                outcomes[record["call"]].append(record)
        self._calls = [(requests[call], outcomes[call]) for call in sorted(requests) if outcomes[call]]
        self._at, self._try = -1, 0
        self.difference: Difference | None = None

    @property
    def left(self) -> int:
        """Recorded requests that were not asked yet."""
        return len(self._calls) - 1 - self._at

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Return the next recorded answer, as `endpoint.Ask`. Raises CallFailed: the recorded failure, or replay_ended past the end."""
        with self._lock:
            if self._at < 0 or self._try >= len(self._calls[self._at][1]):
                if not self.left:
                    raise CallFailed(
                        "replay_ended", f"the transcript has {len(self._calls)} requests, and the loop makes one more",
                        "Replay with the image, configuration and budget of the recorded run",
                    )  # fmt: skip
                self._at, self._try = self._at + 1, 0
            recorded, outcomes = self._calls[self._at]
            outcome, self._try = outcomes[self._try], self._try + 1
            if request != recorded and self.difference is None:
                shared = min(len(request), len(recorded))
                offset = next((place for place in range(shared) if request[place] != recorded[place]), shared)
                self.difference = Difference(self._at, offset)
            if isinstance(outcome, bytes):
                return outcome
            failed = CallFailed(outcome["failure"], outcome["what"])
            failed.may_pass, failed.retry_after = self._try < len(outcomes), 0
            raise failed
