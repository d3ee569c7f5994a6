"""The relay: a Unix socket in the worker, through which an agent's loop asks the model and calls tools, and nothing else.

One exchange a connection, one JSON line each way (docs/contract.md):

    {"kind": "chat", "request": {...}}                 model_calls/metered_chat.py
    {"kind": "tool", "name": "read", "arguments": {}}  the queue that the worker's main thread serves
    {"kind": "end", "outcome": "...", "what": "..."}   why the loop ends by itself

What comes is not believed. Of a chat only allowed members reach the endpoint (model_calls/chat_request.py), and only the worker knows the
key. A line that is too long, too slow, cut or malformed is answered with bad_request and changes nothing.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.agent.tool_queue import ToolQueue
from pipeline.campaign import strict_json
from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.model_calls.budget import Budget
from pipeline.model_calls.chat_request import BadRequest
from pipeline.model_calls.endpoint import Ask, Endpoint, encoded
from pipeline.model_calls.failures import CallFailed
from pipeline.model_calls.metered_chat import FIRST_PAUSE_SECONDS, MeteredChat
from pipeline.model_calls.transcript import Writer

SOCKET = "s"
MOST_PATH_BYTES = 107  # of an address of AF_UNIX on Linux, without its final zero
MOST_LINE_BYTES = 8 << 20
MOST_CONNECTIONS = 32
LINE_SECONDS = 10.0  # in which a line must come, or be taken
CLOSE_SECONDS = 5.0
_WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")
_KINDS: Mapping[str, tuple[str, ...]] = {
    "chat": ("request",),
    "tool": ("name", "arguments"),
    "end": ("outcome", "what"),
}


@dataclass(frozen=True)
class Ending:
    """Why the loop says that it ended."""

    outcome: str
    what: str


class Relay:
    """A running relay, a context manager; the main thread calls `tools.serve` meanwhile.

    folder: made by the relay for the socket alone, and bound at /relay. uid: of the sandbox, which alone reaches the folder.
    ask: `endpoint.post_chat` of the endpoint, or `replay.Replay.ask`. pause_seconds: before the first repeat.
    """

    def __init__(
        self, folder: Path, uid: int, endpoint: Endpoint, ask: Ask, budget: Budget, transcript: Writer,
        *, pause_seconds: float = FIRST_PAUSE_SECONDS, line_seconds: float = LINE_SECONDS,
    ) -> None:  # fmt: skip
        self.path, self._uid = folder / SOCKET, uid
        if (size := len(os.fsencode(self.path))) > MOST_PATH_BYTES:
            raise ConfigError(
                f"the path of the relay's socket has {size} bytes, and Linux takes {MOST_PATH_BYTES}",
                "Set cluster.scratch_dir to a folder with a shorter path, such as /tmp",
            )
        self._chat = MeteredChat(endpoint, ask, budget, transcript, pause_seconds)
        self._transcript, self._line_seconds = transcript, line_seconds
        self.tools = ToolQueue()
        self.ending: Ending | None = None
        self.is_finished = False  # whether a manifest was accepted
        self._tool_calls = itertools.count()
        self._slots, self._closing = threading.Semaphore(MOST_CONNECTIONS), threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        folder = self.path.parent
        folder.mkdir(mode=0o700)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(self.path))
        self.path.chmod(0o600)
        for place in (self.path, folder):
            os.chown(place, self._uid, -1)
        self._listening.listen(MOST_CONNECTIONS)
        self._start(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        """Close every connection, answer every waiting tool call with nothing, and wait for the threads."""
        self._closing.set()
        self._chat.close()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listening.close()
        self.tools.close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(
                max(0.0, deadline - time.monotonic())
            )  # a call of a silent endpoint ends by its own time limit; it cannot write any more
        self._transcript.close()
        self.path.unlink(missing_ok=True)

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name="relay", daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            self._slots.acquire()
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                self._slots.release()
                if not self._closing.is_set():
                    self.tools.fail(WorkFailed(f"the relay cannot accept connections: {error.strerror}"))
                return
            with self._lock:
                self._connections.add(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        """Serve one connection: one line, one answer. A fault of the relay itself goes to the main thread."""
        try:
            with connection:
                self._check_peer(connection)
                try:
                    answer = self._answer(_received(connection, self._line_seconds))
                except CallFailed as failed:
                    answer = {"ok": False, "failure": failed.kind, "what": str(failed)}
                if answer is not None:
                    _send(connection, encoded(answer) + b"\n", self._line_seconds)
        except OSError:
            pass  # the peer is gone, and with it whoever could read an answer
        except Exception as error:  # for example a transcript on a full disk: the main thread must hear of it
            if not self._closing.is_set():
                self.tools.fail(error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            self._slots.release()

    def _check_peer(self, connection: socket.socket) -> None:
        """Raise OSError unless the other end runs as the sandbox's uid, or as ours."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] not in (self._uid, os.geteuid()):
            raise OSError("another user")

    def _answer(self, line: bytes) -> dict[str, Any] | None:
        """Answer a line; None where the relay closes. Raises CallFailed."""
        try:
            asked = strict_json.read(line, max_bytes=MOST_LINE_BYTES)
        except strict_json.BadJson as bad:
            raise BadRequest(
                f"the line is no JSON that the relay reads ({bad.code})", "Send one JSON object and a line end"
            ) from None
        kind = asked.get("kind") if isinstance(asked, dict) else None
        members = _KINDS.get(kind) if isinstance(kind, str) else None
        if members is None or set(asked) != {"kind", *members}:
            valid = "; ".join(f"{name} with {' and '.join(names)}" for name, names in _KINDS.items())
            raise BadRequest("the line has no known kind, or other members than its kind has", f"Valid kinds: {valid}")
        if self.ending or self.is_finished:
            raise BadRequest("the loop has ended", "Exit")
        if kind == "chat":
            return {"ok": True, "answer": self._chat.ask(asked["request"]).decode("utf-8", "replace")}
        return (
            self._tool(asked["name"], asked["arguments"])
            if kind == "tool"
            else self._end(asked["outcome"], asked["what"])
        )

    def _end(self, outcome: Any, what: Any) -> dict[str, Any]:
        if not isinstance(outcome, str) or not _WORD.fullmatch(outcome) or not isinstance(what, str):
            raise BadRequest("outcome or what is not valid", "Valid: an outcome of small letters and _, and a sentence")
        ending = Ending(outcome, what[:600].encode("utf-8", "replace").decode())
        self._transcript.append("end", outcome=ending.outcome, what=ending.what)
        self.ending = ending
        return {"ok": True}

    def _tool(self, name: Any, arguments: Any) -> dict[str, Any] | None:
        if not isinstance(name, str) or not _WORD.fullmatch(name) or not isinstance(arguments, dict):
            raise BadRequest("name or arguments are not valid", "Valid: a tool's name, and an object of its arguments")
        number = next(self._tool_calls)
        self._transcript.append("tool", encoded(arguments), tool=number, name=name)
        answer = self.tools.call(name, arguments)
        if answer is None:
            return None
        self._transcript.append(
            "tool_result", answer.output.encode("utf-8", "surrogatepass"), tool=number, ok=answer.is_ok, failure=answer.failure,
            what=answer.what.encode("utf-8", "replace").decode(), truncated=answer.truncated, facts=dict(answer.facts),
        )  # fmt: skip
        if not answer.is_ok:
            return {"ok": False, "failure": answer.failure, "what": answer.what}
        self.is_finished = self.is_finished or name == "finish"
        return {"ok": True, "output": answer.output, "truncated": answer.truncated}


def _received(connection: socket.socket, seconds: float) -> bytes:
    """Return the one line that comes. Raises BadRequest if it is too long, too slow, cut, or followed by more."""
    deadline, parts, size = time.monotonic() + seconds, list[bytes](), 0
    while True:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            part = connection.recv(1 << 16)
        except TimeoutError:
            raise BadRequest(f"no whole line came within {seconds:g} s", "Send the line at once") from None
        if not part:
            raise BadRequest("the connection ended before the line did", "End the line with \\n")
        size += len(part)
        if size > MOST_LINE_BYTES:
            raise BadRequest(f"the line is longer than {MOST_LINE_BYTES} bytes", "Send less")
        parts.append(part)
        if b"\n" in part:
            line, _, more = b"".join(parts).partition(b"\n")
            if more:
                raise BadRequest("something follows the line", "Send one line a connection")
            return line


def _send(connection: socket.socket, line: bytes, seconds: float) -> None:
    """Send a line. A peer that does not take the whole of it in time is given up (OSError)."""
    connection.settimeout(seconds)
    connection.sendall(line)
