"""The one reader of JSON. It bounds size and depth before it parses, and refuses what two readers would understand differently.

Most of what is read here was written by somebody who is not trusted: a trial, a language model, the owner of an audited log. A key that
stands twice, NaN and infinities are therefore refused everywhere, and each caller says which numbers it takes. The refusal codes:

    too_large      more bytes than the caller reads           not_json        no JSON, or more than one value
    not_utf8       bytes that are no UTF-8                    duplicate_key   an object has a key twice
    too_deep       nested deeper than the caller walks        not_finite      NaN, an infinity, or a number that a float cannot hold
    not_whole      a number that is no integer under 2^53 where those alone are taken; an integer of thousands of digits
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
MAX_DEPTH = 64  # levels; records have ten or so, and code that walks them calls itself at each
# Possessive: a string is passed once, and one without an end ends with the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_LONGEST_WHOLE = len(str(-LARGEST))


class BadJson(ValueError):
    """These bytes are refused. `code` is one of the table above, `what` the sentence."""

    def __init__(self, code: str, what: str) -> None:
        self.code, self.what = code, what
        super().__init__(what)


class Numbers(Enum):
    """What becomes of numbers."""

    ANY = "integers, and floats that are finite"
    WHOLE = "integers under 2^53, others are refused: what a sealed record may hold"
    UNREAD = "any number becomes NotImplemented, so that one of a million digits costs nothing"


def read(data: bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, numbers: Numbers = Numbers.ANY) -> Any:
    """The one JSON value that `data` holds, in UTF-8 without a byte order mark.

    max_depth: levels of brackets, at most some hundred, for the parser calls itself at each. Raises BadJson and nothing else.
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
    """Whether brackets outside of strings nest deeper, in one pass; the text need not be JSON."""
    if data.count(b"[") + data.count(b"{") <= levels:
        return False
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    return any(map(levels.__lt__, accumulate(map(_STEPS.__getitem__, brackets))))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadJson("duplicate_key", "an object has a key twice")
    return found


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
    return json.JSONDecoder(object_pairs_hook=_once, parse_int=of_int, parse_float=of_float, parse_constant=_not_finite)


_DECODERS = {
    Numbers.ANY: _decoder(int, _finite),
    Numbers.WHOLE: _decoder(_whole, _not_whole),
    Numbers.UNREAD: _decoder(_unread, _unread),
}
