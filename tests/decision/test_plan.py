"""Test records and plans: frozen ones survive JSON, the eight arms obey the articles, and axis values fill their ranges."""

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

from pipeline.campaign import canonical
from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Campaign
from pipeline.campaign.records import NUM_ARMS, Arm, Axis, Outcome, Plan, Policy, with_setting
from pipeline.claims.assess_claims import DOUBLED, FINAL_ROUND, RUNNING
from pipeline.config import settings
from pipeline.decision import plan

words = st.text("abcdefghij._0123456789", min_size=1, max_size=12)
settings_lists = st.lists(st.tuples(words, words), max_size=4).map(tuple)
maybe = st.none() | words
arms_of_any_kind = st.builds(Arm, st.integers(0, 7), words, st.integers(0, 2**31), settings_lists, maybe, maybe)
rounds = st.integers(1, 40)
seeds = st.integers(0, 2**40)
RATE = Axis("rate", "recipe.learning_rate", "log", "0.001", "0.016")
RANK = Axis("rank", "recipe.lora.rank", "choice", choices=("8", "32", "24"))
LINEAR = Axis("share", "recipe.mix.roman", "linear", "0", "10")
STEPS = Axis("steps", "recipe.warmup_steps", "int", "0", "1000")


@pytest.fixture(scope="module")
def default() -> tuple[Policy, dict[str, str]]:
    """The shipped policy and the reference recipe's value of every axis."""
    chosen = settings.compose()
    policy = settings.policy_of(chosen)
    return policy, {axis.key: settings.value_of(chosen, axis.key) for axis in policy.axes}


def moved(arm: Arm, policy: Policy) -> list[tuple[str, str]]:
    return [setting for setting in arm.overrides if setting not in policy.standing]


@given(settings_lists, st.tuples(words, words))
def test_a_replaced_setting_stands_once_and_last(settings_before, setting):
    after = with_setting(settings_before, setting)
    assert after[-1] == setting
    assert [other for other in after[:-1]] == [other for other in settings_before if other[0] != setting[0]]


@given(st.lists(arms_of_any_kind))
def test_plan_survives_its_own_json(arms):
    frozen = Plan("demo-1", "r0001", "i" * 64, "c" * 64, "d" * 64, "e" * 64, Policy((), (RATE, RANK)), tuple(arms))
    assert Plan.from_json(json.loads(canonical.encoded(frozen.to_json()))) == frozen


@pytest.mark.parametrize("change", [{"schema": 2}, {"colour": "red"}, {"arms": [{"index": 0}]}, {"arms": 3}, []])
def test_plan_of_another_form_is_refused(change, tmp_path):
    folder = Campaign(tmp_path).round("r0001")
    frozen = Plan("demo-1", "r0001", "i", "c", "d", "e", Policy((), ()), plan.reference_arms(1)).to_json()
    write_file(folder.plan, json.dumps(frozen))
    assert folder.frozen_plan().to_json() == frozen
    write_file(folder.plan, json.dumps(change if isinstance(change, list) else {**frozen, **change}))
    with pytest.raises(IntegrityError, match="plan.json is not a plan"):
        folder.frozen_plan()


def test_a_crash_has_no_score():
    assert not Outcome("a1", "axis", "failed", "crashed", outcomes={"fresh": {"roman": "111"}}).scored("fresh")
    assert not Outcome("a1", "axis", "completed", "completed").scored("fresh")


def test_truncated_items_count_as_wrong_and_families_come_in_name_order():
    outcome = Outcome("a1", "axis", "completed", "completed", outcomes={"dev": {"b": "1T", "a": "0"}})
    assert outcome.right("dev") == (0b010, 3)


def test_radical_inverses_are_the_halton_sequence():
    expected = qmc.Halton(d=len(plan.PRIMES), scramble=False).random(200)
    ours = [[float(plan.radical_inverse(index, base)) for base in plan.PRIMES] for index in range(200)]
    np.testing.assert_allclose(ours, expected, atol=1e-12)


@given(st.sampled_from([RATE, LINEAR, STEPS]), st.integers(1, 500), st.sampled_from(plan.PRIMES))
def test_axis_value_is_in_range_and_plain(axis, index, base):
    value = plan.axis_value(axis, index, base)
    assert Decimal(axis.low) <= Decimal(value) <= Decimal(axis.high)
    assert "E" not in value.upper()
    if axis.kind != "int":
        assert len(Decimal(value).normalize().as_tuple().digits) <= 3


