"""Test which arm is kept: exact values against the baseline, whatever may be claimed."""

from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign import facts
from pipeline.campaign.records import Arm
from pipeline.decision import promotion
from pipeline.decision.promotion import ABOVE, BELOW, WITHIN
from tests.support import logs
from tests.support.logs import HARD, LogCampaign, Truth

RULES = facts.load_constitution()
PLAN = {
    arm.name: arm
    for arm in (
        Arm(0, "anchor", 10, replicate_of="reference"),
        *(Arm(n, "axis", 10 + n, (("recipe.lora.alpha", str(n)),), axis="alpha") for n in range(1, 7)),
        Arm(7, "replicate", 17, replicate_of="reference"),
    )
}
STANDING = {**PLAN, "a7": replace(PLAN["a7"], replicate_of="standing")}
VALUES = {"a0": "0.006", "a1": "0.02", "a2": "-0.01", "a3": "0.004", "a7": "-0.003"}
WITHIN_ALL = dict.fromkeys(("a1", "a2", "a3"), WITHIN)


def gains(values=VALUES, arms=PLAN, verdicts=WITHIN_ALL) -> dict[str, Fraction]:
    return promotion.gaining(values, arms, promotion.baseline_of(arms), verdicts, RULES)


def test_values_are_held_against_the_mean_of_the_baseline_s_runs():
    assert promotion.baseline_value(VALUES, PLAN, "reference") == Fraction(
        "0.001"
    )  # 0.006, -0.003, and the reference's own 0
    assert gains() == {"a1": Fraction("0.019"), "a3": Fraction("0.003")}
    assert promotion.baseline_value(VALUES, STANDING, "standing") == Fraction("-0.003")
    assert gains(arms=STANDING) == {"a1": Fraction("0.023"), "a3": Fraction("0.007")}
    assert promotion.baseline_value({}, STANDING, "standing") == 0


def test_what_is_below_noise_gains_nothing_and_what_has_no_value_only_what_may_be_claimed():
    verdicts = {"a1": BELOW, "a2": ABOVE, "a3": WITHIN, "a4": ABOVE, "a5": WITHIN}
    assert gains(verdicts=verdicts) == {"a3": Fraction("0.003"), "a4": 0}


@given(st.lists(st.decimals(-1, 1, places=6), min_size=3, max_size=3))
def test_exactly_the_baseline_is_no_gain(values):
    shown = {f"a{n}": format(value, "f") for n, value in enumerate(values, 1)} | {"a0": "0.5", "a7": "-0.5"}
    assert set(gains(shown)) == {f"a{n}" for n, value in enumerate(values, 1) if value > 0}


@cache
def small(name: str) -> LogCampaign:
    worlds = {
        "slight": lambda name, arm: Truth(dict.fromkeys(logs.LEVELS, 0.012) if arm.axis == "clip_norm" else {}),
        "worse": lambda name, arm: Truth(dict.fromkeys(logs.LEVELS, -0.03) if arm.role == "axis" else {}),
        "large": lambda name, arm: Truth({HARD: 0.3} if arm.axis == "clip_norm" else {}),
    }
    campaign = LogCampaign(worlds[name], replace(logs.Design(), submissions=2))
    campaign.play()
    return campaign


@pytest.mark.parametrize("world", ["slight", "large"])
def test_a_gain_is_built_on_before_anything_is_claimed(world):
    decision = small(world).derived["r0001"].decision
    assert (decision.kept, decision.claimed) == ("a5", False)
    said = "it is kept for now, and nothing is claimed of it"
    assert any("a5 is worth most" in reason and said in reason for reason in decision.reasons)
    assert [key for key, _ in decision.policy.standing] == ["recipe.clip_norm"]


def test_where_every_axis_is_worse_nothing_is_kept():
    decision = small("worse").derived["r0001"].decision
    assert (decision.kept, decision.claimed, decision.policy.standing) == (None, False, ())
    assert any("no axis is worth more than the reference recipe" in reason for reason in decision.reasons)


def test_constants_are_the_constitution_s():
    assert RULES.promotion_margin == 0 and promotion.tie_distance(RULES) == 1
