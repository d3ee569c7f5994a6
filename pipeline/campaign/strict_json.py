"""Read JSON that an untrusted writer produced: a trial, a language model, or the owner of an audited log.

The reader bounds size and depth before it parses. It refuses whatever two JSON readers could understand differently, such as a
duplicate key, NaN or an infinity; each caller says which numbers it accepts. The refusal codes:

    too_large      more bytes than the caller allows          not_json        not JSON, or more than one value
    not_utf8       bytes that are not UTF-8                   duplicate_key   an object has a key twice
    too_deep       nested deeper than the caller allows       not_finite      NaN, an infinity, or a number that a float cannot hold
    not_whole      not an integer under 2^53 where only those are accepted, or an integer of thousands of digits
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from enum import Enum
from itertools import accumulate
from typing import Any

from pipeline.campaign.canonical import LARGEST

MAX_BYTES = 2**26  # the largest files of a campaign that are JSON have a few MB
MAX_DEPTH = 64  # levels; records have about ten, and code that walks them recurses at each
# Possessive quantifiers, so that a string is scanned once; a string without an end runs to the end of the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_LONGEST_WHOLE = len(str(-LARGEST))


class BadJson(ValueError):
    """The bytes are refused. `code` is one of the table above; `what` is a phrase for a person."""

    def __init__(self, code: str, what: str) -> None:
        self.code, self.what = code, what
        super().__init__(what)


class Numbers(Enum):
    """Which numbers a caller accepts, and what it gets for them."""

    ANY = "integers and finite floats"
    WHOLE = "integers under 2^53, as in a sealed record; every other number is refused"
    UNREAD = "NotImplemented for every number, so that a million digits cost nothing"


def read(data: bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, numbers: Numbers = Numbers.ANY) -> Any:
    """Return the one JSON value in `data`, which must be UTF-8 without a byte order mark. Raises BadJson and nothing else.

    max_depth: levels of brackets; a few hundred at most, because the parser recurses at each.
    """
    if len(data) > max_bytes:
        raise BadJson("too_large", f"{len(data)} bytes; at most {max_bytes} are read")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadJson("not_utf8", f"byte {error.start} is not UTF-8") from None
    if _is_deeper(data, max_depth):
        raise BadJson("too_deep", f"nested deeper than {max_depth}")
    try:
        return _DECODERS[numbers].decode(text)
    except BadJson:
        raise
    except json.JSONDecodeError as error:
        raise BadJson("not_json", str(error)) from None
    except ValueError:  # Python's own limit, which keeps a long integer from taking quadratic time
        raise BadJson("not_whole", "an integer has more digits than are read") from None


def _is_deeper(data: bytes, levels: int) -> bool:
    """Whether brackets outside of strings nest deeper than `levels`, in one pass; the text need not be JSON."""
    if data.count(b"[") + data.count(b"{") <= levels:
        return False
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    return any(map(levels.__lt__, accumulate(map(_STEPS.__getitem__, brackets))))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise BadJson("duplicate_key", "an object has a key twice")
    return members


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise BadJson("not_finite", f"{digits[:20]} is more than a float holds")
    return number


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) <= _LONGEST_WHOLE else LARGEST + 1
    return number if -LARGEST <= number <= LARGEST else _not_whole(digits)


def _not_whole(digits: str) -> Any:
    raise BadJson("not_whole", f"{digits[:20]} is no integer under 2^53")


def _not_finite(name: str) -> Any:
    raise BadJson("not_finite", f"{name} is no JSON")


def _unread(digits: str) -> Any:
    return NotImplemented


def _decoder(of_int: Callable[[str], Any], of_float: Callable[[str], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_without_duplicates, parse_int=of_int, parse_float=of_float, parse_constant=_not_finite
    )


_DECODERS = {
    Numbers.ANY: _decoder(int, _finite),
    Numbers.WHOLE: _decoder(_whole, _not_whole),
    Numbers.UNREAD: _decoder(_unread, _unread),
}
