"""Test Merkle trees, heads, and the places that anchors are written to."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign import heads, keys
from pipeline.campaign.log import Log
from pipeline.cluster import sbatch_parameters
from pipeline.config.schema import Chain
from pipeline.rounds import anchors, launch
from tests.support.campaigns import frozen_campaign


def rfc6962(lines: list[bytes]) -> bytes:
    """The tree as the RFC writes it: split at the largest power of two below the size."""
    if not lines:
        return hashlib.sha256().digest()
    if len(lines) == 1:
        return hashlib.sha256(b"\0" + lines[0]).digest()
    split = 1 << (len(lines) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + rfc6962(lines[:split]) + rfc6962(lines[split:])).digest()


@given(st.lists(st.binary(max_size=4), max_size=40))
def test_roots_are_those_of_rfc6962(lines):
    assert heads.merkle_root(lines) == rfc6962(lines).hex()


def log_of(tmp_path: Path) -> tuple[Log, str]:
    log, public = Log(tmp_path / "log.jsonl"), keys.make_key(tmp_path / "key")
    log.append("init", facts={"campaign": "c-1"})
    for number in range(5):
        log.append("step", round="r0001", number=number)
    return log, public


def test_a_head_signs_what_came_since_the_head_before(tmp_path: Path) -> None:
    log, public = log_of(tmp_path)
    first = log.close(tmp_path / "key", "c-1", "r0001")
    assert log.close(tmp_path / "key", "c-1", "r0001") == first  # nothing of the round came since
    log.append("step", round="r0002")
    assert log.close(tmp_path / "key", "c-1", "r0001") == first
    log.append("late", round="r0001")
    second = log.close(tmp_path / "key", "c-1", "r0001")
    assert [(each["number"], each["first"], each["last"]) for each in (first, second)] == [(0, 0, 5), (1, 6, 8)]
    lines = log.path.read_bytes().splitlines()
    for each in (first, second):
        head = heads.Head(*(each[name] for name in ("campaign", "round", "number", "first", "last", "head", "root")))
        assert keys.signature_holds(public, head.message, each["signature"])
        assert head.root == heads.merkle_root(lines[head.first : head.last + 1])
        assert head.head == hashlib.sha256(lines[head.last]).hexdigest()
    assert not keys.signature_holds(public, b"other", first["signature"])
    assert not keys.signature_holds("no key", b"other", "no signature")


def test_an_anchor_is_put_into_a_file_once(tmp_path: Path) -> None:
    log, _ = log_of(tmp_path)
    place = tmp_path / "elsewhere" / "heads.txt"
    for _ in range(2):
        anchors.write_anchor(Chain(False, 0, anchor_file=str(place)), log.anchor())
    assert heads.anchors_in(place.read_text()) == [log.anchor()]


def test_an_anchor_is_put_into_a_git_note_once(tmp_path: Path) -> None:
    log, _ = log_of(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in ("user.name", "user.email"):
        subprocess.run(["git", "-C", str(tmp_path), "config", name, "a"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    for seq in (2, 3, 3):
        anchors.write_anchor(Chain(False, 0, anchor_git=str(tmp_path)), log.anchor(seq))
    note = subprocess.run(
        [*git, "notes", "--ref=postrain", "show", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert heads.anchors_in(note) == [log.anchor(2), log.anchor(3)]


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, _ = log_of(tmp_path)
    (tmp_path / "file").write_text("")
    anchors.write_anchor(
        Chain(False, 0, anchor_file=str(tmp_path / "file" / "x"), anchor_git=str(tmp_path / "none")), log.anchor()
    )
    said = capsys.readouterr().err
    assert said.count("the head could not be put into") == 2 and str(log.anchor()) in said


def test_each_job_carries_the_anchor_of_its_plan(tmp_path: Path) -> None:
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    asked = launch.resources(folder)
    (anchor,) = heads.anchors_in(asked.comment)
    record = Log(campaign.log).records()[anchor.seq]
    assert (record["event"], record["round"]) == ("plan", "r0001")
    texts = sbatch_parameters.sbatch_texts(folder.slurm_dir, tmp_path, launch.arrays(campaign, folder), asked)
    assert all(heads.anchors_in(text) == [anchor] for text in texts.values())
