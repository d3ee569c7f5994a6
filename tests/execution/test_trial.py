"""Test the trial from outside: copies are bounded, garbage is left out, and every way to end has its outcome."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import Interrupted, TrialFailed
from pipeline.campaign.layout import Attempt
from pipeline.execution import trial


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def attempt(tmp_path) -> Attempt:
    folder = tmp_path / "attempt_00"
    folder.mkdir()
    return Attempt(folder)


@dataclass
class Unconfined:
    """A process with the interface of sandbox.Confined and no sandbox around it."""

    process: subprocess.Popen[bytes]
    timed_out: bool = False
    overspent: str = ""

    returncode = property(lambda self: self.process.returncode)

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class NoSandbox:
    """Starts Python code where a Sandbox would start the trial."""

    code: str
    limits: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(wall_seconds=60.0))
    timed_out: bool = False

    @contextlib.contextmanager
    def start(self, command: tuple[str, ...], log_path: Path) -> Iterator[Unconfined]:
        assert command == trial.ENTRY
        with open(log_path, "wb") as log:
            process = subprocess.Popen([sys.executable, "-S", "-c", self.code], stdout=log, stderr=log)
        try:
            yield Unconfined(process, self.timed_out)
        finally:
            process.kill()
            process.wait()


def train(code: str, attempt: Attempt, out: Path, stall_seconds: float = 30.0, stop: bool = False, **fields) -> None:
    trial.train(NoSandbox(code, **fields), attempt, out, stall_seconds, lambda: stop)


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_progress_is_copied_to_the_byte_however_it_grows(tmp_path_factory, chunks):
    folder = tmp_path_factory.mktemp("grow")
    copied, target = 0, folder / "copy"
    for chunk in chunks:
        with open(folder / "progress.jsonl", "ab") as file:
            file.write(chunk)
        copied = trial.copy_progress(folder, target, copied)
    whole = b"".join(chunks)
    assert copied == len(whole)
    assert (target.read_bytes() if target.exists() else b"") == whole


def test_what_is_copied_is_bounded(out, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "MAX_PROGRESS_BYTES", 1000)
    (out / "progress.jsonl").write_bytes(b"x" * 5000)
    copied = 0
    for _ in range(3):
        copied = trial.copy_progress(out, tmp_path / "copy", copied)
    assert copied == (tmp_path / "copy").stat().st_size == 1000


def test_a_file_that_shrinks_is_copied_anew(out, tmp_path):
    """A trial that goes on from a checkpoint takes back the lines of the steps after it."""
    (out / "progress.jsonl").write_bytes(b"first\nsecond\n")
    copied = trial.copy_progress(out, tmp_path / "copy", 0)
    (out / "progress.jsonl").write_bytes(b"first\nx")
    copied = trial.copy_progress(out, tmp_path / "copy", copied)
    (out / "progress.jsonl").write_bytes(b"first\nx\n")
    assert trial.copy_progress(out, tmp_path / "copy", copied) == 8
    assert (tmp_path / "copy").read_bytes() == b"first\nx\n"


@pytest.mark.parametrize("value", [True, None, "1", [1], float("nan"), float("inf"), 10**400])
def test_what_is_no_finite_number_is_none(value):
    assert trial.number(value) is None
    assert trial.number(2**70) == 2**70 and trial.number(-1.5) == -1.5


def test_nothing_is_copied_where_nothing_is(out, tmp_path):
    assert trial.copy_progress(out, tmp_path / "copy", 0) == 0
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_a_plain_file_is_read(out, tmp_path, kind):
    path = out / "progress.jsonl"
    (tmp_path / "secret").write_text("the fresh seed")
    {"link": lambda: path.symlink_to(tmp_path / "secret"), "fifo": lambda: os.mkfifo(path), "folder": path.mkdir}[
        kind
    ]()
    with pytest.raises(TrialFailed, match="progress.jsonl .* is not a plain file"):
        trial.copy_progress(out, tmp_path / "copy", 0)
    assert not (tmp_path / "copy").exists()


def test_lines_that_make_no_sense_are_left_out(attempt):
    step = {"phase": "train", "step": 1, "loss": 0.5}
    text = json.dumps(step).encode()
    garbage = [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b"null",
        b'"train"',
        b"[" * 50_000,
        b"1" * 5000,
        b'{"phase": "start"}',
    ]
    lines = [line for rubbish in garbage for line in (rubbish, text)]
    attempt.progress.write_bytes(b"\n".join(lines) + b"\n" + text)  # the last has no newline: it is still being written
    assert trial.progress_lines(attempt, "train") == [step] * len(garbage)
    assert trial.progress_lines(attempt, "start") == [{"phase": "start"}]


@given(st.binary(max_size=60))
def test_any_bytes_make_lines_or_none(tmp_path_factory, content):
    attempt = Attempt(tmp_path_factory.getbasetemp())
    attempt.progress.write_bytes(content)
    assert all(isinstance(line, dict) for line in trial.progress_lines(attempt, "train"))


def test_before_the_first_line_there_is_none(attempt):
    assert trial.progress_lines(attempt, "train") == []


def test_the_tail_of_a_log_is_its_end_and_bounded(tmp_path):
    assert trial.log_tail(tmp_path / "absent") == ""
    (tmp_path / "log").write_bytes(b"\xff" * 50_000 + b"the last words")
    tail = trial.log_tail(tmp_path / "log")
    assert tail.endswith("the last words")
    assert len(tail.encode("utf-8", "replace")) <= 3 * trial.LOG_TAIL_BYTES


def test_the_task_is_of_the_contract(attempt):
    trial.write_task(attempt, {"model": {}, "recipe": {}, "parallelism": {}, "seed": 7})
    task = json.loads((attempt.task_dir / "task.json").read_text())
    assert (task["schema"], task["kind"], task["config"]["seed"]) == (1, "train", 7)
    assert set(task["paths"]) == {"base", "tokenizer", "train_data", "out", "stop"}
    assert task["paths"]["stop"] == "/task/stop"


def test_a_trial_that_ends_well_leaves_its_progress(attempt, out):
    line = json.dumps({"phase": "train", "step": 1})
    train(f"open({str(out / 'progress.jsonl')!r}, 'w').write({line!r} + chr(10))", attempt, out)
    assert trial.progress_lines(attempt, "train") == [{"phase": "train", "step": 1}]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (1, "crashed"),
        (64, "configuration"),
        (65, "data"),
        (66, "diverged"),
        (67, "out_of_memory"),
        (75, "crashed"),
        (137, "killed"),
    ],
)
def test_each_exit_code_is_a_kind_of_failure_with_the_last_words(attempt, out, code, kind):
    with pytest.raises(TrialFailed, match="last words") as error:
        train(f"print('last words'); raise SystemExit({code})", attempt, out)
    assert error.value.kind == kind


def test_a_trial_that_stops_on_request_is_interrupted_not_failed(attempt, out):
    stop = str(attempt.task_dir / "stop")
    code = f"import os, time\nwhile not os.path.exists({stop!r}): time.sleep(0.01)\nraise SystemExit(75)"
    with pytest.raises(Interrupted):
        train(code, attempt, out, stop=True)


def test_a_trial_that_fails_while_it_is_stopped_has_failed(attempt, out):
    with pytest.raises(TrialFailed, match="exit code 1"):
        train("raise SystemExit(1)", attempt, out, stop=True)


def test_a_trial_without_a_heartbeat_is_killed_as_stalled(attempt, out):
    began = time.monotonic()
    with pytest.raises(TrialFailed, match="no progress for 0 s. waiting") as error:
        train("import time; print('waiting', flush=True); time.sleep(60)", attempt, out, stall_seconds=0.4)
    assert error.value.kind == "stalled"
    assert time.monotonic() - began < 20


def test_a_slow_trial_with_a_heartbeat_is_not_stalled(attempt, out):
    code = f"import time\nfor _ in range(18):\n open({str(out / 'progress.jsonl')!r}, 'a').write('x'); time.sleep(0.1)"
    train(code, attempt, out, stall_seconds=1.5)


def test_the_wall_clock_limit_is_a_timeout(attempt, out):
    with pytest.raises(TrialFailed) as error:
        train("raise SystemExit(137)", attempt, out, timed_out=True)
    assert error.value.kind == "timeout"


def test_how_long_runs_of_a_training_lasted_is_taken_from_the_worker_s_clock(tmp_path):
    attempt = Attempt(tmp_path)
    assert trial.train_runs(attempt) == []
    marks = [
        ("claim", 0),
        ("train_start", 10),
        ("train", 14),
        ("stalled", 20),
        ("train_start", 21),
        ("agent", 30),
        ("train_start", 40),
    ]
    attempt.phases.write_text("".join(json.dumps({"phase": phase, "at": at}) + "\n" for phase, at in marks))
    assert trial.train_runs(attempt) == [10, 9]
