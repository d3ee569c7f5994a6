"""A relay with everything around it, and a small loop of a stranger that speaks to it, for tests."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.agent.relay import Relay
from pipeline.agent.tool_queue import Handler, ToolAnswer
from pipeline.model_calls import chat_request
from pipeline.model_calls.budget import Budget, Limits
from pipeline.model_calls.endpoint import Ask, Endpoint, post_chat
from pipeline.model_calls.manifest import BadManifest, read_manifest
from pipeline.model_calls.transcript import Transcript, Writer, load

LIMITS = Limits(steps=40, tokens=400_000, answer_tokens=4096, wall_seconds=60.0)
MANIFEST: Mapping[str, Any] = {
    "hypothesis": "h", "axis": None, "change": "none", "summary": "s", "tried": [], "failed": [], "expected_effect": "none",
    "checkpoint": {"choice": "last", "why": "w"}, "equivalent_settings": [],
}  # fmt: skip
REQUEST: Mapping[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "seed": 1,
    "max_tokens": 100,
}


def agents_endpoint(url: str = "http://127.0.0.1:9/v1/chat/completions", **changes: Any) -> Endpoint:
    return Endpoint(**{"url": url, "model": "small", "use": chat_request.USE, "timeout_seconds": 5.0, **changes})


def asker(endpoint: Endpoint) -> Ask:
    return lambda request, seconds: post_chat(endpoint, request, seconds)


@dataclass
class Running:
    """A relay that runs, with the lines of its tools' handler served by a thread in place of the worker's main thread."""

    relay: Relay
    budget: Budget
    path: Path

    def exchange(self, line: Any) -> dict[str, Any]:
        """Send one line (an object, or bytes as they are) and return the answer."""
        sent = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self.relay.path))
            connection.sendall(sent)
            with connection.makefile("rb") as incoming:
                return json.loads(incoming.readline())

    def chat(self, **changes: Any) -> dict[str, Any]:
        return self.exchange({"kind": "chat", "request": {**REQUEST, **changes}})

    def tool(self, name: str, **arguments: Any) -> dict[str, Any]:
        return self.exchange({"kind": "tool", "name": name, "arguments": arguments})

    def events(self) -> Transcript:
        return load(self.path)


def takes_manifest(axis: str | None = None, others: Handler | None = None) -> Handler:
    """A handler that takes a valid manifest and answers every other tool alike."""

    def handle(name: str, arguments: Mapping[str, Any]) -> ToolAnswer:
        if name != "finish":
            return others(name, arguments) if others else ToolAnswer("done")
        try:
            read_manifest(dict(arguments), axis)
        except BadManifest as bad:
            return ToolAnswer(failure=bad.kind, what=str(bad))
        return ToolAnswer("accepted")

    return handle


@contextmanager
def running(
    folder: Path, ask: Ask, *, limits: Limits = LIMITS, endpoint: Endpoint | None = None, handler: Handler | None = None,
    clock: Callable[[], float] | None = None, pause_seconds: float = 0.01, line_seconds: float = 1.0,
) -> Iterator[Running]:  # fmt: skip
    budget = Budget(limits, clock) if clock else Budget(limits)
    path = folder / "transcript.jsonl"
    relay = Relay(
        folder / "relay", _uid(), endpoint or agents_endpoint(), ask, budget, Writer(path), pause_seconds=pause_seconds,
        line_seconds=line_seconds,
    )  # fmt: skip
    ended, troubles = threading.Event(), list[BaseException]()

    def serve() -> None:
        try:
            relay.tools.serve(handler or takes_manifest(), ended.is_set)
        except BaseException as trouble:
            troubles.append(trouble)

    thread = threading.Thread(target=serve)
    try:
        with relay:
            thread.start()
            yield Running(relay, budget, path)
            ended.set()
            thread.join(10)
    finally:
        ended.set()
    if troubles:
        raise troubles[0]


def _uid() -> int:
    import os

    return os.geteuid()


def play(running: Running, axis: str | None = None, most: int = 60) -> str:
    """Play a stranger's loop: ask, carry out every tool call, until a manifest is taken or a call fails. Returns how it ended."""
    schema = {
        "type": "function",
        "function": {"name": "finish", "parameters": {"properties": {"axis": {"enum": [axis]}}}},
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Work on one arm."},
        {"role": "user", "content": f"axis {axis}"},
    ]
    for _ in range(most):
        reply = running.chat(messages=messages, tools=[schema], max_tokens=4096)
        if not reply["ok"]:
            return str(reply["failure"])
        try:
            message = json.loads(reply["answer"])["choices"][0]["message"]
            calls = [
                (call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in message.get("tool_calls") or []
            ]
        except (ValueError, KeyError, IndexError, TypeError):
            messages += [
                {"role": "assistant", "content": "(no text)"},
                {"role": "user", "content": "That was no answer."},
            ]
            continue
        if not calls:
            messages += [
                {"role": "assistant", "content": message["content"] or "(no text)"},
                {"role": "user", "content": "Go on."},
            ]
            continue
        renamed = [{**call, "id": f"c{len(messages)}x{number}"} for number, call in enumerate(message["tool_calls"])]
        messages.append({"role": "assistant", "content": message["content"], "tool_calls": renamed})
        for call, (name, arguments) in zip(renamed, calls, strict=True):
            result = running.tool(name, **arguments)
            if name == "finish" and result["ok"]:
                return "finished"
            text = result["output"] if result["ok"] else f"{name} failed ({result['failure']}): {result['what']}"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
    return "steps"
