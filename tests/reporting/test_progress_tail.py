"""Test that a growing progress file is read at a few places only, and rightly: half-written, resumed, malformed and enormous ones."""

import json
import os
from pathlib import Path

import pytest

from pipeline.campaign.layout import Attempt
from pipeline.reporting import progress_tail


def line(step: int, /, **values: object) -> str:
    fields: dict[str, object] = {
        "step": step,
        "num_steps": 10**6,
        "loss": 3 / step,
        "grad_norm": 0.4,
        "tokens": 100 * step,
        "seconds": 0.5 * step,
    }
    return json.dumps({"phase": "train"} | fields | values) + "\n"


def written(folder: Path, *texts: str) -> Path:
    path = folder / "progress.jsonl"
    path.write_text("".join(texts))
    return path


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_newest_line_is_the_last_whole_one_of_training(tmp_path):
    path = written(
        tmp_path,
        '{"phase": "start", "seconds": 2}\n',
        line(1),
        line(2),
        '{"phase": "samples", "step": 9}\n',
        line(3)[:-20],
    )
    step, is_malformed = progress_tail.newest(path)
    assert step and (step.step, step.tokens, is_malformed) == (2, 200.0, False)
    assert progress_tail.newest(tmp_path / "absent") == (None, False)
    assert progress_tail.newest(written(tmp_path, '{"phase": "start", "seconds": 2}\n')) == (None, False)


BEYOND = [{"step": 1e300}, {"num_steps": 2**60}, {"tokens": 1e20}, {"seconds": 1e300}]


@pytest.mark.parametrize(
    "wrong", [{"loss": "nan"}, {"step": "three"}, {"tokens": None}, {"seconds": -1}, {"loss": 10**400}, *BEYOND]
)
def test_a_malformed_newest_line_is_said_and_not_passed_over(tmp_path, wrong):
    assert progress_tail.newest(written(tmp_path, line(1), line(2, **wrong))) == (None, True)


def test_every_step_of_a_file_is_found(tmp_path):
    noise = json.dumps({"phase": "rollout", "text": "x" * 3000}) + "\n"
    path = written(tmp_path, *(line(step) + (noise if step % 37 == 0 else "") for step in range(3, 400)))
    for step in range(3, 400):
        found = progress_tail.at_step(path, step)
        assert found and found.step == step
    assert progress_tail.at_step(path, 2) is None
    assert (found := progress_tail.at_step(path, 10**9)) and found.step == 399


def test_a_curve_spans_the_training_and_ends_with_the_newest_step(tmp_path):
    assert progress_tail.curve(tmp_path / "absent", 10) == []
    assert [each.step for each in progress_tail.curve(written(tmp_path, line(1), line(2)), 10)] == [1, 2]
    steps = [each.step for each in progress_tail.curve(written(tmp_path, *map(line, range(1, 1001))), 10)]
    assert len(steps) == 10 and steps[-1] == 1000 and steps == sorted(steps)
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert max(gaps) < 130


def test_the_speed_is_the_recent_one(tmp_path):
    slow = [line(step, seconds=10 * step) for step in range(1, 101)]
    fast = [line(step, seconds=1000 + step - 100) for step in range(101, 201)]
    path = written(tmp_path, *slow, *fast)
    last, _ = progress_tail.newest(path)
    assert last and progress_tail.seconds_per_step(path, last) == 1
    for few in (line(1), line(5, seconds=0.0)):  # one step has compiled, and a clock that stood still tells nothing
        path = written(tmp_path, few)
        last, _ = progress_tail.newest(path)
        assert last and progress_tail.seconds_per_step(path, last) is None


def test_a_long_file_costs_a_few_blocks(tmp_path):
    path = written(tmp_path, *map(line, range(1, 100_001)))
    size = path.stat().st_size
    before = bytes_read()
    last, _ = progress_tail.newest(path)
    assert last and progress_tail.at_step(path, 50_000) and progress_tail.seconds_per_step(path, last)
    assert len(progress_tail.curve(path, 10)) == 10
    assert bytes_read() - before < size / 50


def test_a_line_without_end_does_not_stop_the_view(tmp_path):
    path = written(tmp_path, line(1), "x" * (progress_tail.MOST_BYTES * 5))
    assert progress_tail.newest(path) == (None, False)
    assert (found := progress_tail.at_step(path, 1)) and found.step == 1
    path = written(tmp_path, "x" * (progress_tail.MOST_BYTES * 5), "\n", line(2))
    assert (newest := progress_tail.newest(path)[0]) and newest.step == 2


def journal(attempt: Attempt, name: str, work: str, items: int, at: float) -> Path:
    attempt.decoded_dir.mkdir(parents=True, exist_ok=True)
    path = Path(attempt.decoded_dir, f"journal.{name}.jsonl")
    path.write_text(json.dumps({"work": work}) + "\n" + '{"set": "dev"}\n' * items)
    os.utime(path, (at, at))
    return path


def test_items_are_those_of_the_same_work_and_the_speed_that_of_this_start(tmp_path):
    attempt = Attempt(tmp_path / "attempt_00")
    assert progress_tail.items(attempt) is None
    attempt.folder.mkdir()
    attempt.phases.write_text("{}\n")
    os.utime(attempt.phases, (1000.0, 1000.0))
    journal(attempt, "00.0", "mine", 7, 900)  # an earlier start's, which this one took over
    journal(attempt, "01.0", "other prompts", 5, 800)
    path = journal(attempt, "00.1", "mine", 4, 1010)
    journal(attempt, "01.1", "mine", 2, 1020)
    assert progress_tail.items(attempt) == progress_tail.Items(13, 6, 20.0)
    with path.open("a") as file:
        file.write('{"set": "dev"}\n{"set": "de')  # a half-written row is no item
    os.utime(path, (1024, 1024))
    assert progress_tail.items(attempt) == progress_tail.Items(14, 7, 24.0)
    path.write_text("")  # it was begun anew
    assert progress_tail.items(attempt) == progress_tail.Items(9, 2, 20.0)
