"""Test a campaign's files: they are written completely or not at all, claimed by one process, and damaged ones are refused by name."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.campaign.files import read_json, read_json_lines, rows_of, write_file
from pipeline.campaign.layout import ROUND, Campaign
from tests.support.full_disk import run_on_small_disk

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def campaign(tmp_path) -> Campaign:
    return Campaign.at(tmp_path / "demo")


def test_every_path_lies_inside_the_campaign(campaign):
    folder = campaign.round("r0003")
    attempt = folder.claim_attempt("a2")
    for owner in (campaign, folder, attempt):
        names = [name for name, value in vars(type(owner)).items() if isinstance(value, property)]
        paths = [path for name in names if isinstance(path := getattr(owner, name), Path)]
        assert len(paths) > 8
        assert len(set(paths)) == len(paths)
        assert all(path.is_relative_to(campaign.folder) for path in paths)
    assert folder.campaign == campaign
    assert (folder.number, attempt.number) == (3, 0)


@given(st.text(max_size=8))
def test_what_is_no_round_name_is_refused(name):
    if not ROUND.fullmatch(name):
        with pytest.raises(ConfigError, match="is not a round. Rounds are named r0001"):
            Campaign.at("/nowhere").round(name)


@pytest.mark.parametrize("name", ["r1", "3", "r0001\n", "../r0001", "r00001", "R0001", "r٠٠٠١"])
def test_nearly_a_round_name_is_refused(name):
    with pytest.raises(ConfigError, match="is not a round"):
        Campaign.at("/nowhere").round(name)


def test_rounds_come_in_order_and_only_when_frozen(campaign):
    for name in ("r0010", "r0002", "r0000"):
        write_file(campaign.round(name).plan, "{}")
        write_file(campaign.overrides(name), "")
    write_file(campaign.overrides("r0011"), "")
    (campaign.folder / "rounds" / "r0012").mkdir()
    assert [folder.name for folder in campaign.frozen_rounds()] == ["r0000", "r0002", "r0010"]
    assert campaign.known_rounds() == ["r0000", "r0002", "r0010", "r0011"]


def test_written_file_has_its_bytes_and_mode_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    write_file(path, "é\n", mode=0o600)
    assert path.read_bytes() == "é\n".encode()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["file"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, contents = tmp_path / "file", [bytes([letter]) * 100_000 for letter in b"ab"]
    write_file(path, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                write_file(path, content)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        seen = {path.read_bytes() for _ in range(200)}
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert seen <= set(contents)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("obstacle", ["a folder", "a file where the parent should be"])
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, obstacle):
    path = tmp_path / "parent" / "file"
    if obstacle == "a folder":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WorkFailed, match="cannot write .*file: .*Free space or rights"):
        write_file(path, "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    code = """
from pipeline.campaign.errors import WorkFailed
from pipeline.campaign.files import write_file
write_file(disk / "result", "earlier")
fill()
try:
    write_file(disk / "result", bytes(100_000))
except WorkFailed as error:
    print(error)
print((disk / "result").read_text(), sorted(path.name for path in disk.iterdir()))
"""
    printed = run_on_small_disk(code, tmp_path / "disk")
    assert "result: No space left on device. Free space" in printed
    assert "earlier ['ballast', 'result']" in printed


def test_reading_json_names_what_is_wrong(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(NotFound, match="a.json does not exist"):
        read_json(path)
    for content in (b"", b"{", b'{"a": 1}{', b"\xff", b"[1e5", b"[NaN]", b'{"a": 1, "a": 1}', b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match="a.json is not valid JSON"):
            read_json(path)


@given(st.lists(json_values, max_size=4), st.data())
def test_json_lines_cut_anywhere_give_the_whole_lines_before(tmp_path_factory, values, data):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    content = b"".join(
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" for value in values
    )
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    assert read_json_lines(path) == values[: content[:cut].count(b"\n")]


@pytest.mark.parametrize("line", [b"{", b"\xff\xff", b"", b"1" * 5000])
def test_a_damaged_line_is_an_integrity_error(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(IntegrityError, match="lines.jsonl has a line that is not JSON"):
        read_json_lines(path)


def test_no_file_has_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "absent") == []


def test_what_a_process_left_is_there_and_whole(tmp_path):
    path = tmp_path / "scores.jsonl"
    with pytest.raises(IntegrityError, match="scores.jsonl of a judging process cannot be read"):
        rows_of(path)
    path.write_bytes(b'{"a": 1}\n{"a": "\xe2\x80\xa8"}\n')  # a line separator in a text ends no line
    assert rows_of(path) == [{"a": 1}, {"a": "\u2028"}]
    path.write_bytes(b'{"a": 1}\n{"a": ')
    with pytest.raises(IntegrityError, match="scores.jsonl of a judging process cannot be read"):
        rows_of(path)


def test_workers_that_claim_one_arm_at_once_get_an_attempt_each(campaign):
    folder = campaign.round("r0001")
    ready = threading.Barrier(8)

    def claim(_: int) -> int:
        ready.wait()
        return folder.claim_attempt("a3").number

    with ThreadPoolExecutor(8) as pool:
        numbers = sorted(pool.map(claim, range(8)))
    assert numbers == list(range(8))
    assert [attempt.number for attempt in folder.attempts("a3")] == numbers
    assert folder.attempts("a4") == []


def test_attempts_are_ordered_by_number_beyond_two_digits(campaign):
    folder = campaign.round("r0001")
    for number in (99, 100, 5):
        (folder.folder / "a0" / f"attempt_{number:02d}").mkdir(parents=True)
    assert [attempt.number for attempt in folder.attempts("a0")] == [5, 99, 100]
    assert folder.claim_attempt("a0").number == 101


def test_an_arm_that_cannot_be_claimed_is_named(campaign):
    write_file(campaign.round("r0001").folder / "a0", "a file")
    with pytest.raises(WorkFailed, match="cannot claim .*a0/attempt_00"):
        campaign.round("r0001").claim_attempt("a0")
