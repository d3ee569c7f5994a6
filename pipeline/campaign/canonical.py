"""The one byte form of a record, with the standard library alone, and of the YAML that we write ourselves.

Records are canonical JSON (RFC 8785) without floats. This encoder writes them and checks them; a test compares it with the `rfc8785`
package on all that a record may hold. strict_json.py reads them. Override files are YAML in one fixed form, so that their very bytes
follow from a decision, and an auditor needs no YAML library to say what they must be.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

LARGEST = 2**53 - 1
_HIGH = re.compile("[\ud800-\U0010ffff]")
_SCALAR = re.compile(r"( *)(- )?([A-Za-z0-9_/]+):(?: (.*))?")


def plain(value: Any) -> Any:
    """Records to JSON values: fractions become "p/q", tuples lists; a float is a defect and raises TypeError."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        if not -LARGEST <= value <= LARGEST:  # what every JSON reader holds
            raise ValueError(f"{value} is beyond 2^53 - 1")
        return value
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a sealed record: {value!r}")


def encoded(value: Any) -> bytes:
    """RFC 8785 bytes. Raises TypeError for a type that a record may not hold, ValueError for an integer from 2^53 on or half a character."""
    return dumped(plain(value))


def dumped(value: Any) -> bytes:
    """As `encoded`, of what is plain already."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if _HIGH.search(text):  # Python sorts by character, the RFC by UTF-16 unit: they differ from there on
        text = json.dumps(_ordered(value), separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value, key=lambda key: key.encode("utf-16-be"))}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def overrides_text(content: Mapping[str, Any]) -> str:
    """A round's Hydra file: keys in order, every text quoted as JSON quotes it, two blanks a level. Nothing else is in it.

    Raises ValueError for a character from U+D800 on, which JSON and YAML may write apart.
    """
    return "# @package _global_\n" + "".join(_yaml_lines(plain(content), ""))


def _yaml_lines(value: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key in sorted(value):
        item = value[key]
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}:\n", *_yaml_lines(item, indent + "  ")]
        elif isinstance(item, list) and item:
            lines += [f"{indent}{key}:\n", *(line for each in item for line in _yaml_item(each, indent))]
        else:
            lines.append(f"{indent}{key}: {_quoted(item)}\n")
    return lines


def _yaml_item(item: Any, indent: str) -> list[str]:
    if not isinstance(item, dict):
        return [f"{indent}- {_quoted(item)}\n"]
    first, *others = _yaml_lines(item, indent + "  ")
    return [f"{indent}- {first.lstrip()}", *others]


def _quoted(item: Any) -> str:
    """As JSON, which YAML reads the same but for characters that need two escapes."""
    text = json.dumps(item)
    if _HIGH.search(str(item)):
        raise ValueError(f"{item!r} has no place in an override")
    return text


def scalars(text: str) -> dict[str, str]:
    """Dotted key -> value of what stands in a configuration as `key: value`, nested by indentation; what is in lists is left out.

    For the block style in which configurations are frozen, and no other YAML: quotes are taken off, folded texts are cut.
    """
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    listed: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if listed is not None and (indent > listed or line.lstrip().startswith("- ")):
            continue
        listed = indent if line.lstrip().startswith("- ") else None
        match = _SCALAR.fullmatch(line)
        if listed is not None or not match:
            continue
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, match[3]))
        if match[4] is not None:
            value = match[4]
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            found[".".join(name for _, name in path)] = value[1:-1] if quoted else value
    return found


def digest(value: Any) -> str:
    return sha256(encoded(value))


def digest_text(text: str) -> str:
    return sha256(text.encode())
