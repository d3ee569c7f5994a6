"""Test that the forecast of docs/forecast.md is what the command prints, and that it keeps what it promises."""

from bench import forecast as bench
from pipeline.campaign.records import NUM_ARMS
from pipeline.cluster import forecast
from pipeline.config import settings
from tests.support.paths import ROOT


def test_the_page_has_what_the_command_prints() -> None:
    text = (ROOT / "docs" / "forecast.md").read_text()
    assert bench.table() in text
    assert bench.sampling_table() in text
    assert bench.arithmetic() in text.replace("\n    ", "\n")


def test_a_30b_round_takes_less_than_ten_gpu_hours_and_fits_into_a_night_on_one_gpu() -> None:
    hours = {}
    for name, (overrides, gpus) in bench.ROWS.items():
        chosen = settings.compose(overrides)
        expected = forecast.forecast(chosen, NUM_ARMS)
        assert expected is not None
        hours[name] = (expected.first_round_hours, bench.wall_hours(chosen, expected, gpus))
    before, _, after, careful, _, alone = hours.values()
    assert after[0] < careful[0] < 10 < before[0]
    assert alone[1] < 8


def test_jobs_take_their_turns_on_the_gpus_of_a_site() -> None:
    """On one GPU everything runs one after the other; on as many as there are jobs the longest chain counts."""
    chosen = settings.compose([*bench.AFTER, "parallelism=tp1"])
    expected = forecast.forecast(chosen, NUM_ARMS)
    assert expected is not None
    assert abs(bench.wall_hours(chosen, expected, 1) - expected.first_round_hours) < 1e-9
    train = expected.train_hours_per_arm
    dev = (expected.first_hours - train) / 2
    assert abs(bench.wall_hours(chosen, expected, 10) - (train + dev + expected.reference_hours)) < 1e-9
