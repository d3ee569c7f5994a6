"""What an agent's loop may ask of a model, and the exact bytes that are sent for it.

A loop names messages, tools, and a few numbers. Nothing that it sends can name another model, address or header, or have the endpoint
open an address: the content of a message is text alone, and a tool is a function. The model and everything else come from the
configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.model_calls.endpoint import Endpoint, Use, encoded, without
from pipeline.model_calls.failures import CallFailed

USE = Use(
    "worker.endpoint",
    ("temperature", "seed", "tool_choice", "max_tokens", "strict", "additionalProperties"),
    ("messages", "tools", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "stream"),
)
"""The settings that name an agent's endpoint. `add` cannot have what would let an answer cost more than its budget, or arrive in pieces."""
FIELDS = ("messages", "tools", "tool_choice", "temperature", "seed", "max_tokens")
_ROLES = ("system", "user", "assistant", "tool")
_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class BadRequest(CallFailed):
    """What came through the socket is no request that the relay knows."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__("bad_request", what, cure)


def checked(request: Any) -> dict[str, Any]:
    """Return a loop's request, all of whose members are as FIELDS allow. Raises BadRequest, which names the first that is not."""
    if not isinstance(request, dict):
        raise BadRequest("a request of a chat is no object", f"Valid members: {', '.join(FIELDS)}")
    _known(request, FIELDS, "a request")
    messages, tools = request.get("messages"), request.get("tools", [])
    _need(isinstance(messages, list) and bool(messages), "messages", "a list of at least one message")
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        _check_message(message, f"messages[{number}]")
    _need(isinstance(tools, list), "tools", "a list of functions")
    for number, tool in enumerate(tools):
        _check_tool(tool, f"tools[{number}]")
    choice = request.get("tool_choice", "auto")
    _need(
        choice in ("auto", "none", "required") or _is_named_choice(choice),
        "tool_choice",
        "auto, none, required, or one function",
    )
    temperature, seed = request.get("temperature", 0), request.get("seed", 0)
    _need(
        isinstance(temperature, int | float) and not isinstance(temperature, bool) and 0 <= temperature <= 2,
        "temperature",
        "0 to 2",
    )
    _need(_is_whole(seed) and 0 <= seed < 2**53, "seed", "a whole number from 0 to below 2^53")
    most = request.get("max_tokens", 1)
    _need(_is_whole(most) and most >= 1, "max_tokens", "a whole number from 1 on")
    return request


def fitted(endpoint: Endpoint, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked request whose tools lack the keywords that the endpoint does not take. What a prompt may cost is bounded by this form."""
    keywords = [name for name in endpoint.leave_out if name in ("strict", "additionalProperties")]
    return {**request, "tools": without(request["tools"], keywords)} if "tools" in request else dict(request)


def compose(endpoint: Endpoint, request: Mapping[str, Any], max_tokens: int) -> bytes:
    """Return the exact bytes that are sent: the allowed members of a checked request, and what the configuration adds and leaves out.

    max_tokens: the most tokens of the answer, as the budget allows them. Where the configuration leaves the name `max_tokens` out, the
    newer name max_completion_tokens carries it, because a call without a limit has no budget.
    """
    chosen = {name: value for name, value in request.items() if name not in ("max_tokens", *endpoint.leave_out)}
    chosen = fitted(endpoint, chosen)
    limit = "max_completion_tokens" if "max_tokens" in endpoint.leave_out else "max_tokens"
    return encoded({**chosen, **endpoint.add, "model": endpoint.model, limit: max_tokens})


def _check_message(message: Any, at: str) -> None:
    _need(isinstance(message, dict), at, "an object with role and content")
    _known(message, ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"), at)
    _need(message.get("role") in _ROLES, f"{at}.role", f"one of {', '.join(_ROLES)}")
    for name in ("content", "reasoning_content", "reasoning"):
        _need(isinstance(message.get(name), str | None), f"{at}.{name}", "a text or null: parts could name addresses")
    for name in ("name", "tool_call_id"):
        _need(name not in message or isinstance(message[name], str), f"{at}.{name}", "a text")
    calls = message.get("tool_calls", [])
    _need(isinstance(calls, list), f"{at}.tool_calls", "a list")
    for number, call in enumerate(calls):
        here = f"{at}.tool_calls[{number}]"
        _need(isinstance(call, dict) and call.get("type") == "function" and isinstance(call.get("id"), str), here,
              "an object with id, the type function, and function")  # fmt: skip
        _known(call, ("id", "type", "function"), here)
        function = call.get("function")
        _need(isinstance(function, dict) and all(isinstance(function.get(name), str) for name in ("name", "arguments")),
              f"{here}.function", "an object with the texts name and arguments")  # fmt: skip
        _known(function, ("name", "arguments"), f"{here}.function")


def _check_tool(tool: Any, at: str) -> None:
    _need(isinstance(tool, dict) and tool.get("type") == "function", at, "an object of the type function")
    _known(tool, ("type", "function"), at)
    function = tool.get("function")
    _need(isinstance(function, dict), f"{at}.function", "an object")
    _known(function, ("name", "description", "parameters", "strict"), f"{at}.function")
    name = function.get("name")
    _need(isinstance(name, str) and bool(_TOOL_NAME.fullmatch(name)), f"{at}.function.name", "letters, digits, _ and -")
    kinds: Mapping[str, Any] = {"description": str, "parameters": dict, "strict": bool}
    for member, kind in kinds.items():
        _need(member not in function or isinstance(function[member], kind), f"{at}.function.{member}", kind.__name__)


def _is_named_choice(choice: Any) -> bool:
    return (
        isinstance(choice, dict) and set(choice) == {"type", "function"} and choice["type"] == "function"
        and isinstance(choice["function"], dict) and set(choice["function"]) == {"name"} and isinstance(choice["function"]["name"], str)
    )  # fmt: skip


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _known(value: Mapping[str, Any], names: tuple[str, ...], at: str) -> None:
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise BadRequest(
            f"{at} has {ascii(unknown[0])[:60]}, which a loop may not set", f"Valid members: {', '.join(names)}"
        )


def _need(holds: Any, at: str, valid: str) -> None:
    if not holds:
        raise BadRequest(f"{at} is not valid", f"Valid: {valid}")
