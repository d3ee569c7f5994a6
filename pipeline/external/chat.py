"""POST one request to an OpenAI-compatible /v1/chat/completions endpoint and return the exact bytes of its answer.

The endpoint may be slow, endless, broken or hostile. The whole call therefore has one deadline and the answer a maximal size, the
client follows no redirect and verifies TLS, and it sends the API key only over TLS or to this machine. It reads the key for each call,
from the variable or file that the configuration names, and puts it into the request's header alone. The key is in no stored bytes and
in no error, and an answer that repeats it is dropped.

An error status becomes a kind of failure, by its number and by which of our own parameters its body names. Nothing else of the body is
kept. What an answer with status 200 may lack instead is told in decision/proposals.py.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import queue
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.config.credentials import is_variable_name
from pipeline.decision.proposal_gate import MAX_ANSWER_BYTES
from pipeline.decision.proposals import named_in

CHUNK = 1 << 14
CURES: Mapping[str, str] = {
    "endpoint_unreachable": "Check policy.proposals.url, and the network and proxy of the job",
    "endpoint_tls": "Set SSL_CERT_FILE to the certificates of the site, if it has its own",
    "endpoint_timeout": "Set a longer policy.proposals.timeout_seconds in a new campaign, or use a faster endpoint",
    "endpoint_status": "Look into the endpoint's own log, which says what it did not accept",
    "endpoint_parameter": "Start a new campaign that leaves it out (policy.proposals.leave_out) or sets it (policy.proposals.add, model)",
    "endpoint_context": "Use a model with a longer context, or have its server allow one",
    "endpoint_credentials": "Put a valid API key with access to the model where api_key_env or api_key_file says",
    "endpoint_address": "Set policy.proposals.url to an address of /v1/chat/completions, and policy.proposals.model to a model that it has",
    "endpoint_limit": "Raise the account's limit or balance at the provider; the next round asks again",
    "endpoint_server": "Look into the endpoint's own log or status page; the next round asks again",
    "endpoint_redirect": "Put the final address into policy.proposals.url",
    "endpoint_too_large": "Use an endpoint that answers with at most 1 MiB",
    "endpoint_broken": "Check that policy.proposals.url has the right scheme and port",
    "endpoint_key": "Put the key there for the job that asks, or configure none",
    "endpoint_key_echoed": "Replace the key at its provider",
}
"""Kind of failure of a call -> its cure. The kinds are stable codes in the sealed log."""
KINDS = tuple(CURES)
LEFT_OUT = ("temperature", "seed", "response_format", "strict", "maxItems", "additionalProperties")
"""What policy.proposals.leave_out may name: parameters of the request, and keywords of the JSON schema in it."""
_ADDED = re.compile(r"(?!(model|messages|.*(key|secret|password|authorization).*)$)[a-z][a-z0-9_]{0,63}", re.IGNORECASE)
_STATUS = {
    401: "endpoint_credentials", 402: "endpoint_limit", 403: "endpoint_credentials", 404: "endpoint_address", 405: "endpoint_address",
    408: "endpoint_timeout", 410: "endpoint_address", 429: "endpoint_limit",
}  # fmt: skip
_TOO_LONG = re.compile(rb"context.?(length|window)|too many tokens|prompt is too long", re.IGNORECASE)
_UNPAID = re.compile(rb"quota|balance|billing|credit", re.IGNORECASE)
_WORDS = {
    "endpoint_credentials": ": it does not accept the API key, or the key may not use the model",
    "endpoint_address": ": it does not know this address or this model",
    "endpoint_limit": ": it takes no more requests now",
    "endpoint_server": ": it failed itself",
    "endpoint_context": ": the request is longer than its model's context",
}


class EndpointFailed(WorkFailed):
    """There is no usable answer. `kind` is one of KINDS. The message has neither the address nor any text that came from it."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what, CURES[kind])
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, as configured. `api_key_env` and `api_key_file` name where the key is, "" for none; they never hold a key.

    leave_out: names of LEFT_OUT that the endpoint does not take. add: further parameters of the request, or other values of ours.
    """

    url: str  # the whole address, such as https://api.example.com/v1/chat/completions
    model: str
    timeout_seconds: float = 120  # for the whole call
    api_key_env: str = ""
    api_key_file: str = ""
    seed: int = 0
    leave_out: Sequence[str] = ()
    add: Mapping[str, Any] = field(default_factory=dict)

    def check_settings(self) -> None:
        """Raise ConfigError for an invalid address, model name or parameter, or a key that would be sent in clear."""
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ConfigError(
                "policy.proposals.url is not an http or https address",
                "Set it to a whole address, such as https://api.example.com/v1/chat/completions",
            )
        if "@" in parts.netloc:
            raise ConfigError("policy.proposals.url holds a name or password", "Use api_key_env or api_key_file")
        if not self.model:
            raise ConfigError("policy.proposals.model is empty", "Set it to the endpoint's name for its model")
        if self.api_key_env and not is_variable_name(self.api_key_env):
            raise ConfigError("policy.proposals.api_key_env may be a key", "Name the variable that holds the key")
        if self.api_key_env and self.api_key_file:
            raise ConfigError("policy.proposals names two keys", "Set only one of api_key_env and api_key_file")
        if (self.api_key_env or self.api_key_file) and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise ConfigError(
                "policy.proposals.url would have the key sent in clear", "Use https, or an endpoint on this machine"
            )
        if unknown := sorted(set(self.leave_out) - set(LEFT_OUT)):
            raise ConfigError(f"policy.proposals.leave_out names {', '.join(unknown)}", f"Valid: {', '.join(LEFT_OUT)}")
        for name, value in self.add.items():
            if name in self.leave_out or not _ADDED.fullmatch(name) or not isinstance(value, str | int | float | bool):
                raise ConfigError(
                    f"policy.proposals.add cannot have {name!a}",
                    "Valid: a parameter with a string, number, true or false; not the model or a key, nor what is left out",
                )


@dataclass(frozen=True)
class Secret:
    """An API key in memory; its repr does not show it."""

    text: str = field(repr=False)

    def stands_in(self, answer: bytes) -> bool:
        """Whether an answer contains the key: plain, with JSON's escapes, or in base 64."""
        unescaped = re.sub(rb"\\u00([0-7][0-9a-fA-F])", lambda code: bytes([int(code[1], 16)]), answer).replace(
            b"\\", b""
        )
        coded = base64.b64encode(self.text.encode()).rstrip(b"=")[:-1]
        return any(key in text for key in (self.text.encode(), coded) for text in (answer, unescaped))


