"""A client of one call: POST to an OpenAI-compatible /v1/chat/completions, and its exact bytes back.

The endpoint is outside: it may be slow, endless, broken or hostile. The whole call has one deadline, the answer one size, no
redirect is followed, TLS is verified, and a key goes over TLS or to this machine alone. The key is read when the call is made, from
the variable or file that the configuration names, and stands in the request's header only: not in the bytes that are stored, not in
an error; an answer that repeats it is dropped.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.decision.proposal_gate import MAX_ANSWER_BYTES

CHUNK = 1 << 14
KINDS = (
    "endpoint_unreachable", "endpoint_tls", "endpoint_timeout", "endpoint_status", "endpoint_redirect",
    "endpoint_too_large", "endpoint_broken", "endpoint_key", "endpoint_key_echoed",
)  # fmt: skip
"""Every way in which a call ends without an answer."""


class EndpointFailed(WorkFailed):
    """No answer that can be used; `kind` is one of KINDS. Its words name neither the address nor what came from it."""

    def __init__(self, kind: str, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, as configured. `api_key_env` and `api_key_file` name where a key is, "" for none; they never hold one."""

    url: str  # the whole address, such as https://api.example.com/v1/chat/completions
    model: str
    timeout_seconds: float = 120
    api_key_env: str = ""
    api_key_file: str = ""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for an address that cannot be asked, or not safely."""
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ConfigError(
                "policy.proposals.url is no http or https address",
                "As in https://api.example.com/v1/chat/completions",
            )
        if "@" in parts.netloc:
            raise ConfigError(
                "policy.proposals.url holds a name or password", "Put the key into api_key_env or api_key_file"
            )
        if not self.model:
            raise ConfigError("policy.proposals.model is empty", "The name by which the endpoint knows its model")
        if self.api_key_env and self.api_key_file:
            raise ConfigError("policy.proposals names two keys", "One of api_key_env and api_key_file")
        if (self.api_key_env or self.api_key_file) and parts.scheme == "http" and not is_here(parts.hostname or ""):
            raise ConfigError(
                "policy.proposals.url would have the key sent in clear", "https, or an endpoint of this machine"
            )


@dataclass(frozen=True)
class Secret:
    """A key in memory; printing it prints nothing."""

    text: str = field(repr=False)

    def stands_in(self, answer: bytes) -> bool:
        """Whether an answer repeats it: as it is, with JSON's escapes, or in base 64."""
        read = re.sub(rb"\\u00([0-7][0-9a-fA-F])", lambda code: bytes([int(code[1], 16)]), answer).replace(b"\\", b"")
        coded = base64.b64encode(self.text.encode()).rstrip(b"=")[:-1]
        return any(key in text for key in (self.text.encode(), coded) for text in (answer, read))


def body(endpoint: Endpoint, system: str, user: str, schema_name: str, schema: Any) -> bytes:
    """The request's bytes: sorted keys, no white space, so that the same question is the same bytes.

    In ASCII, which the encoder of records is not: whatever stands before an endpoint passes it on unchanged.
    """
    asked = {
        "model": endpoint.model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "temperature": 0,
        "seed": endpoint.seed,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": schema_name, "strict": True, "schema": schema},
        },
    }
    return json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def post_chat(endpoint: Endpoint, request: bytes) -> bytes:
    """Send `request`, return the answer's bytes as they came. Raises EndpointFailed; ConfigError as `Endpoint.check`.

    The call runs in a thread of its own: looking up a name, or headers that come a byte a minute, have no other deadline.
    """
    endpoint.check()
    key = read_key(endpoint)
    ended: queue.SimpleQueue[bytes | EndpointFailed] = queue.SimpleQueue()

    def call() -> None:
        try:
            ended.put(_post(endpoint, request, key))
        except EndpointFailed as failed:
            ended.put(failed)

    threading.Thread(target=call, name="chat", daemon=True).start()
    try:
        answer = ended.get(timeout=endpoint.timeout_seconds)
    except queue.Empty:
        raise _too_late(endpoint) from None
    if isinstance(answer, EndpointFailed):
        raise answer
    if key and key.stands_in(answer):
        raise EndpointFailed("endpoint_key_echoed", "the answer repeats the API key; it was dropped", "Renew the key")
    return answer


def read_key(endpoint: Endpoint) -> Secret | None:
    """The key, from where the configuration says. Raises EndpointFailed where none is there; its words name the place only."""
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
        raise EndpointFailed("endpoint_key", f"{place} holds no API key", "Set it for the job that asks, or name none")
    return Secret(text)


def is_here(host: str) -> bool:
    """This machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return  # urllib then raises the status itself


def _post(endpoint: Endpoint, request: bytes, key: Secret | None) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    asked = urllib.request.Request(endpoint.url, request, headers, method="POST")
    if key:
        asked.add_unredirected_header("Authorization", f"Bearer {key.text}")
    handlers: list[Any] = [_NoRedirect(), urllib.request.HTTPSHandler(context=ssl.create_default_context())]
    if is_here(urlsplit(endpoint.url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # a site's proxy is not asked for this machine
    late = time.monotonic() + endpoint.timeout_seconds
    parts, size = [], 0
    try:
        with urllib.request.build_opener(*handlers).open(asked, timeout=endpoint.timeout_seconds) as answer:
            while part := answer.read1(CHUNK):
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise EndpointFailed("endpoint_too_large", f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > late:
                    raise _too_late(endpoint)
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            raise EndpointFailed(
                "endpoint_redirect", "the endpoint sends elsewhere", "Put the final address into policy.proposals.url"
            ) from None
        raise EndpointFailed("endpoint_status", f"the endpoint answers with status {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(endpoint, error) from None
    return b"".join(parts)


def _failure(endpoint: Endpoint, error: Exception) -> EndpointFailed:
    """Of what urllib raises; its own words may hold addresses, so only the kind goes on."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return _too_late(endpoint)
    if isinstance(cause, ssl.SSLError):
        return EndpointFailed(
            "endpoint_tls", "the endpoint's certificate does not hold", "SSL_CERT_FILE names a site's own"
        )
    if isinstance(error, http.client.HTTPException | ValueError):
        return EndpointFailed("endpoint_broken", "what came back is no HTTP")
    return EndpointFailed(
        "endpoint_unreachable", "nobody answers", "Look at policy.proposals.url and the job's network"
    )


def _too_late(endpoint: Endpoint) -> EndpointFailed:
    return EndpointFailed("endpoint_timeout", f"no whole answer within {endpoint.timeout_seconds:g} s")
