"""Test what is told of the time that is left: an arm's own speed first, then what ended arms took, then the forecast; else nothing."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.campaign.layout import Round
from pipeline.cluster.slurm_jobs import Job, Report
from pipeline.live import time_left, view
from pipeline.live.time_left import Left
from tests.support.campaigns import frozen_campaign, publish
from tests.support.running import line, marked, training

FORECAST = {
    "arm": {"start-up": 10_000, "training": 100_000, "decoding": 60_000, "rest": 5_000, "arm": 175_000},
    "arms": 8,
    "source": "measured in r0000",
}
WHOLE = 175.0


@pytest.fixture
def folder(tmp_path: Path) -> Round:
    return frozen_campaign(tmp_path).round("r0001")


def arm(folder: Round, name: str, jobs: dict[str, Job] | None = None) -> view.ArmView:
    found = view.of_round(folder.campaign, folder, Report(jobs or {}))
    return next(each for each in found.arms if each.row.arm == name)


def completed(folder: Round, name: str, training_seconds: float) -> None:
    """A completed arm that took 5 s to start, so long to train, 20 s to decode and 5 s for the rest."""
    attempt = folder.claim_attempt(name)
    phases = [
        ("claim", 5.0),
        ("train", training_seconds),
        ("check", 2.0),
        ("generate", 20.0),
        ("score", 3.0),
        ("completed", 0.0),
    ]
    upto = 1000.0
    marks = []
    for phase, seconds in phases:
        marks.append((phase, upto))
        upto -= seconds
    marked(attempt, marks)
    publish(folder, name)


def test_without_a_forecast_only_the_training_s_own_rest_is_told(folder):
    training(folder, "a1", steps=5)
    assert arm(folder, "a1").left == Left(pytest.approx(15 * 2.0), "own speed", "training")
    training(folder, "a2", steps=1)  # one step tells no speed
    assert arm(folder, "a2").left is None
    assert arm(folder, "a3").left is None  # it waits
    assert view.of_round(folder.campaign, folder).end == "nothing tells yet how long a1 will take"


def test_the_forecast_fills_what_the_own_speed_cannot_tell(folder):
    folder.forecast.write_text(json.dumps(FORECAST))
    training(folder, "a1", steps=5)
    left = arm(folder, "a1").left
    assert left and left.by == "forecast" and left.of == "arm"
    assert left.seconds == pytest.approx(
        2 + 15 * 2.0 + 60 + 5, abs=0.5
    )  # it began within 8 s, and the judging starts too
    training(folder, "a2", steps=1)
    left = arm(folder, "a2").left
    assert left and left.by == "forecast" and left.seconds == pytest.approx(100 - 2 + 60 + 5, abs=8)
    marked(
        folder.attempts("a2")[0], [("claim", 500.0), ("train_start", 400.0)]
    )  # the start-up alone takes longer than forecast
    assert arm(folder, "a2").left is None


def test_ended_arms_tell_more_than_the_forecast(folder):
    folder.forecast.write_text(json.dumps(FORECAST))
    completed(folder, "a0", 30.0)
    completed(folder, "a2", 50.0)
    training(folder, "a1", steps=5)
    left = arm(folder, "a1").left
    assert left and left.by == "ended arms" and left.seconds == pytest.approx(15 * 2.0 + 20 + 5, abs=0.5)
    for name in ("a0", "a2"):  # of 40 s of training on average, the steps took 36 s
        folder.attempts(name)[0].progress.write_text(line(18, 18))
    left = arm(folder, "a1").left
    assert left and left.seconds == pytest.approx(15 * 2.0 + 4 + 20 + 5, abs=0.5)


def test_an_arm_whose_attempts_are_elsewhere_tells_nothing(folder):
    """A published result without its attempt's folder, as in a bundle or after a hand's tidying."""
    completed(folder, "a0", 30.0)
    publish(folder, "a2")
    training(folder, "a1", steps=5)
    left = arm(folder, "a1").left
    assert left and left.by == "ended arms"


def test_decoding_is_told_by_its_own_speed_and_no_clock_of_another_machine(folder):
    folder.forecast.write_text(json.dumps(FORECAST))
    attempt = training(folder, "a1", steps=20)
    ahead = 10_000.0  # the worker's clock
    marked(
        attempt,
        [
            (phase, ago - ahead)
            for phase, ago in (("claim", 90.0), ("train", 80.0), ("check", 31.0), ("generate_start", 30.0))
        ],
    )
    began = attempt.phases.stat().st_mtime
    attempt.decoded_dir.mkdir()
    journal = attempt.decoded_dir / "journal.00.0.jsonl"
    journal.write_text('{"work": "x"}\n' + '{"set": "dev"}\n' * 6)
    os.utime(journal, (began + 12, began + 12))
    found = arm(folder, "a1")
    assert (found.row.items, found.row.num_items) == (6, 24) and found.row.seconds == 0.0
    assert found.left and found.left.seconds == pytest.approx(18 * 2.0 + 4, abs=0.5) and found.left.of == "arm"


def test_the_first_decoded_items_tell_no_speed(folder):
    """A program that took 9 s to start and then decoded 2 of 24 items was said to need 99 s for the others; the forecast says 60."""
    folder.forecast.write_text(json.dumps(FORECAST))
    attempt = training(folder, "a1", steps=20)
    marks = (("claim", 50.0), ("train", 48.0), ("check", 10.0), ("generate_start", 9.0))
    marked(attempt, list(marks))
    attempt.decoded_dir.mkdir()
    journal = attempt.decoded_dir / "journal.00.0.jsonl"
    began = attempt.phases.stat().st_mtime
    for number, seconds in ((2, 60), (3, 21 * 3)):
        journal.write_text('{"work": "x"}\n' + '{"set": "dev"}\n' * number)
        os.utime(journal, (began + 9, began + 9))
        left = arm(folder, "a1").left
        assert left and left.seconds == pytest.approx(seconds + 4, abs=0.9), number


def test_the_last_arm_ends_after_those_that_wait_have_run(folder):
    folder.forecast.write_text(json.dumps(FORECAST))
    publish(folder.campaign.round("r0000"), "a1")
    for name in ("a0", "a1"):
        training(folder, name, steps=5)
    found = view.of_round(folder.campaign, folder)
    assert isinstance(found.end, Left) and found.end.by == "forecast"
    # Six arms wait, and two run at once: three follow each other behind each of those that run.
    assert found.end.seconds == pytest.approx(97 + 3 * WHOLE, abs=1)
    waits = {"r0001/a2": Job("7_2", "PENDING", "", "Priority")}
    assert view.of_round(folder.campaign, folder, Report(waits)).end == "Slurm has not started a2"


def test_the_base_trains_nothing_and_the_reference_is_judged_on_dev_alone(folder):
    folder.forecast.write_text(json.dumps(FORECAST))
    first, typical = folder.campaign.round("r0000"), time_left.expected(folder, [])
    rows = view.of_round(folder.campaign, folder).rows
    base = replace(rows[1], state="starting", phase="")
    assert base.role == "base"
    left = time_left.of_arm(first, base, typical)
    assert left and left.seconds == 5 + 30 + 5


def test_a_stopped_arm_says_what_it_goes_on_from(folder):
    attempt = training(folder, "a1", steps=5)
    requeued = {"r0001/a1": Job("7_1", "PENDING", "", "BeginTime")}
    assert arm(folder, "a1", requeued).goes_on_from == "the beginning"
    (attempt.saved_dir / "000003" / "checkpoints" / "step_000004").mkdir(parents=True)
    found = arm(folder, "a1", requeued)
    assert (found.row.state, found.goes_on_from) == ("requeued", "step 4")
    attempt.sealed.write_text(json.dumps({"plan_digest": "p", "adapter_digest": "d"}))
    assert arm(folder, "a1", requeued).goes_on_from == "its trained adapter"
    attempt.decoded_dir.mkdir()
    (attempt.decoded_dir / "journal.00.0.jsonl").write_text('{"work": "x"}\n' + '{"set": "dev"}\n' * 6)
    assert arm(folder, "a1", requeued).goes_on_from == "6 of 24 decoded items"
    assert arm(folder, "a1").goes_on_from == ""  # it runs, as far as anybody knows


def test_a_decoded_item_is_a_sign_of_life(folder):
    attempt = training(folder, "a1", steps=20)
    long_ago = attempt.phases.stat().st_mtime - 5000
    marked(attempt, [("generate_start", 5000.0)])
    for path in (attempt.phases, attempt.progress):
        os.utime(path, (long_ago, long_ago))
    assert arm(folder, "a1").row.state == "unknown"
    attempt.decoded_dir.mkdir()
    (attempt.decoded_dir / "journal.00.0.jsonl").write_text('{"work": "x"}\n{"set": "dev"}\n')
    assert arm(folder, "a1").row.state == "running"


def test_a_refresh_reads_little_however_long_the_arms_have_trained(folder):
    """Eight arms and the reference, with 50,000 lines each (8 MB): a refresh reads less than one of these files."""
    attempt = training(folder.campaign.round("r0000"), "a0", steps=1)
    attempt.progress.write_text("".join(line(n, 100_000) for n in range(1, 50_001)))
    for number in range(8):
        of = training(folder, f"a{number}", steps=1)
        of.progress.unlink()
        os.link(attempt.progress, of.progress)
    view.of_round(folder.campaign, folder)  # configuration and plan are read once
    before = int(Path("/proc/self/io").read_text().split()[1])
    found = view.of_round(folder.campaign, folder)
    assert int(Path("/proc/self/io").read_text().split()[1]) - before < 3_000_000 < attempt.progress.stat().st_size
    assert all(
        each.row.step == 50_000 and each.reference_loss == each.row.loss and len(each.losses) == 10
        for each in found.arms
    )
