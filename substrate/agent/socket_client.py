"""The worker's Unix socket, from inside: one JSON line each way for each exchange, and a connection for each exchange.

-> {"kind": "tool", "name": "read", "arguments": {"path": "substrate/recipes/rft.py"}}
<- {"ok": true, "output": "...", "truncated": false}    or    {"ok": false, "failure": "no_such_file", "what": "..."}
"""

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from substrate.interface.errors import DataError

MOST_LINE_BYTES = 8 << 20
BAD_LINE = "bad_request"


@dataclass(frozen=True)
class Failure:
    """The worker's refusal: a stable code, and a sentence with the cure. Repeating the same call gives it again."""

    code: str
    what: str


class Relay:
    """The worker, as the loop sees it. Each method is one exchange; it raises DataError if the worker breaks off or breaks the contract."""

    def __init__(self, path: Path, most_seconds: float) -> None:
        """most_seconds: how long one exchange may last, so that a worker that hangs does not hold the loop for ever."""
        self._path, self._most_seconds = str(path), most_seconds

    def chat(self, request: dict[str, Any]) -> str | Failure:
        """Sends a request for a chat completion; returns the endpoint's answer as it came."""
        return self._text("answer", {"kind": "chat", "request": request})

    def tool(self, name: str, arguments: dict[str, Any]) -> str | Failure:
        """Has a tool carried out; returns its output."""
        return self._text("output", {"kind": "tool", "name": name, "arguments": arguments})

    def end(self, outcome: str, what: str) -> None:
        """Says how the session ended."""
        reply = self._exchange({"kind": "end", "outcome": outcome, "what": what})
        if isinstance(reply, Failure):
            raise DataError(f"the worker does not take the end {outcome}: {reply.code}: {reply.what}")

    def _text(self, name: str, line: dict[str, Any]) -> str | Failure:
        reply = self._exchange(line)
        if isinstance(reply, Failure):
            return reply
        if not isinstance(reply.get(name), str):
            raise DataError(f"the worker's line has {sorted(reply)}; a line that is ok must have the text `{name}`")
        text: str = reply[name]
        return text

    def _exchange(self, line: dict[str, Any]) -> dict[str, Any] | Failure:
        sent = encode(line) + b"\n"
        if len(sent) > MOST_LINE_BYTES:  # an answer of at most 1 MiB makes none
            raise DataError(f"the loop's line has {len(sent)} bytes; the worker takes at most {MOST_LINE_BYTES}")
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(self._most_seconds)
                connection.connect(self._path)
                connection.sendall(sent)
                with connection.makefile("rb") as incoming:
                    received = incoming.readline(MOST_LINE_BYTES + 1)
        except OSError as error:
            raise DataError(f"the worker's socket {self._path} failed: {error}; the worker must serve it") from None
        if not received.endswith(b"\n") or len(received) > MOST_LINE_BYTES:
            raise DataError(
                f"the worker's line has {len(received)} bytes and is not whole; valid is one line of at most {MOST_LINE_BYTES}"
            )
        try:
            reply = json.loads(received)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the worker's line is not JSON: {error}; it must be one object") from None
        if not isinstance(reply, dict) or type(reply.get("ok")) is not bool:
            raise DataError("the worker's line has no `ok` that is true or false; it must be an object with it")
        if reply["ok"]:
            return reply
        if not isinstance(reply.get("failure"), str) or not isinstance(reply.get("what"), str):
            raise DataError(f"the worker's line has {sorted(reply)}; one that is not ok must have `failure` and `what`")
        if reply["failure"] == BAD_LINE:
            raise DataError(
                f"the worker's answer is that the loop's line is wrong: {reply['what']}; both must have one contract"
            )
        return Failure(reply["failure"], reply["what"])


def encode(value: Any) -> bytes:
    """Returns the one form in which the loop writes JSON: ASCII, keys sorted, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