@given(st.integers(1, 500), st.sampled_from(plan.PRIMES))
def test_axis_value_agrees_with_floating_point(index, base):
    share = float(plan.radical_inverse(index, base))
    assert float(plan.axis_value(RATE, index, base)) == pytest.approx(0.001 * math.exp(share * math.log(16)), rel=0.006)
    assert float(plan.axis_value(LINEAR, index, base)) == pytest.approx(10 * share, rel=0.006)
    assert int(plan.axis_value(STEPS, index, base)) == pytest.approx(1000 * share, abs=0.5)


def test_axis_value_keeps_three_digits_of_the_geometric_mean():
    assert plan.axis_value(RATE, 1, 2) == "0.004"
    assert plan.axis_value(RATE, 2, 2) == "0.002"
    assert plan.axis_value(RATE, 3, 2) == "0.008"
    assert plan.axis_value(RATE, 4, 2) == "0.00141"  # 0.001 * sqrt(2)


def test_choices_take_turns():
    assert [plan.axis_value(RANK, index, 3) for index in range(1, 5)] == ["8", "32", "24", "8"]


@pytest.mark.parametrize(
    "axis",
    [
        Axis("odd", "recipe.learning_rate", "cubic", "1", "2"),
        Axis("odd", "recipe.learning_rate", "log", "0", "2"),
        Axis("odd", "recipe.learning_rate", "linear", "3", "2"),
        Axis("odd", "recipe.learning_rate", "int", "one", "2"),
        Axis("odd", "recipe.learning_rate", "linear", "0", "NaN"),
        Axis("odd", "recipe.lora.rank", "choice"),
    ],
)
def test_axis_without_values_is_named(axis, default):
    policy, reference = default
    with pytest.raises(ConfigError, match="The axis odd"):
        plan.make_arms(Policy((), (axis, *policy.axes)), 1, 0, 1, reference)


def test_too_few_and_too_many_axes_are_refused(default):
    policy, reference = default
    with pytest.raises(ConfigError, match="policy.axes has 5 axes. Round 1 needs 6 to 16"):
        plan.make_arms(Policy((), policy.axes[:5]), 1, 0, 1, reference)
    with pytest.raises(ConfigError, match="policy.axes has 21 axes"):
        plan.make_arms(Policy((), policy.axes * 3), 1, 0, 1, reference)


@given(st.data(), rounds, seeds, st.integers(1, 3))
def test_the_eight_arms_obey_the_articles(default, data, round_number, campaign_seed, num_replicates):
    policy, reference = default
    pairs = [(axis.key, plan.axis_value(axis, index, 2)) for axis in policy.axes for index in (1, 2)]
    settable = st.sampled_from(pairs)
    standing: tuple[tuple[str, str], ...] = ()
    for setting in data.draw(st.lists(settable, max_size=3)):
        standing = with_setting(standing, setting)
    dead = tuple(data.draw(st.lists(settable.filter(lambda s: s[0] != "recipe.trace_style"), max_size=2, unique=True)))
    policy = Policy(standing, policy.axes, dead)

    arms = plan.make_arms(policy, round_number, campaign_seed, num_replicates, reference)

    assert [arm.name for arm in arms] == [f"a{index}" for index in range(NUM_ARMS)]
    assert (arms[0].role, arms[0].overrides, arms[0].replicate_of) == ("anchor", (), "reference")
    assert len({arm.seed for arm in arms}) == NUM_ARMS
    current = {**reference, **dict(standing)}
    axes = [arm for arm in arms if arm.role == "axis"]
    assert len({arm.axis for arm in axes}) == len(axes) == NUM_ARMS - 1 - num_replicates
    for arm in axes:
        key, value = arm.overrides[-1]
        assert dict(arm.overrides) == {**dict(standing), key: value}
        assert not plan.same_value(value, current[key])
        assert (key, value) not in dead
    for arm in arms[1 + len(axes) :]:
        assert (arm.role, arm.overrides) == ("replicate", standing)
        assert arm.replicate_of == ("standing" if standing else "reference")


def test_a_standing_recipe_is_always_run_unchanged(default):
    policy, reference = default
    arms = plan.make_arms(Policy((("recipe.lora.rank", "8"),), policy.axes), 3, 0, 0, reference)
    assert [arm.replicate_of for arm in arms if arm.role == "replicate"] == ["standing"]


STANDING_RANK = (("recipe.lora.rank", "8"),)


