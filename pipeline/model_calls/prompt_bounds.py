"""How many tokens the prompt of a request can have at most, which is what a budget reserves for it.

    by bytes    A token stands for at least one byte of text, in every tokenizer of bytes or of characters, and the ASCII form of JSON has at
                least as many bytes as the text has in UTF-8. A chat template adds MESSAGE_TOKENS and REQUEST_TOKENS.
    by counts   A request that begins with the messages of an earlier one has at most the tokens that the endpoint counted for that one,
                and the bytes of the messages after the common beginning. English and code have about four bytes a token, so a long
                conversation is bounded four times as tightly.

The second bound rests on a count of the endpoint's. Some leave out what their cache had, and count it again when it has it no more. An
endpoint whose counts contradict one another is bounded by bytes from then on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from pipeline.model_calls.endpoint import encoded

MESSAGE_TOKENS = 16
"""Tokens that a chat template writes around one message: the names of role and turn, and line ends. Published templates write 3 to 10."""
REQUEST_TOKENS = 512
"""Tokens that a template writes of its own once a request: a default system prompt, the date, how tools are called. The longest that we
know, of models with tools, has about 300."""
MOST_BYTES_OF_A_TOKEN = 32  # on average over a request; English and code have about 4, indentation alone up to 16
REMEMBERED = 16  # counted requests; a loop's next request extends one of the newest


def by_bytes(request: Mapping[str, Any]) -> int:
    """Return the bound by bytes of a request with messages and tools. An audit finds it again in the bytes that were sent."""
    text = {name: request[name] for name in ("messages", "tools") if name in request}
    return len(encoded(text)) + MESSAGE_TOKENS * len(request["messages"]) + REQUEST_TOKENS


class PromptBounds:
    """Bounds of one agent's prompts, which learn from the endpoint's counts. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: deque[tuple[list[bytes], bytes, int]] = deque(maxlen=REMEMBERED)
        self._is_believed = True

    def of(self, request: Mapping[str, Any]) -> int:
        """Return the smallest bound of a request's prompt that is known, in tokens."""
        messages, tools = _parts(request)
        bounds = [by_bytes(request)]
        with self._lock:
            known = list(self._known)
        for earlier, earlier_tools, counted in known:
            same = next(
                (n for n, (one, other) in enumerate(zip(messages, earlier, strict=False)) if one != other),
                min(len(messages), len(earlier)),
            )
            if same and tools == earlier_tools:
                bounds.append(counted + sum(len(message) + 1 + MESSAGE_TOKENS for message in messages[same:]))
        return min(bounds)

    def learn(self, request: Mapping[str, Any], counted: int, bound: int) -> None:
        """Remember what the endpoint counted for a request's prompt, in tokens. bound: what `of` gave for it.

        A count that is too small for so many bytes is not remembered: the cache had most of it, or nobody counted.
        """
        if counted * MOST_BYTES_OF_A_TOKEN < by_bytes(request):
            return
        with self._lock:
            self._is_believed = self._is_believed and counted <= bound
            self._known.append((*_parts(request), counted))
            if not self._is_believed:
                self._known.clear()


def _parts(request: Mapping[str, Any]) -> tuple[list[bytes], bytes]:
    return [encoded(message) for message in request["messages"]], encoded({"tools": request.get("tools")})
