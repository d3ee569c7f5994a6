"""What looks like a credential: it is masked where a program's words are kept, and refused where a setting names where a key is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pipeline.config.policy_schema import ModelEndpoint

SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|USERNAME)", re.IGNORECASE)  # of environment variables
NOT_INHERITED = re.compile(r"(token|secret|passw|api_?key|credential)", re.IGNORECASE)
"""Matches the name of an environment variable that a Slurm job is not given, because its value is likely to be a secret."""
_KEYS = (
    r"(?<![A-Za-z0-9])(?:(?:sk|rk|pk)[-_][\w-]{6,}|KGAT_\S+|eyJ[\w-]{6,1000}\.[\w.-]+|github_pat_\w{6,}|gh[a-z]_[A-Za-z0-9]{6,}|glpat-[\w-]{6,}"
    r"|hf_(?:(?=[a-z]{0,40}\d)[a-z0-9]{6,}|[a-z0-9]{16,})|(?:gsk|xai|r8|api_org)[-_][A-Za-z0-9]{16,}|nvapi-[\w-]{6,}|xox[a-z]-[\w-]{6,}"
    r"|A[KS]IA[A-Z0-9]{12,}|AIza[\w-]{20,})"
)
"""Keys that their services give a beginning by which one knows them: OpenAI, Kaggle, GitHub, Hugging Face, AWS and others; and JWTs."""
_NAMED = (
    r"(?:key|key_?id|token|secret|passw(?:or)?d|passphrase|pwd|sig|signature|credentials?|session|session_?id|auth)"
)
_SCHEME = r"(?:(?:bearer|basic|token|digest|negotiate|oauth|apikey|key|ntlm|hawk|aws4-hmac-sha256)[ ]+)?+"
_MASKED = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*KEY-----|$)|\b[0-9a-f]{32,}\b|(?<=://)[^/\s@]+@"
    rf"|(?:set-)?cookie2?[\"']?\s*[:=]\s*[\"']?[^\s;,\"']+(?:;\s*[^\s;,=\"']+=[^\s;,\"']+)*|{_KEYS}"
    rf"|(?P<before>\bauthorization[\"']?\s*[:=]\s*[\"']?{_SCHEME}|\bbearer\s+|\bbasic\s+(?=\S{{16}})"  # headers
    rf"|{_NAMED}\s?=\s?[\"']?|{_NAMED}[\"']\s*:\s*[\"']"  # parts of an address, assignments, and JSON
    rf"|{_NAMED}:\s*(?=[^\s\"',;]{{0,200}}\d)(?=[^\s\"',;]{{8}})|(?:passw(?:or)?d|secret|passphrase):\s*)"  # headers and words such as X-Api-Key
    r"(?!\s*\*\*\*)[^\s\"',;&}]+(?:[ ]+(?=\S{0,200}\d)[^\s\"',;]{12,})?",
    re.IGNORECASE | re.DOTALL,
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,60}")
_NO_NAME = re.compile(rf"{_KEYS}|[A-Za-z0-9]{{24}}|(?<![A-Za-z0-9])(?=[A-Za-z]*\d)[A-Za-z0-9]{{16}}", re.IGNORECASE)


def masked(text: str) -> str:
    """Return a text with *** in place of the values of environment variables with secret names, and of what looks like a credential."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    return _MASKED.sub(lambda found: f"{found['before'] or ''}***", text)


def printable(text: str) -> str:
    """A value as one line of an error: as it is where every sign prints, else with escapes."""
    return text if text.isprintable() else ascii(text)


def is_variable_name(text: str) -> bool:
    """Whether a text is the name of an environment variable, and no key that somebody put in its place."""
    return bool(_NAME.fullmatch(text)) and not _NO_NAME.search(text)


def looks_like_key(text: str) -> bool:
    """Whether a text holds a key that is known by its beginning."""
    return bool(re.search(_KEYS, text, re.IGNORECASE))


def of_endpoint(endpoint: ModelEndpoint, at: str, is_slurm: bool) -> Iterator[tuple[bool, str, object, str]]:
    """Yield the rules by which no setting holds the key itself, which would be frozen and shown. The value is not shown either.

    at: where the endpoint's settings stand, such as "policy.proposals.". is_slurm: whether jobs ask, and not this process's children.
    """
    hidden = "(not shown, because it looks like a key)"
    by_name = not endpoint.api_key_env or is_variable_name(endpoint.api_key_env)
    yield (
        by_name,
        f"{at}api_key_env",
        "(not shown, because it may be a key)",
        "the name of the environment variable that holds the key",
    )
    yield (
        not (by_name and is_slurm and NOT_INHERITED.search(endpoint.api_key_env)),
        f"{at}api_key_env",
        endpoint.api_key_env if by_name else "",
        f"empty, with the key in a file that the nodes can read ({at}api_key_file), because Slurm jobs are given no variable whose name has token, "
        "secret, passw, api_key or credential in it",
    )
    yield (
        not looks_like_key(endpoint.api_key_file),
        f"{at}api_key_file",
        hidden,
        "the path of the file that holds the key",
    )
    yield (
        masked(endpoint.url) == endpoint.url,
        f"{at}url",
        hidden,
        "an address without a key; name its place in api_key_env",
    )
    yield not looks_like_key(endpoint.model), f"{at}model", hidden, "the endpoint's name for the model"
    in_add = any(looks_like_key(str(value)) for value in endpoint.add.values())
    yield not in_add, f"{at}add", hidden, "parameters of the request; name the key's place in api_key_env"
