"""Test patience with a network file system: the system calls fail as NFS clients let them fail, for a while or for ever."""

import builtins
import errno
import fcntl
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.campaign import files, shared_path
from pipeline.campaign.errors import ConfigError, FilesUnreachable, WorkFailed
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.campaign.shared_path import SharedPath, wait_until
from pipeline.execution import results, resume
from tests.support.campaigns import frozen_campaign, publish
from tests.support.paths import ROOT

ALWAYS = -1


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(shared_path, "WAITS", (0.0, 0.001, 0.001))


@pytest.fixture
def failing(monkeypatch):
    """Call with a path, how often its next uses fail (ALWAYS: always), and with which error. Opening, stat and listing fail alike."""
    left: dict[str, list[int]] = {}

    def wrap(module, name):
        real = getattr(module, name)

        def act(path=".", *arguments, **options):
            entry = left.get(os.fspath(path)) if isinstance(path, str | os.PathLike) else None
            if entry and entry[0]:
                entry[0] -= 1
                raise OSError(entry[1], os.strerror(entry[1]), os.fspath(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(module, name, act)

    for module, name in (
        (builtins, "open"),
        (io, "open"),
        (os, "stat"),
        (os, "listdir"),
        (os, "scandir"),
        (os, "readlink"),
    ):
        wrap(module, name)

    def fail(path, times, error=errno.ESTALE):
        left[os.fspath(path)] = [times, error]
        return left[os.fspath(path)]

    return fail


READERS = {
    "read_json": lambda path: files.read_json(path),
    "read_json_lines": lambda path: files.read_json_lines(path),
    "rows_of": lambda path: files.rows_of(path),
    "file_digest": lambda path: files.file_digest(path),
    "tree_digest": lambda path: files.tree_digest(path.parent),
    "walk": lambda path: list(files.walk(path.parent)),
    "read_text": lambda path: path.read_text(),
    "exists": lambda path: path.exists(),
    "is_file": lambda path: path.is_file(),
    "stat": lambda path: path.stat().st_size,
    "iterdir": lambda path: sorted(path.parent.iterdir()),
    "glob": lambda path: sorted(path.parent.glob("*.json")),
    "copy": lambda path: files.copy_file(path, path.with_suffix(".copy")) or path.with_suffix(".copy").read_bytes(),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.ESHUTDOWN])
def test_case_15_a_stale_handle_is_looked_up_anew_by_every_reader(tmp_path, failing, name, error):
    path = SharedPath(tmp_path / "record.json")
    path.write_text('{"a": 1}\n')
    expected = READERS[name](path)
    uses = [failing(place, 2, error) for place in (path, tmp_path)]
    assert READERS[name](path) == expected
    assert any(left < 2 for left, _ in uses)


@pytest.mark.parametrize("name", sorted(set(READERS) - {"tree_digest", "walk", "iterdir", "glob"}))
def test_case_15_what_stays_stale_is_a_typed_error_with_path_and_cure(tmp_path, failing, name):
    """And not "there is no such file", from which a verdict would follow."""
    path = SharedPath(tmp_path / "record.json")
    path.write_text('{"a": 1}\n')
    failing(path, ALWAYS)
    with pytest.raises(FilesUnreachable) as raised:
        READERS[name](path)
    assert str(path) in raised.value.what and "Stale file handle" in raised.value.what
    assert "Check with `ls`" in raised.value.cure and raised.value.exit_code == 1


def test_case_15_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, failing):
    (tmp_path / "a3" / "attempt_00").mkdir(parents=True)
    folder = SharedPath(tmp_path / "a3")
    failing(folder, ALWAYS)
    for look in (
        lambda: list(folder.glob("attempt_*")),
        lambda: list(folder.iterdir()),
        lambda: list(files.walk(tmp_path)),
    ):
        with pytest.raises(FilesUnreachable, match="a3"):
            look()


def test_other_errors_are_not_tried_again(tmp_path, failing):
    path = SharedPath(tmp_path / "record.json")
    path.write_text("1")
    left = failing(path, 5, errno.EACCES)
    with pytest.raises(PermissionError):
        path.read_bytes()
    assert left[0] == 4


def test_every_path_of_a_campaign_is_patient(tmp_path, failing):
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    attempt = folder.claim_attempt("a3")
    assert {
        type(path) for path in (campaign.log, folder.published("a3"), attempt.sealed, campaign.overrides("r0001"))
    } == {SharedPath}
    for path in (campaign.frozen, campaign.log, folder.plan, folder.config):
        failing(path, 2)
    from pipeline.campaign.facts import facts_of, read_plan

    assert read_plan(folder)[0].round == "r0001" and facts_of(campaign)["families"]
    failing(campaign.log, 2)
    Log(campaign.log).append("stalled", round="r0001")
    assert Log(campaign.log).records()[-1]["event"] == "stalled"


def test_case_15_a_result_that_cannot_be_read_is_neither_damaged_nor_absent(tmp_path, failing):
    folder = frozen_campaign(tmp_path).round("r0001")
    path = publish(folder, "a1")
    failing(path, 2)
    assert results.has_score(path)
    failing(path, ALWAYS)
    with pytest.raises(FilesUnreachable, match="a1.h5"):
        results.has_score(path)