@pytest.mark.parametrize(
    ("confirmation", "standing", "number", "is_last", "runs"),
    [
        (RUNNING, STANDING_RANK, 2, False, {"reference": 1, "standing": 1}),
        (RUNNING, STANDING_RANK, 4, True, {"reference": 1, "standing": 1}),
        (DOUBLED, (), 1, False, {"reference": 2}),
        (DOUBLED, STANDING_RANK, 2, False, {"reference": 2, "standing": 2}),
        (DOUBLED, (), 2, False, {"reference": 2}),
        (FINAL_ROUND, STANDING_RANK, 3, False, {"reference": 1, "standing": 1}),
        (FINAL_ROUND, STANDING_RANK, 4, True, {"reference": 4, "standing": 4}),
        (FINAL_ROUND, (), 4, True, {"reference": 1}),
    ],
)
def test_each_way_to_confirm_has_its_runs(default, confirmation, standing, number, is_last, runs):
    policy, reference = default
    bought = int(number == 1)
    arms = plan.make_arms(Policy(standing, policy.axes), number, 0, bought, reference, confirmation, is_last)
    assert Counter(arm.replicate_of for arm in arms if arm.replicate_of) == runs
    assert sum(arm.role == "axis" for arm in arms) == NUM_ARMS - sum(runs.values())
    assert all(
        arm.overrides == (standing if arm.replicate_of == "standing" else ()) for arm in arms if arm.replicate_of
    )


def test_the_second_standing_run_of_a_doubled_round_is_the_first_bought_replicate(default):
    policy, reference = default
    for bought, runs in ((1, 2), (2, 3)):
        arms = plan.make_arms(Policy(STANDING_RANK, policy.axes, replicates=bought), 3, 0, 0, reference, DOUBLED)
        assert sum(arm.replicate_of == "standing" for arm in arms) == runs


def test_what_is_set_aside_is_skipped(default):
    policy, reference = default
    first = plan.make_arms(policy, 1, 0, 1, reference)[1]
    skipped = plan.make_arms(replace(policy, set_aside=first.overrides), 1, 0, 1, reference)[1]
    assert first.axis == skipped.axis and first.overrides != skipped.overrides


COARSE = Axis("coarse", "recipe.batch_size", "int", "1", "3")
MANY = tuple(
    replace(axis, name=f"{axis.name}{copy}", key=f"{axis.key}.{copy}")
    for copy in range(3)
    for axis in (RATE, RANK, COARSE, LINEAR)
)
AT_FIRST = {axis.key: {"log": "0.004", "choice": "24", "int": "2", "linear": "1"}[axis.kind] for axis in MANY}


@given(st.data(), st.integers(4, 12), st.integers(1, 16))
def test_no_value_comes_again_before_the_others_and_no_axis_moves_twice_while_another_waits(data, num_axes, num_rounds):
    """Slots rise and fall with replicates, and axes retire and are kept, as decisions do it."""
    policy = Policy((), MANY[:num_axes])
    tried: dict[str, Counter[str]] = {axis.name: Counter([AT_FIRST[axis.key]]) for axis in policy.axes}
    since: dict[str, Counter[str]] = {axis.name: Counter() for axis in policy.axes}  # moves of others since its own
    for number in range(1, num_rounds + 1):
        slots = data.draw(st.integers(1, min(NUM_ARMS - 1 - bool(policy.standing), num_axes)))
        arms = plan.make_arms(policy, number, 0, NUM_ARMS - 1 - slots, AT_FIRST)
        axes = {axis.name: (plan.PRIMES[n], axis) for n, axis in enumerate(policy.axes)}
        moved = [(arm.axis, arm.overrides[-1][1]) for arm in arms if arm.role == "axis"]
        current = {**AT_FIRST, **dict(policy.standing)}
        assert len({name for name, _ in moved}) == len(moved) == min(slots, num_axes - len(policy.retired))
        for name, value in moved:
            base, axis = axes[name]
            values = set(plan.other_values(axis, base, current[axis.key]))
            assert value in values
            assert tried[name][value] == min(tried[name][each] for each in values)
            tried[name][value] += 1
            since[name].clear()
            for other in set(axes) - {name} - set(policy.retired):
                since[other][name] += 1
                assert since[other][name] < 2, f"{name} moved twice, {other} waits"
        policy = plan.with_tried(policy, arms)
        if moved and data.draw(st.booleans()):
            name, value = data.draw(st.sampled_from(moved))
            policy = replace(policy, standing=with_setting(policy.standing, (axes[name][1].key, value)))
        if num_axes - len(policy.retired) > 4 and data.draw(st.booleans()):
            policy = replace(
                policy, retired=(*policy.retired, data.draw(st.sampled_from(sorted(set(axes) - set(policy.retired)))))
            )


