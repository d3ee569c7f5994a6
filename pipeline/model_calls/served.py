"""The round's own model server, as those see it who ask it: where it is, and how its restarts are followed.

`worker.endpoint.url=served` has no address before the server's job runs on some node (model_server.py). The server writes one into
`agent_server/address.json` of the round once it answers, and removes it when it stops. A worker reads address, certificate and key again for
each call. Both sides show the round's own certificate and accept no other, so nobody else on the network reads or makes a call.
"""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline.campaign.errors import ConfigError, PipelineError
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Round
from pipeline.config.policy_schema import Worker
from pipeline.model_calls.endpoint import Endpoint, post_chat, tls_context
from pipeline.model_calls.failures import EndpointFailed

POLL_SECONDS = 0.5
PROBE_SECONDS = 10.0  # that a server may take to say that it lives
MAY_PASS = ("endpoint_unreachable", "endpoint_broken", "endpoint_tls", "endpoint_credentials", "endpoint_key", "endpoint_timeout")  # fmt: skip
"""Failures that a restart of the server explains: a worker may read its old address with its new key."""


@dataclass(frozen=True)
class Address:
    """What `address.json` says. start: counts the starts of the server, so that each has another. failed: why none follows, or empty."""

    url: str
    start: str
    failed: str = ""


def read_address(folder: Round) -> Address | None:
    """Return what the server of a round says of itself; None before it says anything, and once it has stopped."""
    try:
        content: dict[str, Any] = read_json(folder.server_address)
        return Address(str(content["url"]), str(content["start"]), str(content["failed"]))
    except (OSError, PipelineError, KeyError, TypeError):
        return None


def stage(folder: Round, worker: Worker, arms: Sequence[str]) -> tuple[str, ...] | None:
    """The stage that serves the model of these arms of a frozen round, such as a3; None where none of them asks it.

    Each arm is named with the number of its attempts now: it has ended with the result of a later attempt. What an earlier server left about
    its failure is removed, because these arms wait for another one.
    """
    if not worker.is_served:
        return None
    if (said := read_address(folder)) and said.failed:
        folder.server_address.unlink(missing_ok=True)
    mine = [arm.name for arm in folder.frozen_plan().arms if worker.runs(arm.role) and arm.name in arms]
    named = [f"{name}={len(folder.attempts(name))}" for name in mine]
    return ("serve", str(folder.campaign.folder), folder.name, *named) if named else None


def arms_left(folder: Round, named: Sequence[str], worker: Worker) -> list[str]:
    """Return the arms that may still ask. named: as in `stage`, such as a3=1; empty for all that an agent runs.

    Raises ConfigError for an arm that no agent of the round runs.
    """
    mine = {arm.name: 0 for arm in folder.frozen_plan().arms if worker.runs(arm.role)}
    for word in named:
        name, _, number = word.partition("=")
        if name not in mine or not (number or "0").isdecimal():
            raise ConfigError(
                f"{word!r} is no arm of {folder.name} that an agent runs", f"Valid: {', '.join(mine)}, also as a3=1"
            )
    before = {name: int(number or 0) for name, _, number in (word.partition("=") for word in named)} or mine
    return [name for name, number in before.items()
            if not any(each.number >= number and each.result.exists() for each in folder.attempts(name))]  # fmt: skip


@dataclass
class Served:
    """An endpoint whose address the round's folder says. Several threads may ask; `give_up` says that the worker is to stop."""

    folder: Round
    model: Endpoint
    wait_seconds: float
    give_up: Callable[[], bool] = lambda: False
    lost: str = ""  # the start of the server that did not answer

    def ask(self, request: bytes, seconds: float) -> bytes:
        """As `post_chat`, to the server that runs now; one that was lost is waited for. Raises EndpointFailed."""
        begun = time.monotonic()
        at = self.wait(min(seconds, self.wait_seconds))
        try:
            return post_chat(self.at(at), request, max(0.001, seconds - (time.monotonic() - begun)))
        except EndpointFailed as failed:
            if failed.kind in MAY_PASS:
                self.lost, failed.may_pass = at.start, True
            raise

    def at(self, address: Address) -> Endpoint:
        """The endpoint at an address, with the round's key and certificate."""
        key, certificate = str(self.folder.server_key), str(self.folder.server_certificate)
        return replace(self.model, url=address.url, api_key_file=key, certificate=certificate)

    def wait(self, seconds: float) -> Address:
        """Wait until the server answers, for so many seconds at most. Raises EndpointFailed (endpoint_not_served)."""
        deadline, use = time.monotonic() + seconds, self.model.use.at
        while True:
            at = read_address(self.folder)
            if at and at.failed:
                raise EndpointFailed("endpoint_not_served", f"the round's model server ended: {at.failed}", use)
            if at and (at.start != self.lost or is_alive(self.at(at))):
                self.lost = "" if at.start == self.lost else self.lost
                return at
            if time.monotonic() >= deadline or self.give_up():
                what = f"the round's model server did not come within {seconds:g} s"
                raise EndpointFailed("endpoint_not_served", what, use)
            time.sleep(POLL_SECONDS)

    def wait_first(self) -> None:
        """Wait for the first server before a session's clock starts. A failure is left to the first call, which records it."""
        with suppress(EndpointFailed):
            self.wait(self.wait_seconds)
            return
        self.wait_seconds = 0.0


def is_alive(endpoint: Endpoint) -> bool:
    """Whether a server answers: it is healthy, and serves the model of the endpoint. It is asked as vLLM is, at /health and /v1/models."""
    try:
        key = endpoint.read_key()
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls_context(endpoint))
        )
        for path in ("/health", "/v1/models"):
            headers = {"Authorization": f"Bearer {key.text}"} if key else {}
            request = urllib.request.Request(urlunsplit((*urlsplit(endpoint.url)[:2], path, "", "")), headers=headers)
            with opener.open(request, timeout=PROBE_SECONDS) as answer:
                said = answer.read(1 << 20)
        return f'"{endpoint.model}"'.encode() in said
    except (EndpointFailed, OSError, http.client.HTTPException, ssl.SSLError, ValueError):
        return False