def test_case_15_an_adapter_is_copied_whole_or_not_at_all(tmp_path, failing):
    source, target = tmp_path / "adapter", tmp_path / "next" / "adapter"
    source.mkdir()
    for name in ("one", "two", ".aside"):
        (source / name).write_text(name)
    failing(source / "two", 2)
    files.copy_tree(source, target, but=".")
    assert sorted(path.name for path in target.iterdir()) == ["one", "two"]
    failing(source / "two", ALWAYS)
    with pytest.raises(FilesUnreachable):
        files.copy_tree(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "next"]


def test_journals_of_a_killed_copy_are_not_taken_for_whole_ones(tmp_path, monkeypatch):
    """A second start is killed while it copies what the first has decoded; the third must see no half journal."""
    round_folder = Campaign.at(tmp_path / "c").round("r0001")
    first, second, third = (round_folder.claim_attempt("a1") for _ in range(3))
    for attempt in (first, second):
        files.write_new_file(attempt.sealed, '{"plan_digest":"p","adapter_digest":"d"}')
    first.decoded_dir.mkdir()
    (first.decoded_dir / "journal.00.jsonl").write_text("whole\n")
    copy = files.shutil.copyfile

    def killed(source, target):
        Path(target).write_text("wh")
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        resume.restore_decoded(second, [first], "p", "d")
    monkeypatch.setattr(files.shutil, "copyfile", copy)
    resume.restore_decoded(third, [second, first], "p", "d")
    assert (third.decoded_dir / "journal.00.jsonl").read_text() == "whole\n"


def test_a_whole_write_is_repeated_and_a_lasting_failure_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    files.write_file(path, "first")
    real, left = os.fsync, [2]

    def fsync(handle):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_file(path, "second")
    assert path.read_text() == "second"
    left[0] = 100
    with pytest.raises(WorkFailed, match="record.json"):
        files.write_file(path, "third")
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_of_two_that_seal_one_attempt_one_is_refused(tmp_path, monkeypatch, error):
    """error: of a file system without hard links."""

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr(os, "link", refuse)
    files.write_new_file(tmp_path / "sealed.json", "mine")
    with pytest.raises(FileExistsError):
        files.write_new_file(tmp_path / "sealed.json", "yours")
    assert (tmp_path / "sealed.json").read_text() == "mine" and os.listdir(tmp_path) == ["sealed.json"]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch):
    link = os.link

    def lost(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")  # an NFS client that asked twice

    monkeypatch.setattr(os, "link", lost)
    files.write_new_file(tmp_path / "sealed.json", "mine")
    assert (tmp_path / "sealed.json").read_text() == "mine"


def test_a_claim_passes_over_attempts_that_this_machine_does_not_list_yet(tmp_path, monkeypatch):
    folder = Campaign.at(tmp_path / "c").round("r0001")
    for number in range(3):
        (folder.folder / "a1" / f"attempt_{number:02d}").mkdir(parents=True)
    monkeypatch.setattr(type(folder), "attempts", lambda self, arm: [])
    assert folder.claim_attempt("a1").number == 3


def test_a_file_system_without_locks_is_named_with_its_cure(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError) as raised, files.exclusive_lock(tmp_path / ".lock", "meta stage"):
        raise AssertionError("nobody holds a lock here")
    assert "no file locks" in raised.value.what and "-o flock" in raised.value.cure
    with pytest.raises(ConfigError, match="no file locks"):
        Log(tmp_path / "log.jsonl").append("init", facts={})


def test_what_appears_is_waited_for_and_what_does_not_is_given_up(tmp_path):
    folder = tmp_path / "r0001"
    folder.mkdir()
    listed = []
    code = f"import time; time.sleep(0.3); open({str(folder / 'a0.h5')!r}, 'w')"
    with subprocess.Popen([sys.executable, "-S", "-c", code]):
        assert wait_until(lambda: listed.append(1) or (folder / "a0.h5").exists(), 20, [folder])
    assert len(listed) > 1
    began = time.monotonic()
    assert not wait_until(lambda: (folder / "a1.h5").exists(), 0.2, [folder])
    assert 0.2 <= time.monotonic() - began < 5
    assert not wait_until(lambda: False, 0)


CLAIMER = """
import sys, time; from pathlib import Path
from pipeline.campaign.shared_path import claim
folder, me = Path(sys.argv[1]), sys.argv[2]
for _ in range(20):
    with claim(folder / ".claim"):
        (folder / "inside").touch(exist_ok=False)
        time.sleep(0.002)
        (folder / "inside").unlink()
"""


def test_a_claim_lets_one_process_in_at_a_time_without_any_lock(tmp_path):
    started = [subprocess.Popen([sys.executable, "-P", "-c", CLAIMER, str(tmp_path), str(n)], env={**os.environ, "PYTHONPATH": str(ROOT)})
               for n in range(3)]  # fmt: skip
    assert [process.wait() for process in started] == [0, 0, 0]
    assert os.listdir(tmp_path) == []


def test_a_claim_of_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    (tmp_path / ".claim").touch()
    monkeypatch.setattr(shared_path, "CLAIM_SECONDS", 0.1)
    with shared_path.claim(tmp_path / ".claim"):
        assert (tmp_path / ".claim").exists()
    assert not (tmp_path / ".claim").exists()
