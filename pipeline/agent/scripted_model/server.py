"""A scripted model: an HTTP server on this machine that speaks OpenAI's chat API with tool calls and plays written scenarios.

    python -m pipeline.agent.scripted_model good_edit
    python -m pipeline.agent.scripted_model 'PATTERN=broken_then_repaired' no_edit

It prints its address and serves until it is stopped. Any loop that speaks the API can use it, without a key or a GPU. Of several scenarios
it plays the first whose PATTERN, a regular expression, is found in the first messages of a conversation; one without a pattern fits all.

Where a conversation is follows from the tool calls in it, so any number of conversations may run at once, and the same
conversation gets the same answers again. Only turns that leave no tool call, such as an error status, are remembered until the next that
does. Answers have the members and the usage that vLLM gives; a token is four bytes of text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline.agent.scripted_model import scenario
from pipeline.agent.scripted_model.scenario import Scenario, Turn
from pipeline.campaign.errors import PipelineError

MOST_REQUEST_BYTES = 1 << 26
BYTES_OF_A_TOKEN = 4
Cast = Sequence[tuple[str, Scenario]]
"""(regular expression over the first messages of a conversation, scenario); the first that fits is played."""


class ScriptedModel:
    """A running scripted model; use it as a context manager. `url` is the address to configure."""

    def __init__(self, cast: Cast | str, port: int = 0) -> None:
        """cast: the scenarios, or the name of one. port: 0 takes a free one."""
        self.cast = [("", scenario.load(cast))] if isinstance(cast, str) else list(cast)
        self.num_requests = 0
        self._lock = threading.Lock()
        self._unseen: dict[
            tuple[str, int], Turn
        ] = {}  # (conversation, last turn that left calls) -> last turn that left none
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/chat/completions"

    def __enter__(self) -> ScriptedModel:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="scripted model", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next_turn(self, request: Mapping[str, Any]) -> Turn:
        """Return the turn that answers a request, and remember it if it leaves no trace in the next request."""
        messages = request["messages"]
        opening = json.dumps([message.get("content") for message in _opening(messages)])
        play = next((each for pattern, each in self.cast if re.search(pattern, opening)), None)
        if play is None:
            raise ValueError("no scenario fits this conversation")
        played = play.played(request)
        place = (hashlib.sha256(opening.encode()).hexdigest(), -1 if played is None else played.number)
        with self._lock:
            self.num_requests += 1
            last = self._unseen.pop(place, played)
            turn = play.first() if last is None else play.after(last, messages)
            if not turn.leaves_calls:
                self._unseen[place] = turn
        return turn


def answer_of(turn: Turn, request: Mapping[str, Any]) -> bytes:
    """Return the body of a turn's answer with status 200, as vLLM forms it, cut where it is longer than max_tokens."""
    members = turn.members
    most = request.get("max_tokens", request.get("max_completion_tokens"))
    most = most if isinstance(most, int) else 1 << 30
    if members.get("spends_all"):
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None,
            "reasoning_content": members.get("reasoning", ""),
        }
        return _envelope(request, message, "length", min(most, 1 << 20))
    left, ending = most, "tool_calls" if "calls" in members else "stop"
    message = {"role": "assistant"}
    texts = {"reasoning_content": members.get("reasoning"), "content": members.get("say")}
    for name, text in texts.items():
        if text is not None:
            text = text * members.get("times", 1) if name == "content" else text
            message[name] = text[: left * BYTES_OF_A_TOKEN]
            left -= min(left, _tokens(text))
        elif name == "content":
            message[name] = None
    calls = []
    for number, call in enumerate(turn.calls(request)):
        arguments = json.dumps(call["arguments"])
        calls.append({"id": f"call_{turn.number}_{number}", "type": "function",
                      "function": {"name": call["name"], "arguments": arguments[: left * BYTES_OF_A_TOKEN]}})  # fmt: skip
        left -= min(left, _tokens(arguments))
        if not left:
            break
    if calls:
        message["tool_calls"] = calls
    return _envelope(request, message, ending if left else "length", most - left)


def _envelope(request: Mapping[str, Any], message: Mapping[str, Any], ending: str, answer_tokens: int) -> bytes:
    prompt = json.dumps([request.get("messages"), request.get("tools")])
    tokens, name = _tokens(prompt), hashlib.sha256(prompt.encode()).hexdigest()[:24]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ending, "stop_reason": None}
    return json.dumps({
        "id": f"chatcmpl-{name}", "object": "chat.completion", "created": 0, "model": request.get("model"), "choices": [choice],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens + answer_tokens, "completion_tokens": answer_tokens,
                  "prompt_tokens_details": None},
    }).encode()  # fmt: skip


def _tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // BYTES_OF_A_TOKEN)


def _opening(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The messages before the model's first."""
    roles = [message.get("role") for message in messages]
    return messages[: roles.index("assistant")] if "assistant" in roles else _before_repair(messages)


def _before_repair(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The system's messages and the first of the user: a loop may add others after an answer that it could not read."""
    roles = [message.get("role") for message in messages]
    return messages[: roles.index("user") + 1] if "user" in roles else messages


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *arguments: Any) -> None:
        return  # a client that hung up, as it may


def _handler(model: ScriptedModel) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = [{"id": each.name, "object": "model"} for _, each in model.cast]
            self.reply(200, json.dumps({"object": "list", "data": listed}).encode())

        def do_POST(self) -> None:
            size = self.headers.get("Content-Length", "")
            if not self.path.endswith("/chat/completions") or not size.isdigit() or int(size) > MOST_REQUEST_BYTES:
                self.refuse(404, "this server answers POST /v1/chat/completions alone")
                return
            try:
                request = json.loads(self.rfile.read(int(size)))
                turn = model.next_turn(request)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.refuse(400, f"the request is not valid: {type(error).__name__}")
                return
            time.sleep(turn.members.get("delay_seconds", 0))
            self.play(turn, request)

        def play(self, turn: Turn, request: Mapping[str, Any]) -> None:
            members = turn.members
            if members.get("drop"):
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif "raw" in members or "status" in members:
                body = members.get("raw", "").encode() * members.get("times", 1)
                self.reply(members.get("status", 200), body, members.get("headers", {}), members.get("cut"))
            else:
                self.reply(200, answer_of(turn, request))

        def refuse(self, status: int, what: str) -> None:
            self.reply(status, json.dumps({"error": {"message": what, "type": "invalid_request_error"}}).encode())

        def reply(
            self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:cut])

        def log_message(self, *arguments: Any) -> None:
            return

    return Handler


def main(words: Sequence[str] | None = None) -> int:
    """Read the command line, print the address, and serve until the process is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.agent.scripted_model", description="Serve a scripted model on this machine."
    )
    parser.add_argument(
        "scenarios",
        nargs="+",
        metavar="[PATTERN=]SCENARIO",
        help=f"a JSON file, or one of: {', '.join(scenario.names())}",
    )
    parser.add_argument("--port", type=int, default=0, help="a free one without it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=TEXT", help="a parameter of the scenarios")
    given = parser.parse_args(words)
    try:
        parameters = dict(each.partition("=")[::2] for each in given.set)
        pairs = [each.rpartition("=") for each in given.scenarios]
        cast = [(pattern, scenario.load(name, parameters)) for pattern, _, name in pairs]
    except PipelineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    with ScriptedModel(cast, given.port) as model:
        print(model.url, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0