def body(endpoint: Endpoint, system: str, user: str, schema_name: str, schema: Any) -> bytes:
    """Return the request as JSON with sorted keys and no white space, so that equal questions give equal bytes.

    It is ASCII, unlike a record, so that no proxy between here and the endpoint changes it. schema: JSON schema of the answer.
    """
    request: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "temperature": 0,
        "seed": endpoint.seed,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": schema_name, "strict": True, "schema": schema},
        },
    }
    request["response_format"] = _without(request["response_format"], endpoint.leave_out)
    request = {name: value for name, value in request.items() if name not in endpoint.leave_out} | dict(endpoint.add)
    return json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _without(value: Any, names: Sequence[str]) -> Any:
    """Return a JSON value without the members of these names, at any depth."""
    if isinstance(value, Mapping):
        return {name: _without(member, names) for name, member in value.items() if name not in names}
    return [_without(member, names) for member in value] if isinstance(value, list) else value


def post_chat(endpoint: Endpoint, request: bytes) -> bytes:
    """Send `request` and return the bytes of the answer. Raises EndpointFailed, and ConfigError as `Endpoint.check_settings`.

    The call runs in a thread, because nothing else limits the time of a name look-up or of headers that arrive byte by byte.
    """
    endpoint.check_settings()
    key = read_key(endpoint)
    results: queue.SimpleQueue[bytes | EndpointFailed] = queue.SimpleQueue()

    def call() -> None:
        try:
            results.put(_post(endpoint, request, key))
        except EndpointFailed as failed:
            results.put(failed)

    threading.Thread(target=call, name="chat", daemon=True).start()
    try:
        answer = results.get(timeout=endpoint.timeout_seconds)
    except queue.Empty:
        raise _too_late(endpoint) from None
    if isinstance(answer, EndpointFailed):
        raise answer
    if key and key.stands_in(answer):
        raise EndpointFailed("endpoint_key_echoed", "the answer repeats the API key; it was dropped")
    return answer