def test_bought_replicates_make_no_axis_repeat_its_setting():
    """Seen with twelve axes when slots followed each other as 6, 7, 7, 6, 5: half of a round's settings were those of the round before."""
    policy, given = Policy((), MANY), []
    for number, slots in enumerate((6, 7, 7, 6, 5), 1):
        arms = plan.make_arms(policy, number, 0, NUM_ARMS - 1 - slots, AT_FIRST)
        given += [arm.overrides[-1] for arm in arms if arm.role == "axis"]
        policy = plan.with_tried(policy, arms)
    assert [key for key, _ in given] == [MANY[place % 12].key for place in range(31)]
    ranges = [setting for setting in given if setting[0].startswith(("recipe.learning_rate", "recipe.mix"))]
    assert len(set(ranges)) == len(ranges)


def test_a_value_that_was_proposed_counts_as_tried_and_its_axis_waits():
    proposed = replace(plan.reference_arms(1)[0], role="axis", overrides=((RATE.key, "4.0e-3"),), axis="rate")
    policy = plan.with_tried(Policy((), (RATE, LINEAR, STEPS, RANK)), [proposed])
    assert plan.move(policy, RATE, 2, {RATE.key: "0.001"}) == (RATE.key, "0.002")
    reference = {RATE.key: "0.001", LINEAR.key: "1", STEPS.key: "1", RANK.key: "24"}
    arms = plan.make_arms(policy, 2, 0, 4, reference)
    assert [arm.axis for arm in arms if arm.axis] == ["share", "steps", "rank"]


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_an_axis_without_another_value_is_refused_and_never_searched_for_ever(kind):
    flat = Axis("flat", "recipe.learning_rate", kind, "0.0002", "0.00020005")
    with pytest.raises(ConfigError, match=r"The axis flat has no value but 0\.0002, .*Widen its range, or drop it"):
        plan.check_contains(flat, "0.0002")
    assert plan.move(Policy((), (flat,)), flat, 2, {flat.key: "0.0002"}) is None


def test_the_reference_s_value_comes_after_those_that_no_arm_had():
    policy = Policy(((RANK.key, "8"),), (RANK,), tried=((RANK.key, "8"),))
    assert plan.move(policy, RANK, 3, {RANK.key: "32"}) == (RANK.key, "24")
    assert plan.move(replace(policy, tried=(*policy.tried, (RANK.key, "24"))), RANK, 3, {RANK.key: "32"}) == (
        RANK.key,
        "32",
    )


@given(
    st.lists(st.sampled_from(["8", "32", "24"])),
    st.sampled_from(["8", "32", "24"]),
    st.sets(st.sampled_from(["8", "32", "24"]), max_size=2),
)
def test_a_choice_is_found_while_one_is_left(earlier, current, dead):
    closed = tuple((RANK.key, value) for value in sorted(dead))
    policy = Policy((), (RANK,), closed, tried=tuple((RANK.key, value) for value in earlier))
    left = set(RANK.choices) - dead - {current}
    setting = plan.move(policy, RANK, 3, {RANK.key: current})
    assert setting[1] in left if left else setting is None


@pytest.mark.parametrize(("one", "other", "same"), [("0.004", "4e-3", True), ("16", "16.0", True), ("short", "short", True),
                                                      ("short", "16", False), ("0.004", "0.0041", False)])  # fmt: skip
def test_values_are_compared_as_numbers_where_they_are(one, other, same):
    assert plan.same_value(one, other) is same


def test_arm_seed_does_not_depend_on_the_process():
    code = "from pipeline.decision.plan import arm_seed; print(arm_seed(7, 'r0003', 'a5'))"
    elsewhere = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"})
    expected = int(hashlib.sha256(b"7/r0003/a5").hexdigest()[:8], 16) // 2
    assert int(elsewhere) == plan.arm_seed(7, "r0003", "a5") == expected


def test_reference_and_base_make_round_zero():
    arms = plan.reference_arms(5)
    assert [(arm.name, arm.role, arm.overrides) for arm in arms] == [("a0", "reference", ()), ("a1", "base", ())]


def test_radical_inverse_is_exact():
    inverses = [plan.radical_inverse(index, 2) for index in range(1, 5)]
    assert inverses == [Fraction(1, 2), Fraction(1, 4), Fraction(3, 4), Fraction(1, 8)]
