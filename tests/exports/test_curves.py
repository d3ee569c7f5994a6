"""Test training curves: each step once, at the time at which it was made, whatever else a trial writes."""

import json

import pytest

from pipeline.campaign.layout import Campaign
from pipeline.exports import curves, reading, runs
from tests.support.campaigns import fresh_campaign
from tests.support.decided import BEGAN, STEPS, attempt, decided_campaign, start, steps, with_open_round


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    return with_open_round(decided_campaign(tmp_path_factory.mktemp("curves")))


def test_a_plain_curve_has_each_step_at_its_time(campaign):
    points = curves.of_arm(campaign.round("r0001"), "a0", 0)
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    assert [point.wall_time for point in points] == [BEGAN + 20 + 2 * n for n in range(1, STEPS + 1)]
    assert points[1].values == {"loss": 1.5, "learning_rate": 0.002, "grad_norm": 0.5, "tokens": 200.0, "seconds": 4.0}


def test_a_resumed_attempt_appears_once_and_the_steps_that_it_made_again_count(campaign):
    points = curves.of_arm(campaign.round("r0001"), "a2", 4)
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    assert [point.values["loss"] for point in points] == [3 / n for n in range(1, 5)] + [
        7 / n for n in range(5, STEPS + 1)
    ]
    # Steps of this start have its clock; those before it are placed directly before it.
    assert [point.wall_time for point in points] == [BEGAN + 3620 + 2 * (n - 4) for n in range(1, STEPS + 1)]
    assert points[-1].values["gpu_seconds"] == 4 * 2 * STEPS


def test_an_attempt_that_only_judges_has_the_curve_that_it_took_over(tmp_path):
    folder = fresh_campaign(tmp_path).round("r0001")
    attempt(folder, "a0", 0, BEGAN, [start(), *steps(1, STEPS)])
    before = curves.of_arm(folder, "a0", 0)
    attempt(folder, "a0", 1, BEGAN + 900, [start(), *steps(1, STEPS)], trains=False)
    assert curves.of_arm(folder, "a0", 0) == before and len(before) == STEPS


def test_what_a_trial_writes_besides_is_left_out(tmp_path):
    folder = fresh_campaign(tmp_path).round("r0001")
    good = steps(1, 2)
    bad = [
        good[0] | {"loss": "low"},
        good[0] | {"step": -1},
        good[0] | {"tokens": 1.5},
        good[0] | {"seconds": None},
        ["train"],
        7,
    ]
    attempt(folder, "a0", 0, BEGAN, [start(), *bad, *good, {"phase": "samples", "step": 9, "loss": 1}])
    with (folder.folder / "a0" / "attempt_00" / "progress.jsonl").open("a") as file:
        file.write('{"phase": "train", NaN}\nnot json\n' + json.dumps(steps(3, 3)[0]))  # the last line has no end yet
    assert [point.step for point in curves.of_arm(folder, "a0", 0)] == [1, 2]


def test_runs_have_settings_curves_and_scores_and_an_open_round_has_no_score(campaign):
    found = {run.name: run for run in runs.of_campaign(reading.read_campaign(campaign))}
    best, opened = found["r0001-a2"], found["r0002-a0"]
    assert (best.settings["recipe.lora.rank"], best.settings["recipe.lora.alpha"]) == ("8", "32")
    assert (best.scores["fresh_accuracy"], best.scores["fresh_lift"]) == (0.95, 0.45)
    assert (best.tags["moved"], best.tags["status"]) == ("recipe.lora.rank=8", "completed")
    assert (len(opened.curve), opened.scores, opened.tags["status"]) == (3, {}, "not decided")
    assert "r0001-a6" not in found  # it never began
    ids = [run.id_in("smoke") for run in found.values()]
    assert len(set(ids)) == len(ids) and all(len(name) == 32 for name in ids)
