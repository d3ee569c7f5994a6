"""Why a call of a model gave no usable answer: the kinds of failure, their cures, and what of an error may be told.

An error status becomes a kind by its number and by which of our own parameters its body names. Nothing else of the body is kept,
because it may hold anything: an address, a key, or instructions.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

from pipeline.campaign.errors import WorkFailed

MAX_ANSWER_BYTES = 1 << 20
_CURES: Mapping[str, str] = {
    "endpoint_unreachable": "Check {at}.url, and the network and proxy of the job",
    "endpoint_tls": "Set SSL_CERT_FILE to the certificates of the site, if it has its own",
    "endpoint_timeout": "Set a longer {at}.timeout_seconds in a new campaign, or use a faster endpoint",
    "endpoint_status": "Look into the endpoint's own log, which says what it did not accept",
    "endpoint_parameter": "Start a new campaign that leaves it out ({at}.leave_out) or sets it ({at}.add, model)",
    "endpoint_context": "Use a model with a longer context, or have its server allow one",
    "endpoint_credentials": "Put a valid API key with access to the model where {at}.api_key_env or {at}.api_key_file says",
    "endpoint_address": "Set {at}.url to an address of /v1/chat/completions, and {at}.model to a model that it has",
    "endpoint_limit": "Raise the account's limit or balance at the provider; a later call may be answered",
    "endpoint_server": "Look into the endpoint's own log or status page; a later call may be answered",
    "endpoint_redirect": "Put the final address into {at}.url",
    "endpoint_too_large": "Use an endpoint that answers with at most 1 MiB",
    "endpoint_broken": "Check that {at}.url has the right scheme and port",
    "endpoint_key": "Put the key there for the job that asks, or configure none",
    "endpoint_not_served": "See the job `agent` in `status`, and agent_server/vllm.log of the round; `rerun` starts the arm again, with a server",
    "endpoint_key_echoed": "Replace the key at its provider",
}  # fmt: skip
KINDS = tuple(_CURES)
"""Kinds of failure of a call. They are stable codes in the sealed log and in transcripts."""
PARAMETERS = (
    "response_format", "json_schema", "max_completion_tokens", "max_tokens", "temperature", "seed", "additionalProperties", "maxItems",
    "reasoning_effort", "top_p", "tool_choice", "model", "messages", "strict", "stream", "schema",
)  # fmt: skip
"""What an error of an endpoint may be about, as far as it is told: names of this list, never text of the endpoint's."""
_NAMES = re.compile(rf"(?P<quote>[\"'`])?\b(?P<name>{'|'.join(PARAMETERS)})\b(?!\\?[\"']\s*:)")
_PLAIN_WORDS = ("model", "messages", "strict", "stream", "schema")  # count only where they are quoted
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


class CallFailed(WorkFailed):
    """A call of a model gave no usable answer. `kind` is a stable code. The message has no text of the endpoint's.

    may_pass: whether the same call may be answered later. retry_after: seconds that the endpoint asks to wait, None if it says nothing.
    """

    may_pass = False
    retry_after: int | None = None

    def __init__(self, kind: str, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.kind = kind


class EndpointFailed(CallFailed):
    """The endpoint gave no usable answer. `kind` is one of KINDS; at: the group of settings that names it, for the cure."""

    def __init__(
        self, kind: str, what: str, at: str, *, may_pass: bool = False, retry_after: int | None = None
    ) -> None:  # fmt: skip
        super().__init__(kind, what, cures(at)[kind])
        self.may_pass, self.retry_after = may_pass, retry_after


def cures(at: str) -> dict[str, str]:
    """Return kind -> cure for the group of settings `at`, such as policy.proposals."""
    return {kind: cure.format(at=at) for kind, cure in _CURES.items()}


def of_status(status: int, retry_after: str, body: bytes, at: str) -> EndpointFailed:
    """Turn an error status into a failure. retry_after, body: what the endpoint says more, of which no text is kept."""
    if 300 <= status < 400:
        return EndpointFailed("endpoint_redirect", "the endpoint sends elsewhere", at)
    kind = "endpoint_server" if status >= 500 else _STATUS.get(status, "endpoint_status")
    named = named_in(body)
    if kind == "endpoint_status" and (named or _TOO_LONG.search(body)):
        kind, named = ("endpoint_context", "") if _TOO_LONG.search(body) else ("endpoint_parameter", named)
    words = named or _WORDS.get(kind, "")
    seconds = _seconds_of(retry_after.strip())
    if kind == "endpoint_limit" and _UNPAID.search(body):
        words = ": the account's quota or balance is used up"
    elif kind == "endpoint_limit" and seconds is not None:
        words += f", and asks to wait {seconds} s"
    # Words such as quota and billing stand in the refusals of limits by the minute too, so they are no sign that waiting is in vain.
    may_pass = kind == "endpoint_server" or (status == 429 and b"insufficient_quota" not in body)
    what = f"the endpoint answers with status {status}{words}"
    return EndpointFailed(kind, what, at, may_pass=may_pass, retry_after=seconds if may_pass else None)


def _seconds_of(retry_after: str) -> int | None:
    """Seconds from now that a Retry-After header means, which is a number or a date; None for anything else."""
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", retry_after):
        return math.ceil(float(retry_after))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0, math.ceil(parsedate_to_datetime(retry_after).timestamp() - time.time()))
    return None


def named_in(error: bytes) -> str:
    """Return the phrase " and names temperature, seed" with the PARAMETERS that an endpoint's error is about, "" for none.

    It is made of this module's own words, because the error may hold anything: an address, a key, or instructions.
    """
    found = _NAMES.finditer(error.decode("utf-8", "replace"))
    names = [match["name"] for match in found if match["quote"] or match["name"] not in _PLAIN_WORDS]
    return f" and names {', '.join(dict.fromkeys(names))}" if names else ""
