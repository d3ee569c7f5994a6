"""Test forecasts of hours and money: with assumed rates by hand, and with rates measured from made-up attempts."""

import functools
import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import Campaign
from pipeline.cluster import forecast, local_runner
from pipeline.config import decoding, footprint, settings
from pipeline.execution import results
from pipeline.reporting import cost
from tests.support.campaigns import attributes, frozen_campaign, scored

NANO = ["experiment=nano_30b", "cluster=slurm_pyxis"]


def test_an_assumed_forecast_by_hand():
    """600 steps of 32 rows of 300 tokens at 14,850 a second and 1.5 times that on two GPUs; a round is eight arms and the reference's judging."""
    own = ["parallelism.judge_tp=1", "cluster.capacity.price_per_gpu_hour=2"]
    expected = forecast.forecast(settings.compose([*NANO, *own]), num_arms=8)
    assert expected is not None
    train = 120 + 600 * 32 * 300 / 14850 / (2 * 0.75)
    assert expected.train_hours_per_arm == pytest.approx(2 * train / 3600)
    rates = {1: 159.0, 64: 2635.0, 256: 7272.0, 512: 10898.0}
    lengths = [7680 if i % 100 == 50 else 150 for i in range(3600)]
    judged = {  # by an arm's two GPUs, which hold a replica each and take every second item
        n: 120 + max(decoding.played(lengths[first:n:2], 64, rates) for first in (0, 1)) for n in (3600, 1800)
    }
    reference = 120 + decoding.played(lengths[:1800], 64, rates)  # by one
    assert expected.judge_hours_per_arm == pytest.approx(2 * judged[3600] / 3600)
    assert expected.reference_hours == pytest.approx(reference / 3600)
    assert expected.first_hours == pytest.approx(2 * (train + 2 * judged[1800]) / 3600)
    assert expected.hours == pytest.approx(
        8 * (expected.train_hours_per_arm + expected.judge_hours_per_arm) + reference / 3600
    )
    assert expected.cost == pytest.approx(2 * expected.hours)


