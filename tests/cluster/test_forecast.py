"""Test forecasts of hours and money: with assumed rates by hand, and with rates measured from made-up attempts."""

import json
from pathlib import Path

import pytest

from pipeline.campaign.layout import Campaign
from pipeline.cluster import forecast
from pipeline.config import settings
from pipeline.execution import results
from tests.support.campaigns import attributes, frozen_campaign, scored

NANO = ["experiment=nano_30b", "cluster=slurm_pyxis"]


def test_an_assumed_forecast_by_hand():
    """600 steps of 32 sequences of 8,192 tokens at 5,000 a second; 6 x 600 items of 7,680 at 1,000, on 4 of 16 GPUs."""
    expected = forecast.forecast(settings.compose([*NANO, "cluster.capacity.price_per_gpu_hour=2"]), num_arms=8)
    assert expected is not None
    assert expected.train_hours_per_arm == pytest.approx(600 * 32 * 8192 / 5000 / 3600)
    assert expected.judge_hours_per_arm == pytest.approx(4 * 3600 * 7680 / 1000 / 3600)
    assert expected.hours == pytest.approx(8 * (expected.train_hours_per_arm + expected.judge_hours_per_arm))
    assert expected.cost == pytest.approx(2 * expected.hours)


def test_without_rates_there_is_no_forecast(tmp_path):
    assert forecast.forecast(settings.compose(), num_arms=8) is None
    assert forecast.forecast(settings.compose(), 8, frozen_campaign(tmp_path).frozen_rounds()) is None


def attempt(campaign: Campaign, arm: str, train: list[dict[str, object]], decoding_seconds: float) -> None:
    """One that trained, and decoded 80 items of 9 tokens."""
    folder = campaign.round("r0001")
    made = folder.claim_attempt(arm)
    made.progress.write_text("".join(json.dumps({"phase": "train"} | line) + "\n" for line in train))
    marks = [("generate", 100.0), ("score", 100.0 + decoding_seconds), ("completed", 200.0)]
    made.phases.write_text("".join(json.dumps({"phase": phase, "at": at, "detail": ""}) + "\n" for phase, at in marks))
    frozen = folder.frozen_plan()
    mine = next(each for each in frozen.arms if each.name == arm)
    items = {name: scored(20) for name in ("dev", "fresh")}
    results.write_result(made.result, attributes(frozen, mine), items, [], {})


def test_measured_rates_by_hand(tmp_path: Path):
    """Two arms of two ranks: 30 steps, 3,000 tokens, 15 s; 160 items, 1,440 tokens, 16 s on one of them."""
    campaign = frozen_campaign(tmp_path)
    attempt(campaign, "a0", [{"step": 10, "tokens": 1000, "seconds": 5.0}], 6.0)
    attempt(
        campaign, "a1", [{"step": 5, "tokens": 9, "seconds": 1.0}, {"step": 20, "tokens": 2000, "seconds": 10.0}], 10.0
    )
    chosen = settings.compose(["experiment=smoke"])
    rates = forecast.measured(chosen, campaign.frozen_rounds())
    assert rates == forecast.Rates(100.0, 100.0, 90.0, 9.0, "measured in this campaign")
    expected = forecast.forecast(chosen, 8, campaign.frozen_rounds())
    assert expected is not None
    assert expected.train_hours_per_arm == pytest.approx(2 * 100 / 100 / 3600)
    assert expected.judge_hours_per_arm == pytest.approx(2 * 24 * 9 / 90 / 3600)


def test_what_a_trial_makes_up_is_not_counted(tmp_path: Path):
    """A trial may write anything; an attempt that has no score has decoded nothing."""
    campaign = frozen_campaign(tmp_path)
    attempt(
        campaign, "a0", [{"step": 10, "tokens": "many", "seconds": 5.0}, {"step": -1, "tokens": 1, "seconds": 1}], 6.0
    )
    attempt(
        campaign,
        "a1",
        [{"step": 10, "tokens": 1e-300, "seconds": 1e300}, {"step": 1, "tokens": 1e308, "seconds": 1e-300}],
        6.0,
    )
    campaign.round("r0001").attempts("a0")[0].result.write_bytes(b"half")
    assert forecast.measured(settings.compose(["experiment=smoke"]), campaign.frozen_rounds()) is None
