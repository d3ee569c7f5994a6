"""Test the axes of a campaign: ranges relative to the reference, and what `init` refuses so that no later round has to."""

from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import load_constitution
from pipeline.campaign.records import NUM_ARMS
from pipeline.config import footprint, policy_schema, settings
from pipeline.decision import plan
from pipeline.rounds import arms, init
from tests.support.paths import ROOT

RULES = load_constitution()
EXPERIMENTS = sorted(path.stem for path in (settings.SOURCE / "experiment").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (settings.SOURCE / "recipe").glob("*.yaml"))


def with_axis(name: str, **changes: object) -> list[str]:
    """The override that gives the demo's axes with one of them changed, by name; None drops a key."""
    axes = OmegaConf.to_container(OmegaConf.load(settings.SOURCE / "policy" / "axes" / "tiny.yaml"))["axes"]
    for axis in axes:
        if axis["name"] == name:
            axis.update(changes)
    axes = [{key: value for key, value in axis.items() if value is not None} for axis in axes]
    return [f"policy.axes={_text(axes)}"]


def _text(value: object) -> str:
    """A value by Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_text(each)}' for key, each in value.items())}}}"
    return f"'{value}'"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_brings_axes_that_contain_its_reference_with_every_recipe(experiment, recipe, tmp_path):
    # Some experiments have two steps of two rows.
    short = ["recipe.options.sft_steps=1", "recipe.options.samples_per_prompt=2"] if recipe in ("grpo", "rft") else []
    chosen = settings.compose([f"experiment={experiment}", f"recipe={recipe}", *short])
    arms.check_axes(chosen, RULES)
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "substrate").symlink_to(ROOT / "substrate")
    init.check_recipe(chosen, payload)


def test_the_30b_moves_what_its_practitioners_move():
    chosen = settings.compose(["experiment=nano_30b"])
    keys = {axis.key.removeprefix("recipe.") for axis in chosen.policy.axes}
    assert keys >= {"learning_rate", "schedule", "warmup_steps", "clip_norm", "lora.rank", "lora.alpha", "lora.targets"}
    assert keys >= {"mix.equation", "loss_weighting", "trace_style", "selection.choice"}
    rate = next(axis for axis in chosen.policy.axes if axis.name == "learning_rate")
    assert (rate.low, rate.high) == ("0.00005", "0.0008")


def test_a_relative_range_is_resolved_once_and_frozen_as_absolute():
    chosen = settings.compose(["experiment=nano_30b", "recipe.learning_rate=3e-4"])
    rate = chosen.policy.axes[0]
    assert (rate.low, rate.high) == ("0.000075", "0.0012")
    frozen = settings.typed(OmegaConf.create(settings.to_yaml(chosen)))
    assert "factors" not in settings.to_yaml(chosen) and frozen == chosen
    moved = settings.with_overrides(chosen, [("recipe.learning_rate", "0.001")])
    assert moved.policy == chosen.policy


@given(
    st.decimals("0.00001", "0.05", places=7), st.decimals("0.01", "1", places=4), st.decimals("1.1", "100", places=4)
)
def test_factors_give_exact_decimals(value, low, high):
    axis = {"name": "rate", "key": "recipe.learning_rate", "kind": "log", "factors": [str(low), str(high)]}
    config = {"recipe": {"learning_rate": float(value)}}
    (found,) = policy_schema.with_ranges({"axes": [axis]}, config)["axes"]
    assert Decimal(found["low"]) == Decimal(str(float(value))) * low
    assert Decimal(found["high"]) == Decimal(str(float(value))) * high
    assert "E" not in found["low"] + found["high"] and "factors" not in found


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["recipe.learning_rate=2e-4"],
            r"The axis learning_rate has the range from 0\.001 to 0\.016, and the reference has recipe\.learning_rate = "
            r"0\.0002, which is not among them.*factors",
        ),
        (["recipe.lora.rank=12"], r"The axis lora_rank has the choices 8, 32, 16, and .*rank = 12.*Add 12 to them"),
        (with_axis("lora_rank", choices=["16"]), "The axis lora_rank has no choice but 16"),
        (with_axis("lora_rank", choices=["16", "x"]), r"axis lora_rank reaches recipe\.lora\.rank = x, of which the reference has 16, .*refused"),
        (with_axis("clip_norm", high="20"), r"axis clip_norm reaches recipe\.clip_norm = 20, .*Valid: 0\.01 to 10"),
        (with_axis("lora_rank", key="recipe.num_steps", choices=["150", "9"]), "recipe.num_steps' may not change"),
        (with_axis("clip_norm", low=None, high=None, factors=["2", "4"]), r"range from 2 to 4, .*clip_norm = 1\.0"),
        (with_axis("clip_norm", factors=["1", "4"]), "neither low, high nor choices beside them"),
        (with_axis("schedule", kind="log", choices=None, factors=["1", "4"]), "Factors need a key whose value is a number"),
        (with_axis("clip_norm", kind="int", low="0.5"), "whole numbers for the kind int"),
    ],
)  # fmt: skip
def test_what_a_later_round_would_refuse_is_refused_before_the_first(overrides, words):
    with pytest.raises(ConfigError, match=words):
        arms.check_axes(settings.compose(overrides), RULES)


def test_six_axes_are_refused_at_once_because_round_two_may_need_seven():
    chosen = settings.compose()
    chosen.policy.axes = chosen.policy.axes[:6]
    arms.arms_of(chosen, 1, RULES)
    with pytest.raises(ConfigError, match="policy.axes has 6 axes. Round 2 needs 7 to 16"):
        arms.check_axes(chosen, RULES)


def test_a_value_that_the_image_refuses_is_refused_at_init(tmp_path):
    chosen = settings.compose(["experiment=nano_30b", "recipe.num_steps=20"])  # warm-up reaches 30 steps
    arms.check_axes(chosen, RULES)
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "substrate").symlink_to(ROOT / "substrate")
    with pytest.raises(ConfigError, match="a value of an axis is refused: .*warmup_steps is 30"):
        init.check_recipe(chosen, payload)


def test_whole_numbers_between_the_ends_are_shown_to_the_image(tmp_path):
    """Two data-parallel ranks share the held-out rows: they divide 2 and 16, and not 9."""
    layout = ["recipe.selection.choice=best", "recipe.holdout_per_family=16", "parallelism.dp=2", "recipe.batch_size=4"]
    range_of_rows = {"key": "recipe.holdout_per_family", "kind": "int", "low": "2", "high": "16"}
    chosen = settings.compose([*with_axis("weak_family_share", **range_of_rows), *layout])
    arms.check_axes(chosen, RULES)
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "substrate").symlink_to(ROOT / "substrate")
    with pytest.raises(ConfigError, match=r"a value of an axis is refused: .*dp=2, holdout_per_family=\d*[13579]\."):
        init.check_recipe(chosen, payload)


@pytest.fixture(scope="module")
def nano() -> settings.Settings:
    return settings.compose(["experiment=nano_30b"])


@pytest.fixture(scope="module")
def shown(nano: settings.Settings) -> set[tuple[str, str]]:
    return {setting for _, setting in arms.values_of_axes(nano, RULES)}


@given(st.lists(st.integers(1, 7), min_size=8, max_size=8))
def test_every_whole_number_that_a_round_plans_was_shown_to_the_image(nano, shown, slots):
    policy = settings.policy_of(nano)
    reference = {axis.key: settings.value_of(nano, axis.key) for axis in policy.axes}
    whole = {axis.key for axis in policy.axes if axis.kind in ("int", "choice")}
    for number, slot in enumerate(slots, 1):
        made = plan.make_arms(policy, number, 0, NUM_ARMS - 1 - slot, reference)
        planned = {arm.overrides[-1] for arm in made if arm.role == "axis"}
        assert {setting for setting in planned if setting[0] in whole} <= shown
        policy = plan.with_tried(policy, made)


def test_axes_are_compared_by_what_they_need_at_least():
    """All targets alone make auto recompute everything, which needs less than the reference, that recomputes nothing."""
    least = ["recipe=sft_full", "recipe.optimizer=sgd", "recipe.lora.targets=[q_proj,k_proj,v_proj,o_proj]"]
    site = ["experiment=nano_30b", "cluster=slurm", "parallelism=tp1", "cluster.capacity.scan=triton", *least]
    chosen = settings.compose([*site, "cluster.capacity.gpu_memory_gib=90"])
    all_targets = "q_proj,k_proj,v_proj,o_proj,in_proj,shared_experts.up_proj,shared_experts.down_proj"
    both = [("recipe.optimizer", "adan"), ("recipe.lora.targets", all_targets)]
    found = [(setting, settings.with_overrides(chosen, [setting])) for setting in both]
    assert [footprint.recompute_of(each.to_dict())[0] for each in (chosen, found[1][1])] == ["none", "full"]
    for _, each in found:
        footprint.check_memory(each.to_dict())
    with pytest.raises(
        ConfigError, match=r"together reach recipe.optimizer = adan and recipe.lora.targets = .*: training needs"
    ):
        arms._check_joint_memory(chosen, found)


def test_axes_that_fit_one_by_one_must_fit_together():
    """Rank 32 and all targets each need more memory than the reference, and one can join the other in the standing recipe."""
    smallest = ["recipe.lora.rank=8", "recipe.lora.targets=[q_proj,k_proj,v_proj,o_proj]"]
    site = ["experiment=nano_30b", "cluster=slurm", "cluster.capacity.gpu_memory_gib=0", *smallest]
    chosen = settings.compose(site)
    alone = [settings.with_overrides(chosen, [setting]) for _, setting in arms.values_of_axes(chosen, RULES)]
    peaks = [held.peak for each in alone for held in footprint.of_arm(each.to_dict()).values()]
    limit = (max(peaks) + footprint.DEVICE_RESERVE_BYTES) / 2**30
    chosen = settings.compose([*site, f"cluster.capacity.gpu_memory_gib={limit}"])
    with pytest.raises(
        ConfigError,
        match=r"The axes together reach recipe.lora.rank = 32 and .*, each of which fits alone: (training|decoding) needs",
    ):
        arms.check_axes(chosen, RULES)


def test_lora_targets_are_a_list_that_an_axis_can_move():
    chosen = settings.compose(["experiment=nano_30b"])
    key = "recipe.lora.targets"
    assert settings.value_of(chosen, key) == ",".join(chosen.recipe.lora.targets)
    moved = settings.with_overrides(chosen, [(key, "q_proj,k_proj,v_proj,o_proj")])
    assert moved.recipe.lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert type(moved.recipe.lora.targets) is list
    assert settings.with_overrides(moved, [(key, settings.value_of(chosen, key))]) == chosen


def test_where_axes_outnumber_arms_each_axis_gets_all_of_its_values():
    """By the round's number an axis that moves in every second round would get every second value: the rate only values above the reference's."""
    chosen = settings.compose(["experiment=nano_30b"])
    values: dict[str, list[str]] = {}
    policy = settings.policy_of(chosen)
    reference = {axis.key: settings.value_of(chosen, axis.key) for axis in policy.axes}
    for number in range(1, 9):
        made = plan.make_arms(policy, number, 0, 1, reference)
        policy = plan.with_tried(policy, made)
        for arm in made:
            if arm.role == "axis":
                values.setdefault(arm.axis or "", []).append(arm.overrides[-1][1])
    assert set(map(len, values.values())) == {8 * (NUM_ARMS - 2) // len(chosen.policy.axes)}
    rates = [Decimal(value) for value in values["learning_rate"]]
    assert min(rates) < Decimal("0.0002") < max(rates)
    for axis in chosen.policy.axes:
        if axis.kind == "choice":
            assert len(set(values[axis.name])) == min(len(axis.choices) - 1, len(values[axis.name]))
        else:
            assert max(Counter(values[axis.name]).values()) == 1


def test_a_value_that_stands_costs_no_turn():
    chosen = settings.compose()
    axis = next(axis for axis in settings.policy_of(chosen).axes if axis.name == "lora_rank")
    policy = settings.policy_of(chosen)
    for current, others in (("16", ["8", "32"]), ("32", ["8", "16"])):
        moves: list[tuple[str, str]] = []
        for _ in range(6):
            tried = replace(policy, tried=tuple(moves))
            moves.append(plan.move(tried, axis, 3, {axis.key: current}) or ("", ""))
        assert [setting[1] for setting in moves] == others * 3


def test_a_dry_run_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from pipeline.__main__ import main

    assert main(["round", str(tmp_path / "new"), "recipe.learning_rate=2e-4", "--dry-run"]) == 2
    assert "which is not among them" in capsys.readouterr().err