def test_one_rate_without_lengths_is_the_longest_that_may_be():
    own = [
        "cluster.capacity.decode_tokens_per_second={64:1000}",
        "tasks.expected={row_tokens:0,completion_tokens:0,share_at_limit:0}",
    ]
    chosen = settings.compose([*NANO, "parallelism=tp1", *own, "cluster.capacity.start_seconds=0"])
    chosen.cluster.capacity.decode_tokens_per_second = {64: 1000.0}
    expected = forecast.forecast(chosen, num_arms=8)
    assert expected is not None
    assert expected.train_hours_per_arm == pytest.approx(600 * 32 * 8192 / 14850 / 3600)
    assert expected.judge_hours_per_arm == pytest.approx(-(-3600 // 64) * 64 * 7680 / 1000 / 3600, rel=0.01)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 16))
def test_continuous_batching_is_played_as_a_loop_over_steps_plays_it(lengths, slots):
    rates = {1: 14.0, 4: 50.0, 8: 90.0}
    waiting, busy, seconds = list(lengths), [], 0.0
    while waiting or busy:
        while waiting and len(busy) < slots:
            busy.append(waiting.pop(0))
        seconds += decoding.step_seconds(len(busy), rates)
        busy = [left - 1 for left in busy if left > 1]
    assert decoding.played(lengths, slots, rates) == pytest.approx(seconds)


def test_one_slot_and_slots_for_all_by_hand():
    assert decoding.played([10, 20, 30], 1, {1: 10.0}) == pytest.approx(6.0)
    assert decoding.played([30] * 8, 8, {8: 80.0}) == pytest.approx(3.0)
    assert decoding.step_seconds(16, {8: 80.0}) == pytest.approx(0.2), "beyond the largest, in proportion"
    assert decoding.step_seconds(6, {4: 40.0, 8: 40.0}) == pytest.approx(0.15), "on the line between 0.1 and 0.2 s"


def test_a_recipe_that_samples_by_hand():
    """rft draws 2,400 completions once. grpo draws 100 rollouts of 64, and scores each under two policies."""
    one = [*NANO, "parallelism=tp1", "cluster.capacity.start_seconds=0"]
    rates, learned = {1: 159.0, 64: 2635.0, 256: 7272.0, 512: 10898.0}, 600 * 32 * 300 / 14850
    rft = forecast.forecast(settings.compose([*one, "recipe=rft"]), num_arms=8)
    drawn = decoding.played([1024 if i % 100 == 50 else 150 for i in range(2400)], 64, rates)
    assert rft is not None and rft.sample_hours_per_arm == pytest.approx(drawn / 3600)
    assert rft.train_hours_per_arm == pytest.approx((learned + drawn) / 3600)
    grpo = forecast.forecast(settings.compose([*one, "recipe=grpo"]), num_arms=8)
    short, long = (decoding.played([150] * (64 - count) + [1024] * count, 64, rates) for count in (0, 1))
    sampled = 100 * (0.99**64 * short + (1 - 0.99**64) * long) + 6400 * 300 / 14850
    assert grpo is not None and grpo.sample_hours_per_arm == pytest.approx(sampled / 3600)
    assert grpo.train_hours_per_arm == pytest.approx((learned + sampled) / 3600)
    share = sampled / (learned + sampled)
    assert f"drawing and scoring 6,400 completions is {share:.0%} of the training" in grpo.source
    assert grpo.wall_hours == pytest.approx(grpo.train_hours_per_arm + grpo.judge_hours_per_arm)


@functools.cache
def drawing() -> settings.Settings:
    return settings.compose([*NANO, "recipe=grpo", "parallelism=tp1"])


@settings_of(deadline=None)
@given(st.integers(1, 64), st.sampled_from([0.0, 0.003, 0.01, 0.05, 1.0]), st.sampled_from([1, 2]))
def test_a_rollout_s_seconds_are_the_mean_over_how_many_are_long(prompts, share, dp):
    """Against the sum over the binomial distribution, for rollouts that all slots hold at once; dp ranks wait for the slowest."""
    chosen, number = drawing(), 8 * prompts
    chosen.recipe.batch_size, chosen.parallelism.dp, chosen.tasks.expected.share_at_limit = number, dp, share
    chosen.recipe.options |= {"updates_per_rollout": 1, "decode_batch_size": number}
    chosen.tasks.expected.row_tokens = 1e-9  # so that scoring takes no time
    rates, mine, mean = chosen.cluster.capacity.decode_tokens_per_second, number // dp, 0.0
    for count in range(number + 1):
        likelihood = math.comb(number, count) * share**count * (1 - share) ** (number - count)
        long = min(mine, -(-count // dp))
        mean += (
            likelihood * decoding.played([150] * (mine - long) + [1024] * long, number, rates) if likelihood else 0.0
        )
    times = chosen.recipe.num_steps - int(chosen.recipe.options["sft_steps"])
    assert forecast.assumed_sampling(chosen) == pytest.approx(times * mean, rel=0.06)


def test_no_method_that_learns_from_the_file_alone_draws_anything():
    for method in ("sft_lora", "sft_full"):
        chosen = settings.compose([*NANO, f"recipe={method}"])
        assert chosen.recipe.drawn == (0, 0) and forecast.assumed_sampling(chosen) == 0


def test_every_layout_that_ships_says_what_a_site_must_have():
    chosen = settings.compose([*NANO, "cluster.capacity.gpu_memory_gib=139", "tasks.decode_batch_size=256"])
    found = {layout.name: layout for layout in forecast.layouts(chosen, 8)}
    assert [(each.gpus, each.nodes, each.arms_on_node) for each in found.values()] == [
        (1, 1, 8), (2, 1, 4), (4, 1, 2), (8, 1, 1), (16, 2, 1),
    ]  # fmt: skip
    assert not any(each.refusal for each in found.values())
    assert found["tp2"].expected is not None and found["tp2"].expected.first_round_hours < 10
    assert found["tp1"].must_have(8) == "1 GPU with 90.0 GiB for an arm; 8 GPUs for all 8 arms at once"
    small = settings.compose([*NANO, "cluster.capacity.gpu_memory_gib=39"])
    refusals = {each.name: each.refusal for each in forecast.layouts(small, 8)}
    assert refusals["tp1"].startswith("training needs ") and not refusals["tp2"] and not refusals["tp4_dp2"]
    alone = settings.compose([*NANO, "cluster.capacity.gpu_memory_gib=39", "parallelism.judge_tp=1"])
    with pytest.raises(ConfigError, match="decoding needs "):
        footprint.check_memory(alone.to_dict())
    held = settings.compose([*NANO, "cluster.capacity.gpu_memory_gib=39", "parallelism.recompute=none"])
    with pytest.raises(ConfigError, match=r"training needs 52\.4 GiB"):
        footprint.check_memory(held.to_dict())


@pytest.mark.parametrize(
    ("overrides", "arms", "words"),
    [
        ([], 4, "cluster.mem is empty, .* one arm takes a node, .*Set cluster.mem to what a node has"),
        (["cluster.mem=900G"], 4, ""),
        (["cluster.worker.mem_per_gpu=100G"], 4, ""),
        (["cluster.mem=900G", "+cluster.sbatch.exclusive=true"], 1, "An arm has its node alone, because cluster.sbatch.exclusive is set"),
        (["cluster.mem=900G", "+cluster.sbatch.exclusive=user"], 4, ""),
        (["parallelism=tp4_dp2"], 4, ""),  # an arm fills the node
    ],
)  # fmt: skip
def test_what_keeps_arms_from_sharing_a_node_is_said(overrides, arms, words):
    chosen = settings.compose([*NANO, *overrides])
    found = {layout.name: layout for layout in forecast.layouts(chosen, 8)}
    assert found["tp2"].arms_on_node == arms
    said = cost.sharing_in_words(chosen)
    assert re.match(words, said) if words else said == ""


def test_without_rates_there_is_no_forecast(tmp_path):
    assert forecast.forecast(settings.compose(), num_arms=8) is None
    assert forecast.forecast(settings.compose(), 8, frozen_campaign(tmp_path).frozen_rounds()) is None


def attempt(
    campaign: Campaign, arm: str, train: list[dict[str, object]], marks: list[tuple[str, float]], **tokens: list[int]
) -> None:
    """One that trained, and was judged with completions of so many tokens by set. marks: when its phases began."""
    folder = campaign.round("r0001")
    made = folder.claim_attempt(arm)
    made.progress.write_text("".join(json.dumps({"phase": "train"} | line) + "\n" for line in train))
    made.phases.write_text("".join(json.dumps({"phase": phase, "at": at, "detail": ""}) + "\n" for phase, at in marks))
    frozen = folder.frozen_plan()
    mine = next(each for each in frozen.arms if each.name == arm)
    items = {
        name: [row | {"num_tokens": length} for row, length in zip(scored(20), lengths, strict=False)]
        for name, lengths in tokens.items()
    }
    results.write_result(made.result, attributes(frozen, mine), items, [], {})


def marks_of(start: float, train: float, decode: float, rest: float) -> list[tuple[str, float]]:
    """Marks of an arm whose start-up is half before training and half after it."""
    lasting = [
        ("claim", start / 2),
        ("train", train),
        ("check", rest),
        ("generate_start", start / 2),
        ("generate", decode),
        ("completed", 0.0),
    ]
    return [
        (phase, 1000.0 + sum(seconds for _, seconds in lasting[:number])) for number, (phase, _) in enumerate(lasting)
    ]


def test_measured_rates_by_hand(tmp_path: Path) -> None:
    """Two arms of two ranks: 30 steps and 3,000 tokens in 20 s by the worker's clock, though the trainers say 15."""
    campaign = frozen_campaign(tmp_path)
    short, long = [9] * 40, [15] * 40
    attempt(
        campaign, "a0", [{"step": 10, "tokens": 1000, "seconds": 5.0}], marks_of(4, 8, 6, 1), dev=short, fresh=short
    )
    lines = [{"step": 5, "tokens": 9, "seconds": 1.0}, {"step": 20, "tokens": 2000, "seconds": 10.0}]
    attempt(campaign, "a1", lines, marks_of(8, 12, 10, 3), dev=long, fresh=short)
    chosen = settings.compose(["experiment=smoke", "recipe.num_steps=20"])
    rates = forecast.measured(chosen, campaign.frozen_rounds())
    assert rates is not None
    assert (rates.train_tokens_per_second, rates.train_tokens_per_step, rates.source) == (
        150.0,
        100.0,
        "measured in r0001",
    )
    assert (rates.start_seconds, rates.rest_seconds) == (6.0, 2.0)
    assert rates.lengths == {"dev": [9, 15] * 20, "fresh": short}
    expected = forecast.forecast(chosen, 8, campaign.frozen_rounds())
    assert expected is not None
    # Two replicas of one core take every second of 24 items, 12 dev and 12 fresh, all at once, so the longest of each counts.
    assert dict(expected.phases) == {
        "start-up": 6.0,
        "training": pytest.approx(20 * 100 / 150),
        "decoding": pytest.approx(8.0),
        "rest": 2.0,
    }
    arm = 6 + 20 * 100 / 150 + 8 + 2
    assert expected.wall_hours == pytest.approx(arm / 3600)
    assert expected.train_hours_per_arm + expected.judge_hours_per_arm == pytest.approx(2 * arm / 3600)
    at_once = max(1, len(os.sched_getaffinity(0)) // 2)
    assert expected.round_seconds == pytest.approx(-(-8 // at_once) * arm)


def test_a_round_like_the_measured_one_is_forecast_as_it_was(tmp_path: Path) -> None:
    """Whatever the completions: with as many items decoding takes what it took, and fewer items take what the play says."""
    campaign = frozen_campaign(tmp_path)
    chosen = settings.compose(
        [
            "experiment=smoke",
            "tasks.num_dev_per_family=10",
            "tasks.num_fresh_per_family=10",
            "tasks.decode_batch_size=7",
        ]
    )
    tokens = {name: [1 + (7 * item + 3 * len(name)) % 50 for item in range(30)] for name in ("dev", "fresh")}
    lines = [{"step": chosen.recipe.num_steps, "tokens": 700, "seconds": 3.0}]
    attempt(campaign, "a2", lines, marks_of(5, 3.5, 11, 2), **tokens)
    expected = forecast.forecast(chosen, 8, campaign.frozen_rounds())
    assert expected is not None
    assert dict(expected.phases) == pytest.approx({"start-up": 5.0, "training": 3.5, "decoding": 11.0, "rest": 2.0})
    steps = {7: 7.0}
    fresh, both = (
        decoding.played(lengths, 7, steps, 2) for lengths in (tokens["fresh"], [*tokens["dev"], *tokens["fresh"]])
    )
    assert expected.reference_hours == pytest.approx(2 * (3.5 + 11 * fresh / both) / 3600)


def test_an_arm_that_was_judged_on_fewer_sets_changes_no_rate_of_decoding(tmp_path: Path) -> None:
    """It began after its round was closed. The seconds of the others were for both sets, and were taken for those of one."""
    campaign, chosen = frozen_campaign(tmp_path), settings.compose(["experiment=smoke"])
    lines = [{"step": chosen.recipe.num_steps, "tokens": 700, "seconds": 3.0}]
    both = {"dev": [9] * 40, "fresh": [30] * 40}
    attempt(campaign, "a0", lines, marks_of(5, 3.5, 12, 2), **both)
    before = forecast.forecast(chosen, 8, campaign.frozen_rounds())
    attempt(campaign, "a1", lines, marks_of(5, 3.5, 5, 2), dev=[9] * 40)
    after = forecast.forecast(chosen, 8, campaign.frozen_rounds())
    assert before and after
    assert after.phases["decoding"] == pytest.approx(before.phases["decoding"])


def test_a_training_that_was_cut_off_makes_no_forecast_shorter(tmp_path: Path) -> None:
    """An agent's run made far more steps than the recipe has and was cut off: its own clock knows neither its start nor its end."""
    campaign, chosen = frozen_campaign(tmp_path), settings.compose(["experiment=smoke"])
    steps = chosen.recipe.num_steps
    judged = {"dev": [9] * 40, "fresh": [30] * 40}
    attempt(campaign, "a0", [{"step": steps, "tokens": 700, "seconds": 3.0}], marks_of(5, 13.5, 12, 2), **judged)
    longer = [{"step": made, "tokens": 350 * made, "seconds": 0.1 * made} for made in (steps, 50 * steps)]
    attempt(campaign, "a5", longer, marks_of(5, 140, 0, 0))
    expected = forecast.forecast(chosen, 8, campaign.frozen_rounds())
    assert expected and expected.phases["training"] == pytest.approx(13.5)


def test_a_frozen_forecast_is_whole_milliseconds_and_the_first_round_counts_r0000() -> None:
    expected = forecast.forecast(settings.compose([*NANO, "parallelism=tp1"]), num_arms=8)
    assert expected is not None
    first, later = expected.as_record(True), expected.as_record(False)
    assert later["arm"] == {
        "start-up": 240_000,
        "training": round(600 * 32 * 300 / 14850 * 1000),
        "decoding": later["arm"]["decoding"],
        "rest": 0,
        "arm": later["arm"]["arm"],
    }
    assert first["devices"] - later["devices"] == pytest.approx(3.6e6 * expected.first_hours, abs=1)
    assert later["round"] == later["arm"]["arm"] < later["devices"], "on Slurm all arms work at once"


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.integers(1, 6))
def test_a_makespan_lies_between_what_it_cannot_beat_and_one_after_the_other(
    seconds: list[float], at_once: int
) -> None:
    found = local_runner.makespan(seconds, at_once)
    assert max(*seconds, sum(seconds) / at_once) <= found * 1.000001 and found <= sum(seconds) * 1.000001
    assert local_runner.makespan(seconds, 1) == pytest.approx(sum(seconds))
    assert local_runner.makespan(seconds, len(seconds)) == pytest.approx(max(seconds))


def test_a_trial_that_says_more_steps_than_it_was_given_makes_no_forecast_short(tmp_path: Path) -> None:
    """One of the arms would set the forecast of all: a million million steps took 4 s."""
    campaign, chosen = frozen_campaign(tmp_path), settings.compose(["experiment=smoke"])
    line = {"step": chosen.recipe.num_steps, "tokens": 700, "seconds": 3.0}
    attempt(campaign, "a0", [line], marks_of(5, 4, 12, 2), dev=[9] * 40)
    attempt(campaign, "a1", [line, line | {"step": 10**12}], marks_of(5, 4, 12, 2), dev=[9] * 40)
    expected = forecast.forecast(chosen, 8, campaign.frozen_rounds())
    assert expected and expected.phases["training"] == pytest.approx(4.0)


def test_what_a_trial_makes_up_is_not_counted(tmp_path: Path) -> None:
    """A trial may write anything; an attempt that has no score has decoded nothing."""
    campaign = frozen_campaign(tmp_path)
    many = [{"step": 10, "tokens": "many", "seconds": 5.0}, {"step": -1, "tokens": 1, "seconds": 1}]
    attempt(campaign, "a0", many, marks_of(1, 1, 1, 1), dev=[9] * 40)
    huge = [{"step": 10, "tokens": 1e-300, "seconds": 1e300}, {"step": 1, "tokens": 1e308, "seconds": 1e-300}]
    attempt(campaign, "a1", huge, marks_of(1, 1, 1, 1), dev=[9] * 40)
    campaign.round("r0001").attempts("a0")[0].result.write_bytes(b"half")
    assert forecast.measured(settings.compose(["experiment=smoke"]), campaign.frozen_rounds()) is None


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (["experiment=agents"], "up to 0.5 hours of a rank"),
        ([*NANO, "parallelism=tp2", "worker=llm"], "up to 6 GPU-hours"),
    ],
)
def test_what_agents_do_beside_their_full_run_is_told_to_be_left_out(overrides: list[str], most: str) -> None:
    """900 s on two ranks are half an hour of a rank, and 10,800 s on two GPUs six GPU-hours."""
    said = cost.agents_in_words(settings.compose(overrides))
    assert "not what its agent does before and beside it" in said and most in said
    assert cost.agents_in_words(settings.compose(["experiment=smoke"])) == ""