def read_key(endpoint: Endpoint) -> Secret | None:
    """Read the key, or return None where none is configured. Raises EndpointFailed where the place holds no key."""
    if endpoint.api_key_env:
        place, text = f"the variable {endpoint.api_key_env}", os.environ.get(endpoint.api_key_env, "")
    elif endpoint.api_key_file:
        place = "the file that policy.proposals.api_key_file names"
        try:
            text = Path(endpoint.api_key_file).read_text("ascii")
        except (OSError, UnicodeDecodeError):
            text = ""
    else:
        return None
    text = text.strip()
    if not (text and text.isascii() and text.isprintable()):
        raise EndpointFailed("endpoint_key", f"{place} holds no API key")
    return Secret(text)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return  # urllib then raises HTTPError with the status


def _post(endpoint: Endpoint, request: bytes, key: Secret | None) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    message = urllib.request.Request(endpoint.url, request, headers, method="POST")
    if key:
        message.add_unredirected_header("Authorization", f"Bearer {key.text}")
    handlers: list[Any] = [_NoRedirect(), urllib.request.HTTPSHandler(context=ssl.create_default_context())]
    if is_loopback(urlsplit(endpoint.url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy of the site cannot reach this machine
    deadline = time.monotonic() + endpoint.timeout_seconds
    parts, size = [], 0
    try:
        with urllib.request.build_opener(*handlers).open(message, timeout=endpoint.timeout_seconds) as answer:
            while part := answer.read1(CHUNK):
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise EndpointFailed("endpoint_too_large", f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise _too_late(endpoint)
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
    except urllib.error.HTTPError as error:
        with error:
            raise _of_status(error.code, error.headers.get("Retry-After", ""), _body_of(error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(endpoint, error) from None
    return b"".join(parts)


def _body_of(error: urllib.error.HTTPError) -> bytes:
    """Return the beginning of an error's body; b"" where it cannot be read, because the status says enough."""
    with suppress(OSError, http.client.HTTPException, ValueError):
        return error.read(4 * CHUNK)
    return b""


def _of_status(status: int, retry_after: str, body: bytes) -> EndpointFailed:
    """Turn an error status into a kind of failure. retry_after, body: what the endpoint says more, of which no text is kept."""
    if 300 <= status < 400:
        return EndpointFailed("endpoint_redirect", "the endpoint sends elsewhere")
    kind = "endpoint_server" if status >= 500 else _STATUS.get(status, "endpoint_status")
    named = named_in(body)
    if kind == "endpoint_status" and (named or _TOO_LONG.search(body)):
        kind, named = ("endpoint_context", "") if _TOO_LONG.search(body) else ("endpoint_parameter", named)
    words = named or _WORDS.get(kind, "")
    if kind == "endpoint_limit" and _UNPAID.search(body):
        words = ": the account's quota or balance is used up"
    elif kind == "endpoint_limit" and re.fullmatch(r"[0-9]{1,6}", retry_after.strip()):
        words += f", and asks to wait {int(retry_after)} s"
    return EndpointFailed(kind, f"the endpoint answers with status {status}{words}")


def _failure(endpoint: Endpoint, error: Exception) -> EndpointFailed:
    """Turn an error of urllib into a kind; its message may hold addresses, so it is dropped."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return _too_late(endpoint)
    if isinstance(cause, ssl.SSLError):
        return EndpointFailed("endpoint_tls", "the endpoint's certificate does not hold")
    if isinstance(error, http.client.HTTPException | ValueError):
        return EndpointFailed("endpoint_broken", "what came back is no HTTP")
    return EndpointFailed("endpoint_unreachable", "nobody answers")


def _too_late(endpoint: Endpoint) -> EndpointFailed:
    return EndpointFailed("endpoint_timeout", f"no whole answer within {endpoint.timeout_seconds:g} s")
