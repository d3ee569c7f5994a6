"""POST one request to an OpenAI-compatible /v1/chat/completions endpoint and return the exact bytes of its answer.

The endpoint may be slow, endless, broken or hostile. The whole call therefore has one deadline and the answer a maximal size, the
client follows no redirect and verifies TLS, and it sends the API key only over TLS or to this machine. It reads the key for each call
and puts it into the request's header alone. The key is in no stored bytes and in no error, and an answer that repeats it is dropped.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import queue
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.campaign.errors import ConfigError
from pipeline.config.credentials import is_variable_name
from pipeline.model_calls.failures import MAX_ANSWER_BYTES, EndpointFailed, of_status
from pipeline.model_calls.secret import Secret, read_secret

CHUNK = 1 << 14
Ask = Callable[[bytes, float], bytes]
"""From the exact bytes of a request, and the seconds that the call may take, to the bytes of the answer. Raises failures.CallFailed."""
_ADDED = re.compile(r"(?!(model|messages|.*(key|secret|password|authorization).*)$)[a-z][a-z0-9_]{0,63}", re.IGNORECASE)


@dataclass(frozen=True)
class Use:
    """What an endpoint is used for: the group of settings that names it, as `policy.proposals`, and what its `leave_out` and `add` may have."""

    at: str
    may_leave_out: Sequence[str]
    never_added: Sequence[str] = ()


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, as configured. `api_key_env` and `api_key_file` name where the key is, "" for none; they never hold a key.

    leave_out: names of `use.may_leave_out` that the endpoint does not take. add: further parameters of the request, or other values of ours.
    """

    url: str  # the whole address, such as https://api.example.com/v1/chat/completions
    model: str
    use: Use
    timeout_seconds: float = 120  # for the whole call
    api_key_env: str = ""
    api_key_file: str = ""
    leave_out: Sequence[str] = ()
    add: Mapping[str, Any] = field(default_factory=dict)
    certificate: str = ""  # file with the only certificate that is accepted, and the key to show it too: of the round's own server (served.py)

    def check_settings(self) -> None:
        """Raise ConfigError for an invalid address, model name or parameter, or a key that would be sent in clear."""
        at = self.use.at
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ConfigError(
                f"{at}.url is not an http or https address",
                "Set it to a whole address, such as https://api.example.com/v1/chat/completions",
            )
        if "@" in parts.netloc:
            raise ConfigError(f"{at}.url holds a name or password", "Use api_key_env or api_key_file")
        if not self.model:
            raise ConfigError(f"{at}.model is empty", "Set it to the endpoint's name for its model")
        if self.api_key_env and not is_variable_name(self.api_key_env):
            raise ConfigError(f"{at}.api_key_env may be a key", "Name the variable that holds the key")
        if self.api_key_env and self.api_key_file:
            raise ConfigError(f"{at} names two keys", "Set only one of api_key_env and api_key_file")
        if (self.api_key_env or self.api_key_file) and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise ConfigError(f"{at}.url would have the key sent in clear", "Use https, or an endpoint on this machine")
        if not parts.path.rstrip("/").endswith("/chat/completions"):
            raise ConfigError(
                f"{at}.url ends in {parts.path or 'nothing'!a}, and no endpoint takes a chat there",
                "Set it to the whole address, such as https://api.example.com/v1/chat/completions",
            )
        valid_names = self.use.may_leave_out
        if unknown := sorted(set(self.leave_out) - set(valid_names)):
            raise ConfigError(f"{at}.leave_out names {', '.join(unknown)}", f"Valid: {', '.join(valid_names)}")
        for name, value in self.add.items():
            is_closed = name in self.leave_out or name in self.use.never_added or not _ADDED.fullmatch(name)
            if is_closed or not isinstance(value, str | int | float | bool):
                never = ", ".join(("the model", "a key", *self.use.never_added))
                raise ConfigError(
                    f"{at}.add cannot have {name!a}",
                    f"Valid: a parameter with a string, number, true or false; never {never}, nor what is left out",
                )

    def read_key(self) -> Secret | None:
        """Read the key, or return None where none is configured. Raises EndpointFailed where the place holds no key."""
        return read_secret(self.api_key_env, self.api_key_file, self.use.at)


def encoded(request: Mapping[str, Any]) -> bytes:
    """Return a request as JSON with sorted keys and no white space, so that equal questions give equal bytes.

    It is ASCII, unlike a record, so that no proxy between here and the endpoint changes it. Raises ValueError for NaN and infinities.
    """
    return json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def without(value: Any, names: Sequence[str]) -> Any:
    """Return a JSON value without the members of these names, at any depth."""
    if isinstance(value, Mapping):
        return {name: without(member, names) for name, member in value.items() if name not in names}
    return [without(member, names) for member in value] if isinstance(value, list) else value


