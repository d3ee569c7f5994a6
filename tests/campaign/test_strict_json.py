"""Test the JSON reader: it agrees with json.loads, gives each refusal its code, and spends little on hostile input."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.canonical import LARGEST
from pipeline.campaign.strict_json import MAX_BYTES, MAX_DEPTH, BadJson, Numbers, read

texts = st.text(max_size=8)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def refused(data: bytes, **how: object) -> BadJson:
    with pytest.raises(BadJson) as bad:
        read(data, **how)
    assert isinstance(bad.value, ValueError) and str(bad.value) == bad.value.what
    return bad.value


def code(data: bytes, **how: object) -> str:
    return refused(data, **how).code


@given(values, st.sampled_from([None, 1]), st.booleans())
def test_what_json_writes_is_read_as_it_was(value, indent, ascii_only):
    assert read(json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()) == value


@given(st.integers(-(2**70), 2**70))
def test_whole_numbers_end_before_two_to_the_53(number):
    data = b"[%d]" % number
    if abs(number) <= LARGEST:
        assert read(data, numbers=Numbers.WHOLE) == [number]
    else:
        assert code(data, numbers=Numbers.WHOLE) == "not_whole"
    assert read(data) == [number]
    assert read(data, numbers=Numbers.UNREAD) == [NotImplemented]


@pytest.mark.parametrize("number", [LARGEST, LARGEST + 1, -LARGEST, -LARGEST - 1])
def test_the_last_whole_number(number):
    if abs(number) <= LARGEST:
        assert read(b"%d" % number, numbers=Numbers.WHOLE) == number
    else:
        assert refused(b"%d" % number, numbers=Numbers.WHOLE).what == f"{number} is no integer under 2^53"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_read_where_any_number_is(number):
    data = json.dumps([number]).encode()
    assert read(data) == [number]
    assert code(data, numbers=Numbers.WHOLE) == "not_whole"
    assert read(data, numbers=Numbers.UNREAD) == [NotImplemented]


@pytest.mark.parametrize("numbers", Numbers)
@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_what_is_not_finite_is_no_json(name, numbers):
    bad = refused(b'{"a": [1, %s]}' % name.encode(), numbers=numbers)
    assert (bad.code, bad.what) == ("not_finite", f"{name} is no JSON")


def test_a_number_beyond_floats_is_not_finite():
    assert code(b"[1e999]") == "not_finite"
    assert code(b"[-1e999]") == "not_finite"


@pytest.mark.parametrize(
    "data",
    [b"", b" ", b"{", b"no", b"[,]", b"[1]]", b"{} {}", b"\xef\xbb\xbf{}", b"{'a': 1}", b'"\x01"', b'{"a" 1}', b"[1e5", b"+1", b"0x1", b"01"],
)  # fmt: skip
def test_what_is_no_json(data):
    assert code(data) == "not_json"


@given(values, st.data())
def test_a_text_cut_short_is_refused(value, data):
    whole = json.dumps({"a": value}).encode()
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert code(whole[:cut]) == "not_json"


@pytest.mark.parametrize("depth", [0, 1, 50])
@pytest.mark.parametrize("twice", [b'{"a": 1, "a": 2}', b'{"a": 1, "\\u0061": 1}', b'{"": 0, "": 0}'])
def test_a_key_twice_is_found_at_any_depth(twice, depth):
    data = b'[{"b":' * (depth // 2) + twice + b"}]" * (depth // 2)
    bad = refused(data)
    assert (bad.code, bad.what) == ("duplicate_key", "an object has a key twice")


def test_one_key_in_two_objects_is_none_twice():
    assert read(b'{"a": {"a": 1}, "b": {"a": 1}}') == {"a": {"a": 1}, "b": {"a": 1}}


@pytest.mark.parametrize(
    ("data", "place"), [(b"\xff", 0), (b'"ab\xc3"', 3), (b"\xed\xa0\x80", 0), (b'["\xf8\x88\x80\x80\x80"]', 2), ('{"a": 1}'.encode("utf-16"), 0)]
)  # fmt: skip
def test_bytes_that_are_no_utf_8(data, place):
    bad = refused(data)
    assert (bad.code, bad.what) == ("not_utf8", f"byte {place} is not UTF-8")


def test_half_a_character_behind_an_escape_is_kept_for_the_caller():
    assert read(b'"\\ud800"') == "\ud800"
    with pytest.raises(UnicodeEncodeError):
        read(b'"\\ud800"').encode()


@given(st.text('[]{}"\\aä', max_size=60), st.integers(0, 6))
def test_depth_is_counted_outside_of_strings(text, most):
    outside = re.sub(r'"(?:[^"\\]|\\.)*("|$|\\$)', "", text, flags=re.DOTALL)
    level = deepest = 0
    for letter in outside:
        level += (letter in "[{") - (letter in "]}")
        deepest = max(deepest, level)
    try:
        read(text.encode(), max_depth=most)
    except BadJson as bad:
        assert (bad.code == "too_deep") is (deepest > most)
    else:
        assert deepest <= most


def test_the_deepest_value_is_read_and_one_level_more_is_not():
    for opened, closed in ((b"[", b"]"), (b'{"[": ', b"}")):
        whole = opened * MAX_DEPTH + b"1" + closed * MAX_DEPTH
        read(whole)
        assert code(b"[" + whole + b"]") == "too_deep"
    wide = [[{"a": [1, 2, {"b": "[[[["}]}] * 99] * 9
    assert read(json.dumps(wide).encode(), max_depth=5) == wide
    assert refused(json.dumps(wide).encode(), max_depth=4).what == "nested deeper than 4"


def test_size_is_looked_at_first():
    assert refused(b"\xff" * 11, max_bytes=10).what == "11 bytes; at most 10 are read"
    assert code(b'"12345678"', max_bytes=9) == "too_large"
    assert read(b'"12345678"', max_bytes=10) == "12345678"


MILLION = 10**6
HOSTILE = {
    "100 MB of brackets": (b"[" * 10**8, {}, "too_large"),
    "100 MB of brackets, of which any number is read": (b"[" * 10**8, {"max_bytes": 2**30}, "too_deep"),
    "objects in objects": (b'{"a":' * MILLION, {}, "too_deep"),
    "closed more often than opened": (b"]" * MILLION + b"[" * MAX_DEPTH, {}, "not_json"),
    "a string of escapes without an end": (b"[" * 70 + b'"' + b'\\"' * MILLION, {"max_depth": 70}, "not_json"),
    "brackets in strings": (b'["' + b"[" * MILLION, {}, "not_json"),
    "a million digits": (b"[" + b"1" * MILLION + b"]", {}, "not_whole"),
    "a million digits in a record": (b"[" + b"1" * MILLION + b"]", {"numbers": Numbers.WHOLE}, "not_whole"),
    "a million digits of an exponent": (b"[1e" + b"9" * MILLION + b"]", {}, "not_finite"),
    "a key twice among very many": (b"{" + b",".join(b'"%d":1' % (n % 99_999) for n in range(100_000)) + b"}", {}, "duplicate_key"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_cost_little(name):
    data, how, expected = HOSTILE[name]
    began = time.perf_counter()
    bad = refused(data, **how)
    assert bad.code == expected and len(bad.what) < 100
    assert time.perf_counter() - began < 3


def test_a_million_digits_cost_nothing_where_numbers_are_not_read():
    assert read(b"[" + b"1" * MILLION + b", 1e" + b"9" * MILLION + b"]", numbers=Numbers.UNREAD) == [NotImplemented] * 2


@given(st.binary(max_size=200) | st.text('[]{}",:0123456789.eE+-truefalsn \\u', max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_a_refusal(data):
    for numbers in Numbers:
        try:
            read(data, numbers=numbers)
        except BadJson as bad:
            assert bad.code in {"not_utf8", "not_json", "duplicate_key", "not_finite", "not_whole"}
    assert len(data) < MAX_BYTES
