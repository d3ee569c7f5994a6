"""One chat of an agent from its request to its answer: checked, within the budget, repeated where that helps, and recorded.

checked request -> reserved -> bytes in the transcript -> asked, up to four times again -> answer in the transcript -> charged
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

from pipeline.model_calls import chat_request
from pipeline.model_calls.budget import Budget, BudgetSpent, charge_of
from pipeline.model_calls.endpoint import Ask, Endpoint
from pipeline.model_calls.failures import CallFailed
from pipeline.model_calls.prompt_bounds import PromptBounds, by_bytes
from pipeline.model_calls.transcript import Writer

MOST_REPEATS = 4
FIRST_PAUSE_SECONDS = (
    1.0  # before the first repeat, twice as long before each other, unless the endpoint asks for a time
)
LIMIT_PAUSES = 4  # times as long after a limit: its four repeats take a minute, because providers count by the minute


class MeteredChat:
    """The chats of one agent. `ask` may be called from any thread.

    endpoint: whose model, `add` and `leave_out` a request gets. ask: `endpoint.post_chat` of it, or `replay.Replay.ask`.
    """

    def __init__(
        self, endpoint: Endpoint, ask: Ask, budget: Budget, transcript: Writer, pause_seconds: float = FIRST_PAUSE_SECONDS
    ) -> None:  # fmt: skip
        self._endpoint, self._ask, self._budget, self._transcript = endpoint, ask, budget, transcript
        self._pause_seconds, self._bounds = pause_seconds, PromptBounds()
        self._numbers, self._closing = itertools.count(), threading.Event()

    def ask(self, request: Any) -> bytes:
        """Ask the model and return the exact bytes of its answer. request: as a loop sent it.

        Raises BadRequest for what a loop may not ask, BudgetSpent, and every failure of `Ask` that no repeat cured.
        """
        request = chat_request.fitted(self._endpoint, chat_request.checked(request))
        number, most = next(self._numbers), self._budget.limits.answer_tokens
        try:
            reserved = self._budget.reserve(self._bounds.of(request), request.get("max_tokens", most))
        except BudgetSpent as spent:
            self._fail(number, 0, spent)
            raise
        charge = None
        try:
            body = chat_request.compose(self._endpoint, request, reserved.answer_tokens)
            self._transcript.append("request", body, call=number, prompt_bound=reserved.prompt_tokens)
            answer, tries = self._ask_again(number, body)
            charge = charge_of(answer, reserved)
            charged = {"prompt_tokens": charge.prompt_tokens, "answer_tokens": charge.answer_tokens}
            self._transcript.append("answer", answer, call=number, tries=tries, **charged)
        finally:
            if charge is None:
                self._budget.release(reserved)
            else:
                self._budget.settle(reserved, charge, by_bytes(request))
        if not charge.is_bound:
            self._bounds.learn(request, charge.prompt_tokens, reserved.prompt_tokens)
        return answer

    def close(self) -> None:
        """Let no call wait for a repeat any more."""
        self._closing.set()

    def _ask_again(self, number: int, body: bytes) -> tuple[bytes, int]:
        """Ask, and again after failures that may pass. Returns the answer and how often was asked. Raises CallFailed."""
        for tries in itertools.count(1):
            try:
                if (seconds := self._budget.seconds_left()) <= 0:
                    raise self._budget.wall_is_over()
                return self._ask(body, seconds), tries
            except CallFailed as failed:
                if self._budget.seconds_left() <= 0 and not isinstance(failed, BudgetSpent):
                    failed = self._budget.wall_is_over()
                self._fail(number, tries, failed)
                pause = self._pause(tries, failed)
                if not failed.may_pass or tries > MOST_REPEATS or pause >= self._budget.seconds_left():
                    raise failed from None
            if self._closing.wait(pause):
                raise CallFailed("closed", "the worker ends")
        raise AssertionError

    def _pause(self, tries: int, failed: CallFailed) -> float:
        """Seconds before the next try."""
        if failed.retry_after is not None:
            return float(failed.retry_after)
        return self._pause_seconds * 2 ** (tries - 1) * (LIMIT_PAUSES if failed.kind == "endpoint_limit" else 1)

    def _fail(self, number: int, tries: int, failed: CallFailed) -> None:
        self._transcript.append("failure", call=number, tries=tries, failure=failed.kind, what=failed.what)
