"""Reads a chat completion as endpoints write it, into text and tool calls, or says what is wrong with it.

    {"choices": [{"message": {"content": null, "tool_calls": [{"id": "a", "type": "function",
      "function": {"name": "read", "arguments": "{\\"path\\": \\"substrate/recipes/rft.py\\"}"}}]}, "finish_reason": "tool_calls"}]}

An answer is carried out whole or not at all: one whose reading fails at any call, or that was cut, gives a BadAnswer and no call. Of
several choices the first is taken. Ids are given anew, because endpoints leave them out, repeat them, or draw them at random. A
reasoning text is not kept.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from substrate.interface.command_line import parse_object

MOST_ANSWER_BYTES = (
    1 << 20
)  # json makes objects of up to 40 times the size, and a request that repeats it is up to 4 times as long
MOST_CALLS = 16  # each has an output of 16 KiB, and all of them must fit into a context
MOST_TEXT_CHARACTERS = 16 << 10  # of the model's own words that are kept
_CUT = ("length", "max_tokens", "insufficient_system_resource", "abort", "error")
MOST_DEPTH = 16  # of arguments; the manifest has 3, and the encoder of a request fails at about 1,000
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what endpoints take back in a later request
_REASONING = ("reasoning_content", "reasoning")


@dataclass(frozen=True)
class Call:
    """One tool call. `id` is ours: nine letters and digits, which every endpoint takes."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A readable answer. It may have no call."""

    text: str
    calls: tuple[Call, ...]


class BadAnswer(Exception):
    """The answer cannot be carried out. `code` is stable; the message is for the model, and says what to do instead."""

    def __init__(self, code: str, what: str, text: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.text = text  # what of the answer can be shown to the model as its own


def read_answer(content: str, number: int) -> Answer:
    """Reads an endpoint's answer. number: the answer's place in the session, from 1. Raises BadAnswer."""
    size = len(content.encode("utf-8", "surrogatepass"))
    if size > MOST_ANSWER_BYTES:
        raise BadAnswer("too_large", f"it has {size} bytes, and at most {MOST_ANSWER_BYTES} are read")
    try:
        envelope = parse_object(content)
    except ValueError as error:
        raise BadAnswer(
            "not_json", f"it is not the JSON of a chat completion ({ascii(str(error))[1:-1][:200]})"
        ) from None
    choices = envelope.get("choices")
    if envelope.get("error") is not None and not choices:
        raise BadAnswer("error_body", "the endpoint wrote an error in its place")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadAnswer("no_choice", "it has no choice")
    message, ended = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        raise BadAnswer("no_message", "its choice has no message")
    text = _text_of(message)
    if ended in _CUT:
        raise _cut(message, text)
    if ended == "content_filter":
        raise BadAnswer("filtered", "a content filter removed part of it. Say it in other words", text)
    calls = _calls_of(message, text)
    if len(calls) > MOST_CALLS:
        raise BadAnswer(
            "too_many_calls", f"it has {len(calls)} tool calls; make at most {MOST_CALLS} in one answer", text
        )
    return Answer(text, tuple(_read_call(call, f"c{number:04d}{place:04d}", text) for place, call in enumerate(calls)))


def _text_of(message: dict[str, Any]) -> str:
    """Returns the text of a message whose content is a text, a list of parts, or absent; a refusal's text counts as text."""
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    if isinstance(content, list):
        parts = [part.get("text") or part.get("refusal") or "" for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise BadAnswer("bad_content", "the content of its message is neither a text nor a list of parts")
    spoken = content.rpartition("</think>")[2]  # a server without a parser of reasoning leaves it in the content
    return spoken[:MOST_TEXT_CHARACTERS].encode("utf-8", "replace").decode()


def _cut(message: dict[str, Any], text: str) -> BadAnswer:
    reasoned = any(isinstance(message.get(name), str) and message[name].strip() for name in _REASONING)
    if (reasoned or "<think>" in text) and not message.get("tool_calls"):
        return BadAnswer(
            "cut_by_reasoning", "your reasoning used up all of its tokens. Think less, and call one tool", text
        )
    advice = "Write less at once: one tool call, and `patch` in place of a long `write`"
    return BadAnswer("cut", f"it was cut before its end. {advice}", text)


def _calls_of(message: dict[str, Any], text: str) -> list[Any]:
    """Returns the `function` of each call as it came, also of the older form with one `function_call`."""
    calls = message.get("tool_calls")
    if not calls:
        old = message.get("function_call")
        return [] if old is None else [old]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadAnswer("bad_calls", "its tool_calls are no list of objects", text)
    return [call.get("function") for call in calls]


def _read_call(function: Any, identity: str, text: str) -> Call:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadAnswer("bad_calls", "one of its tool calls has no name of letters, digits, _ and -", text)
    arguments = function.get("arguments")
    try:
        # A text is OpenAI's form; some servers write the object itself, and some "" where a tool needs nothing.
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        read = parse_object(written.strip() or "{}")
        _check_numbers_and_depth(read)
    except (ValueError, RecursionError) as error:
        why = ascii(str(error))[1:-1][:200]
        raise BadAnswer("bad_calls", f"the arguments of its call of {name} are no JSON object ({why})", text) from None
    return Call(identity, name, read)


def _check_numbers_and_depth(value: Any) -> None:
    """Raises ValueError for a number that JSON cannot have, and for a value nested deeper than MOST_DEPTH."""
    level = [value]
    for _ in range(MOST_DEPTH):
        if not level:
            json.dumps(value, allow_nan=False)
            return
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
