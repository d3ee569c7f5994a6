"""Test the sealed log: a record has one form, any changed byte breaks the chain, and no record is lost or half written."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign import canonical, files, keys
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.log import GENESIS, Log
from tests.support.full_disk import run_on_small_disk

plain_text = st.text(st.characters(codec="utf-8"), max_size=6)
records = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz_", max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def log(tmp_path) -> Log:
    """Five records of several shapes."""
    log = Log(tmp_path / "log.jsonl")
    for number in range(5):
        log.append("step", number=number, text="é" * number, share=Fraction(number, 3))
    return log


@given(records)
def test_canonical_bytes_are_sorted_json_without_spaces(record):
    independent = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert canonical.encoded(record) == independent
    assert json.loads(canonical.encoded(record)) == record


@given(st.dictionaries(plain_text, records, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_matter(record, random):
    shuffled = list(record.items())
    random.shuffle(shuffled)
    assert canonical.digest(dict(shuffled)) == canonical.digest(record)


def test_fractions_and_tuples_have_one_form():
    assert canonical.encoded({"a": Fraction(-2, 6), "b": (1, Fraction(2))}) == b'{"a":"-1/3","b":[1,"2/1"]}'


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0.5, TypeError),
        (float("nan"), TypeError),
        (b"bytes", TypeError),
        ({1, 2}, TypeError),
        (Path("/"), TypeError),
        (2**53, ValueError),
    ],
)
def test_what_a_record_may_not_hold_is_refused(value, error):
    with pytest.raises(error):
        canonical.encoded({"deep": [value]})


def test_digests_are_those_of_sha256sum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "abc") == canonical.digest_text("abc") == hashlib.sha256(b"abc").hexdigest()
    assert canonical.digest([]) == hashlib.sha256(b"[]").hexdigest()


def test_a_commitment_binds_to_label_and_seed():
    one, other = keys.new_seed(), keys.new_seed()
    assert len(bytes.fromhex(one)) == 32
    assert one != other
    assert keys.commitment("dev", one) == hashlib.sha256(b"dev\0" + bytes.fromhex(one)).hexdigest()
    assert len({keys.commitment(label, seed) for label in ("dev", "fresh/r0001") for seed in (one, other)}) == 4


def test_a_signature_holds_for_its_message_and_key_alone(tmp_path):
    public, stranger = keys.make_key(tmp_path / "key"), keys.make_key(tmp_path / "other")
    signature = keys.sign(tmp_path / "key", b"head")
    assert keys.signature_holds(public, b"head", signature)
    assert not keys.signature_holds(public, b"Head", signature)
    assert not keys.signature_holds(stranger, b"head", signature)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_overwritten(tmp_path):
    keys.make_key(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(FileExistsError):
        keys.make_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before


def test_every_record_names_the_hash_of_the_one_before(log):
    lines = log.path.read_bytes().splitlines()
    found = log.records()
    assert [record["seq"] for record in found] == list(range(5))
    assert [record["previous"] for record in found[1:]] == [hashlib.sha256(line).hexdigest() for line in lines[:-1]]
    assert found[0]["previous"] == GENESIS
    assert log.head() == hashlib.sha256(lines[-1]).hexdigest()


def test_append_returns_the_new_head(log):
    assert log.append("last") == log.head()


def test_a_log_that_is_not_there_is_empty(tmp_path):
    assert Log(tmp_path / "none").records() == []


def test_any_changed_byte_breaks_the_chain_or_changes_the_head(log):
    whole, head = log.path.read_bytes(), log.head()
    for position in range(len(whole)):
        log.path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert log.head() != head
        except IntegrityError as error:
            assert "the chain breaks at record" in str(error)


def test_a_record_taken_out_or_moved_is_named(log):
    lines = log.path.read_bytes().splitlines(keepends=True)
    for changed in (lines[:2] + lines[3:], [lines[1], lines[0], *lines[2:]], lines[1:]):
        log.path.write_bytes(b"".join(changed))
        with pytest.raises(IntegrityError, match="log.jsonl: the chain breaks at record [02]"):
            log.records()


def test_after_a_crash_in_the_middle_of_a_record_the_log_goes_on(log):
    whole = log.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) - len(lines[-1]) + 1, len(whole)):
        log.path.write_bytes(whole[:cut])
        assert len(log.records()) == 4
        log.append("after")
        assert [record["event"] for record in log.records()] == ["step"] * 4 + ["after"]
        torn = Path(f"{log.path}.torn")
        assert torn.read_bytes() == whole[len(whole) - len(lines[-1]) : cut] + b"\n"
        torn.unlink()


def test_writers_at_once_make_one_chain(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: log.append("step", number=number), range(40)))
    assert sorted(record["number"] for record in log.records()) == list(range(40))


def test_stages_that_run_twice_at_once_leave_one_record(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: log.append_once("plan", arms=("a0", "a1"), share=Fraction(1, 2)), range(24)))
    log.append_once("plan", arms=("a0",), share=Fraction(1, 2))
    assert [record["arms"] for record in log.records()] == [["a0", "a1"], ["a0"]]


def test_a_full_disk_is_said_before_the_act_and_loses_nothing(tmp_path):
    code = """
from pipeline.campaign.errors import WorkFailed
from pipeline.campaign.log import Log
log = Log(disk / "log.jsonl")
log.append("first")
fill()
try:
    log.append("second", text="x" * 20_000)
except WorkFailed as error:
    print(error)
print([record["event"] for record in log.records()], (disk / "log.jsonl").read_bytes()[-1:] != b"\\n")
(disk / "ballast").unlink()
log.append("third")
print([record["event"] for record in log.records()])
"""
    printed = run_on_small_disk(code, tmp_path / "disk")
    assert (
        "cannot append to " in printed and "No space left on device. Free space there; nothing was done yet" in printed
    )
    assert "['first'] True\n['first', 'third']" in printed