def post_chat(endpoint: Endpoint, request: bytes, seconds: float | None = None) -> bytes:
    """Send `request` and return the bytes of the answer. Raises EndpointFailed, and ConfigError as `Endpoint.check_settings`.

    seconds: that the call may take, if these are fewer than the endpoint's own. The call runs in a thread, because nothing else limits
    the time of a name look-up or of headers that arrive byte by byte.
    """
    endpoint.check_settings()
    key = endpoint.read_key()
    seconds = endpoint.timeout_seconds if seconds is None else min(seconds, endpoint.timeout_seconds)
    results: queue.SimpleQueue[bytes | EndpointFailed] = queue.SimpleQueue()
    connections: list[http.client.HTTPConnection] = []

    def call() -> None:
        try:
            results.put(_post(endpoint, request, key, seconds, connections))
        except EndpointFailed as failed:
            results.put(failed)

    threading.Thread(target=call, name="chat", daemon=True).start()
    try:
        answer = results.get(timeout=seconds)
    except queue.Empty:
        for connection in connections:  # its thread reads a head that may drip for ever, and then ends
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        raise _too_late(endpoint, seconds) from None
    if isinstance(answer, EndpointFailed):
        raise answer
    if key and key.stands_in(answer):
        raise EndpointFailed("endpoint_key_echoed", "the answer repeats the API key; it was dropped", endpoint.use.at)
    return answer


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    """The rules of TLS for an endpoint: certificates that the system trusts, or its own alone. Raises OSError where that cannot be read."""
    context = ssl.create_default_context(cafile=endpoint.certificate or None)
    if endpoint.certificate:
        context.load_cert_chain(endpoint.certificate)
    return context


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return  # urllib then raises HTTPError with the status


class _Http(urllib.request.HTTPHandler):
    """Opens connections that `connections` keeps, so that whoever gives a call up can end it."""

    def __init__(self, connections: list[http.client.HTTPConnection]) -> None:
        super().__init__()
        self._kept = connections

    def http_open(self, asked: urllib.request.Request) -> Any:
        return self.do_open(self._made, asked)

    def _made(self, host: str, **given: Any) -> http.client.HTTPConnection:
        self._kept.append(http.client.HTTPConnection(host, **given))
        return self._kept[-1]


class _Https(urllib.request.HTTPSHandler):
    """As _Http, over TLS."""

    def __init__(self, connections: list[http.client.HTTPConnection], context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._kept, self._tls = connections, context

    def https_open(self, asked: urllib.request.Request) -> Any:
        return self.do_open(self._made, asked)

    def _made(self, host: str, **given: Any) -> http.client.HTTPConnection:
        self._kept.append(http.client.HTTPSConnection(host, context=self._tls, **given))
        return self._kept[-1]


def _post(
    endpoint: Endpoint, request: bytes, key: Secret | None, seconds: float, connections: list[http.client.HTTPConnection]
) -> bytes:  # fmt: skip
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    message = urllib.request.Request(endpoint.url, request, headers, method="POST")
    if key:
        message.add_unredirected_header("Authorization", f"Bearer {key.text}")
    deadline = time.monotonic() + seconds
    parts, size = [], 0
    try:
        handlers: list[Any] = [_NoRedirect(), _Http(connections), _Https(connections, tls_context(endpoint))]
        if endpoint.certificate or is_loopback(urlsplit(endpoint.url).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy of the site cannot reach this machine, or a node
        with urllib.request.build_opener(*handlers).open(message, timeout=seconds) as answer:
            while part := answer.read1(CHUNK):
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    what = f"the answer is longer than {MAX_ANSWER_BYTES} bytes"
                    raise EndpointFailed("endpoint_too_large", what, endpoint.use.at)
                if time.monotonic() > deadline:
                    raise _too_late(endpoint, seconds)
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
    except urllib.error.HTTPError as error:
        with error:
            raise of_status(
                error.code, error.headers.get("Retry-After", ""), _body_of(error), endpoint.use.at
            ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(endpoint, error, seconds) from None
    return b"".join(parts)


def _body_of(error: urllib.error.HTTPError) -> bytes:
    """Return the beginning of an error's body; b"" where it cannot be read, because the status says enough."""
    with suppress(OSError, http.client.HTTPException, ValueError):
        return error.read(4 * CHUNK)
    return b""


def _failure(endpoint: Endpoint, error: Exception, seconds: float) -> EndpointFailed:
    """Turn an error of urllib into a kind; its message may hold addresses, so it is dropped."""
    cause, at = getattr(error, "reason", error), endpoint.use.at
    if isinstance(cause, TimeoutError):
        return _too_late(endpoint, seconds)
    if isinstance(cause, ssl.SSLError):
        return EndpointFailed("endpoint_tls", "the endpoint's certificate does not hold", at)
    if isinstance(cause, ConnectionResetError | BrokenPipeError | http.client.IncompleteRead):
        return EndpointFailed("endpoint_broken", "the endpoint ended the connection before its answer was whole", at, may_pass=True)  # fmt: skip
    if isinstance(error, http.client.HTTPException | ValueError):
        return EndpointFailed("endpoint_broken", "what came back is no HTTP", at)
    return EndpointFailed("endpoint_unreachable", "nobody answers", at)


def _too_late(endpoint: Endpoint, seconds: float) -> EndpointFailed:
    return EndpointFailed("endpoint_timeout", f"no whole answer within {seconds:g} s", endpoint.use.at)
