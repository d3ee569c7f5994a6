"""Test the run-level campaigns against items drawn one by one, and against the real decision's arithmetic."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.campaign import facts
from pipeline.campaign.records import Outcome
from pipeline.stats import lifts
from studies.claims.claim_play import Campaigns, item_parts, seed_variance
from studies.claims.claim_twin import REFERENCE, STANDING, every_round
from studies.claims.claim_worlds import DESIGNS, HEALTHY, NULLS, ClaimWorld, unequal
from studies.simulated import Sampler
from tests.support.item_campaigns import ItemCampaigns

DESIGN = DESIGNS["3 x 100"]


def play(world: ClaimWorld, num: int = 4000, confirmation: str = "running", seed: int = 1):
    return Campaigns(world, DESIGN, confirmation, np.random.default_rng(seed), num).play()


@pytest.mark.parametrize("accuracy", [0.95, 0.6, 0.3])
def test_the_item_parts_are_those_of_items_drawn_one_by_one(accuracy):
    rng = np.random.Generator(np.random.SFC64(3))
    levels = np.full((200, 1, 2), accuracy)
    right = Sampler.new(rng, (200, 1, 2000), levels[:, :, :1]).answers(levels)[:, 0].astype(float)
    own, shared = item_parts(np.array(accuracy))
    assert ((right[:, 0] - right[:, 1]) ** 2).mean() / 2 == pytest.approx(own, rel=0.03)
    assert own + shared == pytest.approx(accuracy * (1 - accuracy), rel=0.01)


def test_a_null_world_has_no_effect_and_lifts_of_the_stated_spread():
    played = play(ClaimWorld(seed_sd=0.03, truncated=0.2))
    assert not played.effect.any()
    repeats = np.where(played.runs.of(REFERENCE), played.runs.lift, np.nan)[:, 0]
    first, second = repeats[:, 0], repeats[:, -1]
    own = item_parts(np.array([0.95, 0.8, 0.3]))[0].mean() / 300
    assert np.var(first - second) / 2 == pytest.approx(0.03**2 + own, rel=0.06)
    assert played.runs.variance[:, 0, 0].mean() == pytest.approx(2 * own, rel=0.1)
    wrong = DESIGN.fresh_items - played.right
    assert played.truncated.sum() / wrong.sum() == pytest.approx(0.2, rel=0.02)


def test_what_is_kept_is_chosen_for_its_luck_and_run_anew():
    """The standing run of round 2 is a new run: it does not inherit the luck of the arm that was kept, and so has no lift of its own."""
    played = play(ClaimWorld(seed_sd=0.03, reference_luck=0.0))
    moved = np.where(played.runs.kind[:, 0] != REFERENCE, played.runs.lift[:, 0], np.nan)
    assert np.nanmean(np.nanmax(moved, 1)) > 0.02
    stands = played.runs.kind[:, 1] == STANDING
    assert abs(played.runs.lift[:, 1][stands].mean()) < 0.004


def test_a_planted_setting_stands_once_it_is_kept():
    played = play(ClaimWorld(planted=0.2), 500)
    assert (np.isclose(played.effect[:, 0], 0.2).sum(1) == 1).all() and (played.effect[:, 0] != 0).sum() == 500
    stands = played.runs.kind[:, 1] == STANDING
    assert played.effect[:, 1][stands] == pytest.approx(0.2)
    gone = play(ClaimWorld(planted=0.2, planted_stands=False), 500)
    assert not gone.effect[:, 1:].any()


def test_unequal_sets_change_their_own_accuracy_alone():
    for name, fresh in (("fresh easier by 1, all", 0.883), ("dev easier by 1, all", 0.683)):
        played = play(replace(unequal()[name], reference_luck=0.0), 2000)
        assert played.reference.mean() / DESIGN.fresh_items == pytest.approx(fresh, abs=0.01)
    one = play(unequal()["fresh easier by 1, one family"], 2000).reference.mean((0, 1)) / DESIGN.fresh_items
    assert one == pytest.approx([0.95, 0.8, 0.68], abs=0.02)


def test_effects_of_a_setting_are_the_same_when_it_is_tried_again():
    world = HEALTHY["healthy"]
    here = Campaigns(world, DESIGN, "running", np.random.default_rng(2), 50)
    assert (here._drawn(1, 0) == here._drawn(1, 0)).all()
    assert here._drawn(1, 0).std() == pytest.approx((0.03**2 + 0.015**2) ** 0.5, rel=0.2)


def test_the_variance_of_retraining_is_the_real_one():
    rng, items = np.random.default_rng(5), 40
    for _ in range(20):
        texts = ["".join(rng.choice(["0", "1"], items)) for _ in range(4)]
        runs = [
            Outcome(f"a{n}", "axis", "completed", "completed", outcomes={"fresh": {"f": text}})
            for n, text in enumerate(texts)
        ]
        exact, _ = lifts.seed_variance([runs], "fresh")
        over = [lifts.paired_lift(run, runs[0], "fresh") for run in runs[1:]]
        lift, variance = (np.array([[float(getattr(each, name)) for each in over]]) for name in ("mean", "variance"))
        repeats = np.ones((1, 3), bool)
        assert seed_variance(lift, variance, repeats, ~repeats)[0] == pytest.approx(float(exact))


def test_a_second_standing_run_adds_its_square_around_the_first():
    lift, variance = np.array([[0.1, 0.4, 0.6]]), np.full((1, 3), 0.002)
    repeats, stands = np.array([[1, 0, 0]], bool), np.array([[0, 1, 1]], bool)
    assert seed_variance(lift, variance, repeats, stands)[0] == pytest.approx((0.1**2 + 0.2**2 - 2 * 0.002) / 4)


def test_every_null_world_has_no_effect():
    for name, world in {**NULLS, **unequal()}.items():
        assert not (world.recipe_sd or world.common_sd or world.planted), name


@pytest.mark.parametrize(
    ("num", "tolerance"), [(300, 4), pytest.param(6000, 3, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_campaigns_drawn_item_by_item_say_the_same(num, tolerance):
    """The shares of null campaigns that claim, and that set something aside, within some standard errors of the difference."""
    world, rules = NULLS["unlucky, sd .02"], facts.load_constitution()
    found = []
    for kind, size in ((ItemCampaigns, 300), (Campaigns, num)):
        said = []
        for batch in range(num // size):
            rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([7, batch])))
            played = kind(world, DESIGN, "running", rng, size).play()
            claimed = every_round(played.runs, "running", rules).claimed.any(1)
            said.append([claimed, played.set_aside.any((1, 2)), played.kept[:, 2]])
        found.append(np.concatenate(said, 1).mean(1))
    error = (np.mean(found, 0) * (1 - np.mean(found, 0)) * 2 / num) ** 0.5
    assert (np.abs(found[0] - found[1]) < tolerance * error).all(), found
