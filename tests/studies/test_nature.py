"""Test the truth of a simulated campaign: the same luck for every policy, and effects as designed."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from pipeline.campaign.records import Arm
from pipeline.stats.design import Design
from studies import worlds
from studies.closed_loop import start
from studies.nature import Nature
from studies.simulated import World

SMALL = Design(dev_items=100, fresh_items=100, submissions=2)
RATE, RANK = ("recipe.learning_rate", "0.002"), ("recipe.lora.rank", "8")
ANCHOR, MOVED = Arm(0, "anchor", 7, replicate_of="reference"), Arm(1, "axis", 8, (RATE,), axis="learning_rate")
HEALTHY = World()
QUIET = World(recipe_sd=0, common_sd=0, seed_sd=0, collapse_probability=0)


def nature(world: World = HEALTHY, design: Design = SMALL, number: int = 0) -> Nature:
    return Nature(world, design, number, start().families)


def test_policies_of_one_campaign_meet_the_same_luck():
    """The first round has the same arms for all: outcomes, board and truth are the same."""
    one, other = nature().play(1, [ANCHOR, MOVED]), nature().play(1, [ANCHOR, MOVED])
    assert one == other
    assert nature(number=1).play(1, [ANCHOR, MOVED]) != one
    assert nature().effects(MOVED)[0] == pytest.approx(nature().effects(replace(MOVED, index=5, seed=99))[0])


def test_effects_have_the_designed_spread_and_standing_settings_keep_seventy_percent():
    here = nature(World(exploit_sd=0.08))
    arms = [replace(MOVED, overrides=(("recipe.learning_rate", f"0.0{n}"),)) for n in range(1, 1501)]
    found = np.array([here.effects(arm)[0] for arm in arms])
    assert found.std() == pytest.approx((0.03**2 + 0.015**2) ** 0.5, rel=0.05)
    assert found.mean(1).std() == pytest.approx((0.03**2 / 6 + 0.015**2) ** 0.5, rel=0.06)
    bent = np.array([here.effects(arm)[1] for arm in arms])
    assert (bent**2).mean() ** 0.5 == pytest.approx(0.08, rel=0.06)
    own, _ = here.effects(MOVED)
    stands, _ = here.effects(replace(MOVED, role="replicate"))
    assert stands == pytest.approx(0.7 * own)
    both, _ = here.effects(replace(MOVED, overrides=(RATE, RANK)))
    assert both == pytest.approx(0.7 * own + here.effects(replace(MOVED, overrides=(RANK,)))[0])
    assert here.effects(ANCHOR) == (pytest.approx(np.zeros(6)), 0.0)


def test_without_effects_nothing_is_gained_and_scores_are_those_of_the_levels():
    played = nature(QUIET, Design(dev_items=1000, fresh_items=1000)).play(1, [ANCHOR] * 8)
    assert set(played.truth.values()) == {0.0}
    for outcome in (played.reference, *played.outcomes):
        for marks in outcome.outcomes.values():
            found = [marks[family].count("1") / 1000 for family in start().families]
            assert found == pytest.approx([0.95, 0.92, 0.85, 0.75, 0.6, 0.3], abs=0.06)
    assert all(abs(float(score) - 0.728) < 0.05 for score in played.board.values())


def lifts(world: World, number: int, repaired: dict[str, str]) -> tuple[float, float, float]:
    """Weakest family: dev and fresh lift of an arm over the reference, and its true gain; many items, no luck."""
    here = nature(replace(world, recipe_sd=0, common_sd=0, seed_sd=0, collapse_probability=0, slope_sd=0, stack_sd=0),
                  Design(dev_items=20_000, fresh_items=20_000), 1)  # fmt: skip
    here.repair(repaired)
    played = here.play(number, [MOVED])
    family = start().families[-1]

    def share(outcome, item_set: str) -> float:
        return outcome.outcomes[item_set][family].count("1") / 20_000

    return (
        share(played.outcomes[0], "dev") - share(played.reference, "dev"),
        share(played.outcomes[0], "fresh") - share(played.reference, "fresh"),
        6 * played.truth["a1"],
    )


def test_learned_items_lift_dev_alone_and_new_items_undo_it():
    world = worlds.DESIGNED["G_rev"]
    exploit = nature(world, Design(), 1).effects(MOVED)[1]
    assert exploit > 0.05
    assert lifts(world, 1, {}) == pytest.approx((0, 0, 0), abs=0.012)
    dev, fresh, gain = lifts(world, 3, {})
    assert dev == pytest.approx(exploit / 2, abs=0.012)  # learned, less what the target loses everywhere
    assert fresh == pytest.approx(-exploit / 2, abs=0.012)
    assert gain == pytest.approx(-exploit / 2, abs=1e-9)
    again, *_ = lifts(world, 3, {start().families[-1]: "r0003"})
    assert again == pytest.approx(-exploit / 2, abs=0.012)


def test_a_shift_fools_fresh_items_and_new_dev_items_too():
    world = worlds.DESIGNED["X_flat"]
    exploit = nature(world, Design(), 1).effects(MOVED)[1]
    for repaired in ({}, {start().families[-1]: "r0003"}):
        assert lifts(world, 3, repaired) == pytest.approx((exploit, exploit, 0), abs=0.012)


def test_a_repair_changes_the_items_of_its_family_alone():
    here, family = nature(), start().families[2]
    before = here.play(2, [ANCHOR]).reference.outcomes["dev"]
    here.repair({family: "r0002"})
    after = here.play(2, [ANCHOR]).reference.outcomes["dev"]
    assert [name for name in before if before[name] != after[name]] == [family]
    here.repair({family: "r0002"})
    assert here.play(2, [ANCHOR]).reference.outcomes["dev"] == after


@pytest.mark.parametrize("probits", [0.6, -0.6])
def test_sets_are_as_much_easier_as_their_world_says(probits):
    world = replace(QUIET, dev_easier=probits, board_easier=-probits, unequal=(-1,), fresh_harder=0.1)
    played = nature(world, Design(dev_items=5000, fresh_items=5000, board_rows=30_000)).play(2, [ANCHOR])
    levels = norm.ppf([0.95, 0.92, 0.85, 0.75, 0.6, 0.3])
    for outcome in (played.reference, *played.outcomes):
        dev, fresh = (
            norm.ppf([outcome.outcomes[item_set][family].count("1") / 5000 for family in start().families])
            for item_set in ("dev", "fresh")
        )
        assert dev == pytest.approx(levels + [0, 0, 0, 0, 0, probits], abs=0.1)
        assert fresh == pytest.approx(levels - 0.2, abs=0.1)
    total = norm.cdf(levels + [0, 0, 0, 0, 0, -probits]).mean()
    assert [float(score) for score in played.board.values()] == pytest.approx([total], abs=0.02)


def test_the_reference_has_a_seed_effect_that_its_anchor_does_not_share():
    lifts = []
    for number in range(60):
        here = Nature(replace(QUIET, seed_sd=0.03), Design(dev_items=400, fresh_items=400), number, start().families)
        played = here.play(1, [ANCHOR])
        scores = [
            [sum(marks.count("1") for marks in run.outcomes[item_set].values()) / 2400 for item_set in ("dev", "fresh")]
            for run in (played.reference, played.outcomes[0])
        ]
        lifts.append(np.subtract(*scores))
    dev, fresh = np.array(lifts).T
    assert np.cov(dev, fresh)[0, 1] ** 0.5 == pytest.approx(0.03 * 2**0.5, rel=0.3)
