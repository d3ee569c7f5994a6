"""Encode records as canonical JSON and override files as YAML, so that equal values always give equal bytes.

Records are canonical JSON (RFC 8785) without floats. `encoded` writes them and `strict_json.read` reads them; a test compares this
encoder with the `rfc8785` package. Override files are YAML in one fixed form. Their bytes follow from a decision, so an auditor can
compute them without a YAML library. This module uses the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

LARGEST = 2**53 - 1
"""The largest integer that a record may hold: every JSON reader keeps it exact."""
_HIGH = re.compile("[\ud800-\U0010ffff]")
_SCALAR = re.compile(r"( *)(- )?([A-Za-z0-9_/]+(?: [A-Za-z0-9_/]+)*):(?: (.*))?")


def plain(value: Any) -> Any:
    """Convert a record's value to plain JSON values: a fraction becomes "p/q", a tuple a list.

    Raises TypeError for a float and any other type that a record may not hold, ValueError for an integer beyond 2^53 - 1.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        if not -LARGEST <= value <= LARGEST:
            raise ValueError(f"{value} is beyond 2^53 - 1, the largest integer that a sealed record may hold")
        return value
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"a sealed record cannot hold a {type(value).__name__}: {value!r}")


def encoded(value: Any) -> bytes:
    """Return the RFC 8785 bytes of a value. Raises TypeError or ValueError as `plain`, and ValueError for an unpaired surrogate."""
    return dumped(plain(value))


def dumped(value: Any) -> bytes:
    """Return the RFC 8785 bytes of a value that consists of plain JSON values already."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if _HIGH.search(text):  # From U+D800 on, Python's order by character differs from the RFC's by UTF-16 unit.
        text = json.dumps(_ordered(value), separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value, key=lambda key: key.encode("utf-16-be"))}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def sha256(content: bytes) -> str:
    """Return the sha256 of bytes as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def overrides_text(content: Mapping[str, Any]) -> str:
    """Return the text of a round's Hydra file: keys sorted, texts quoted as in JSON, two spaces of indentation per level.

    Raises ValueError for a character from U+D800 on, because JSON and YAML may escape it differently.
    """
    return "# @package _global_\n" + "".join(_yaml_lines(plain(content), ""))


def _yaml_lines(value: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key in sorted(value):
        item = value[key]
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}:\n", *_yaml_lines(item, indent + "  ")]
        elif isinstance(item, list) and item:
            lines += [f"{indent}{key}:\n", *(line for entry in item for line in _yaml_item(entry, indent))]
        else:
            lines.append(f"{indent}{key}: {_quoted(item)}\n")
    return lines


def _yaml_item(item: Any, indent: str) -> list[str]:
    if not isinstance(item, dict):
        return [f"{indent}- {_quoted(item)}\n"]
    first, *others = _yaml_lines(item, indent + "  ")
    return [f"{indent}- {first.lstrip()}", *others]


def _quoted(item: Any) -> str:
    """Quote a value as JSON, which YAML reads alike except for characters that JSON writes as two escapes."""
    text = json.dumps(item)
    if _HIGH.search(str(item)):
        raise ValueError(f"an override cannot hold {item!r}: valid are characters below U+D800")
    return text


def scalars(text: str) -> dict[str, str]:
    """Map each dotted key of a frozen configuration to its value as text, without its quotes; a list of texts is joined with commas.

    Reads the block style in which configurations are frozen and no other YAML. It leaves out lists of mappings, and keeps only the
    first line of a folded text.
    """
    values: dict[str, str] = {}
    path: list[tuple[int, str]] = []  # (indentation, key) of the mappings around this line
    list_indent: int | None = None  # of the list that this line belongs to
    for line in text.splitlines():
        indent, entry = len(line) - len(line.lstrip()), line.lstrip().startswith("- ")
        if list_indent is not None and indent > list_indent:
            continue
        list_indent = indent if entry else None
        if entry and path and not _SCALAR.fullmatch(line.lstrip()[2:]):
            key, item = ".".join(name for _, name in path), _unquoted(line.lstrip()[2:])
            values[key] = f"{values[key]},{item}" if key in values else item
        match = _SCALAR.fullmatch(line)
        if entry or not match:
            continue
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, match[3]))
        if match[4] is not None:
            values[".".join(name for _, name in path)] = _unquoted(match[4])
    return values


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def digest(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON, as 64 hex digits."""
    return sha256(encoded(value))


def digest_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8, as 64 hex digits."""
    return sha256(text.encode())
