"""A transcript holds every byte, names what was changed, and survives a kill with at most one cut line."""

import errno
import json
import os
import random
import threading

import pytest

from pipeline.campaign.canonical import sha256
from pipeline.campaign.errors import IntegrityError, WorkFailed
from pipeline.model_calls import transcript
from pipeline.model_calls.transcript import Writer, content_of, load

BYTES = [
    b"",
    b"{}",
    b'{"a": "\\ud800"}',
    b"\xff\x00\xfe",
    "ünï\u2028\U0001f600".encode(),
    b"\n\r\n",
    bytes(range(256)),
    b"a" * 100_000,
]


def filled(path):
    writer = Writer(path)
    for number, content in enumerate(BYTES):
        writer.append("request", content, call=number, prompt_bound=9)
        writer.append("answer", content, call=number, tries=1, prompt_tokens=3, answer_tokens=2)
    writer.append("failure", call=99, tries=0, failure="budget_steps", what="all calls are made")
    writer.append("end", outcome="malformed", what="an end")
    writer.close()
    return writer


def test_every_byte_comes_back(tmp_path):
    path = tmp_path / "t.jsonl"
    writer = filled(path)
    found = load(path)
    assert [content_of(record) for record in found.records[:-2:2]] == BYTES
    assert (found.head, found.cut_bytes) == (writer.head, 0)
    assert sum("base64" in record for record in found.records) == 4
    transcript.verify(path, writer.head, sha256(path.read_bytes()))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_kill_at_any_byte_leaves_at_most_one_cut_line_which_the_next_writer_removes(tmp_path):
    path = tmp_path / "t.jsonl"
    writer = Writer(path)
    for number in range(4):
        writer.append("request", b"{}" * number, call=number, prompt_bound=9)
    writer.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        num_lines = whole[:size].count(b"\n")
        found = load(path)
        assert len(found.records) == num_lines and found.cut_bytes == size - (whole[:size].rfind(b"\n") + 1)
        again = Writer(path)
        again.append("end", outcome="closed", what="")
        again.close()
        assert [record["kind"] for record in load(path).records] == ["request"] * num_lines + ["end"]


def test_any_change_is_found_and_its_event_named(tmp_path):
    path = tmp_path / "t.jsonl"
    writer = filled(path)
    whole = path.read_bytes()
    digest, lines = sha256(whole), whole.split(b"\n")[:-1]
    draw = random.Random(1)
    for _ in range(60):
        place = draw.randrange(len(whole))
        changed = whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            transcript.verify(path, writer.head, digest)
    for lacking in range(len(lines)):
        path.write_bytes(b"".join(line + b"\n" for number, line in enumerate(lines) if number != lacking))
        with pytest.raises(IntegrityError, match=f"event {lacking}|not the transcript"):
            transcript.verify(path, writer.head, digest)


@pytest.mark.parametrize(
    "change",
    [{"kind": "other"}, {"call": "0"}, {"text": 5}, {"extra": 1}, {"kind": ["request"]}, {"base64": "!"}, {"base64": "AA==", "text": None}],
)  # fmt: skip
def test_an_event_of_another_form_is_refused(tmp_path, change):
    record = {
        "seq": 0,
        "previous": "0" * 64,
        "at_ms": 0,
        "kind": "request",
        "call": 0,
        "prompt_bound": 9,
        "text": "{}",
        **change,
    }
    if "base64" in change and "text" not in change:
        del record["text"]
    (tmp_path / "t").write_text(json.dumps(record) + "\n")
    with pytest.raises(IntegrityError, match="event 0"):
        load(tmp_path / "t")


def test_threads_append_whole_lines_and_none_after_the_end(tmp_path):
    writer = Writer(tmp_path / "t")

    def append(start: int) -> None:
        for number in range(start, start + 50):
            writer.append("request", b"x" * 5000, call=number, prompt_bound=9)

    threads = [threading.Thread(target=append, args=(start,)) for start in range(0, 400, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record["call"] for record in load(tmp_path / "t").records) == list(range(400))
    writer.close()
    with pytest.raises(WorkFailed):
        writer.append("end", outcome="late", what="")
    assert len(load(tmp_path / "t").records) == 400


def test_a_full_disk_is_a_named_failure_and_nothing_follows_the_cut_line(tmp_path, monkeypatch):
    room, write = 500, os.write

    def limited(file: int, data: bytes) -> int:
        """As write(2) on a disk with `room` bytes left: it writes a part, then fails."""
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[:room])
        room -= done
        return done

    writer = Writer(tmp_path / "t")
    writer.append("end", outcome="one", what="")
    monkeypatch.setattr(transcript.os, "write", limited)
    with pytest.raises(WorkFailed, match="No space left"):
        writer.append("end", outcome="two", what="x" * 1000)
    room = 10_000
    with pytest.raises(WorkFailed):
        writer.append("end", outcome="three", what="")
    found = load(tmp_path / "t")
    assert [record["outcome"] for record in found.records] == ["one"] and found.cut_bytes == 500
    Writer(tmp_path / "t").append("end", outcome="four", what="")
    assert [record["outcome"] for record in load(tmp_path / "t").records] == ["one", "four"]
