"""Test the forecast at the probe's speed: it gives back what was measured, and neither a compile nor one long completion spoils it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.campaign.layout import Attempt
from pipeline.cluster import forecast
from pipeline.config import decoding, settings
from pipeline.config.settings import Settings
from pipeline.execution import results
from pipeline.first_contact import probe_speed
from pipeline.first_contact.probe_speed import Speed

SHORT = [150] * 24
LONG = [*[150] * 23, 7680]


@pytest.fixture(params=["nano_30b cluster=slurm", "nano_mini cluster=testbed", "smoke cluster=local"])
def chosen(request: pytest.FixtureRequest) -> Settings:
    """One configuration whose site knows rates, and two without."""
    experiment, cluster = request.param.split()
    return settings.compose([f"experiment={experiment}", cluster])


def took(chosen: Settings, lengths: list[int]) -> Speed:
    """The speed of a node whose decoding steps take three times what the site's file says; a step of training 8 s."""
    replicas = replicas_of(chosen)
    shape = chosen.cluster.capacity.decode_tokens_per_second or {-(-len(lengths) // replicas): 1.0}
    seconds = 3 * decoding.played(lengths, chosen.tasks.decode_batch_size, shape, replicas)
    seconds /= chosen.cluster.capacity.speed_up(chosen.parallelism.judge_tp)
    truncated = sum(length == 7680 for length in lengths)
    return Speed(chosen.recipe.batch_size * 300 / 8, 300.0, 100.0, lengths, truncated, seconds)


def replicas_of(chosen: Settings) -> int:
    return chosen.parallelism.replicas(chosen.devices_of("worker"))


def test_the_probe_itself_would_be_forecast_as_it_was(chosen: Settings) -> None:
    for lengths in (SHORT, LONG):
        speed = took(chosen, lengths)
        at = probe_speed.as_measured(chosen, speed)
        capacity, layout = at.cluster.capacity, at.parallelism
        slots, rates = at.tasks.decode_batch_size, capacity.decode_tokens_per_second
        played = decoding.played(lengths, slots, rates, replicas_of(at))
        assert played / capacity.speed_up(layout.judge_tp) == pytest.approx(speed.decode_seconds)
        ten = replace(at, recipe=replace(at.recipe, num_steps=10))
        assert forecast.assumed_training(ten) == pytest.approx(80)
        assert capacity.start_seconds == 100


def test_one_long_completion_among_the_probe_s_changes_no_forecast_where_lengths_are_expected() -> None:
    chosen = settings.compose(["experiment=nano_30b", "cluster=slurm"])
    assert chosen.tasks.expected.completion_tokens
    found = [forecast.forecast(probe_speed.as_measured(chosen, took(chosen, lengths)), 8) for lengths in (SHORT, LONG)]
    known = forecast.forecast(chosen, 8)
    assert known and found[0] and found[1]
    assert found[0].hours == pytest.approx(found[1].hours)
    assert known.judge_hours_per_arm < found[0].judge_hours_per_arm < 3.2 * known.judge_hours_per_arm


def attempt(folder: Path, monkeypatch: pytest.MonkeyPatch, first_step: float = 90.0) -> Attempt:
    """Ten steps of 2,400 tokens, the first of which compiles, and four items decoded in 6 s."""
    made = Attempt(folder / "attempt_00")
    made.completions_dir.mkdir(parents=True)
    lines = [
        {"phase": "train", "step": n, "tokens": 2400 * n, "seconds": first_step + 8 * (n - 1)} for n in range(1, 11)
    ]
    made.progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
    marks = [("train_start", 0), ("train", 20), ("check", 300), ("generate", 310), ("score", 316)]
    made.phases.write_text("".join(json.dumps({"phase": phase, "at": at}) + "\n" for phase, at in marks))
    rows = [{"item_id": f"x-{n}", "completion": "", "num_tokens": n, "truncated": n == 64} for n in (10, 20, 64, 30)]
    (made.completions_dir / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(results, "has_score", lambda path: True)
    return made


def test_the_first_step_counts_as_the_start_and_not_as_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = probe_speed.measured(attempt(tmp_path, monkeypatch), 8)
    assert speed == Speed(300.0, 300.0, 110.0, [10, 20, 64, 30], 1, 6.0)


@pytest.mark.parametrize("damage", ["progress", "one step", "no score", "still decoding"])
def test_clocks_that_say_nothing_measure_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    made = attempt(tmp_path, monkeypatch)
    if damage == "progress":
        made.progress.write_text('{"phase": "train", "step": "x", "tokens": null, "seconds": []}\n')
    if damage == "one step":
        made.progress.write_text(made.progress.read_text().splitlines()[0] + "\n")
    if damage == "no score":
        monkeypatch.setattr(results, "has_score", lambda path: False)
    if damage == "still decoding":
        made.phases.write_text("".join(f"{line}\n" for line in made.phases.read_text().splitlines()[:-1]))
    assert probe_speed.measured(made, 8) is None


@pytest.mark.parametrize(("hours", "words"), [(0.00431, "0.0043"), (1.26, "1.3"), (12.44, "12.4"), (1234.5, "1,234.5")])
def test_hours_are_never_nothing(hours: float, words: str) -> None:
    assert probe_speed.in_words(hours) == words
