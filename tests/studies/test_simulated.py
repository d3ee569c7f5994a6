"""Test that simulated campaigns have the properties that the module states."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from pipeline.stats.design import Design
from studies import worlds
from studies.probits import arm_lifts
from studies.simulated import Sampler, World, batches

DESIGN = Design()


def test_two_equal_models_disagree_on_13_of_100_items():
    rng = np.random.default_rng(2)
    levels = np.array([float(level) for level in DESIGN.accuracies])[:, None]
    answers = Sampler.new(rng, (20, 6, 2000), levels).answers(np.broadcast_to(levels, (20, 6, 2)))
    assert (answers[:, :, 0] ^ answers[:, :, 1]).mean() == pytest.approx(0.13, abs=0.004)
    assert answers.mean((0, 2, 3)) == pytest.approx(levels[:, 0], abs=0.01)


def test_the_same_seed_is_the_same_campaign_whatever_the_number():
    short, long = (next(iter(batches(World(), DESIGN, (4,), num))) for num in (50, 120))
    assert np.array_equal(short[-1].board, long[-1].board) and np.array_equal(short[2].dev.right, long[2].dev.right)


def test_an_exploit_is_where_its_world_puts_it():
    def gaps(world: World) -> tuple[float, float]:
        """In the last round the weakest family's dev lift over its fresh lift, and the board's lift over fresh in all families."""
        rounds = [runs[-1] for runs in batches(world, DESIGN, (5,), 200)]
        dev = np.mean([(each.dev.right[:, -1].mean() - each.fresh.right[:, -1].mean()) / 300 for each in rounds])
        reference = np.mean([(each.dev.reference[:, -1] - each.fresh.reference[:, -1]).mean() / 300 for each in rounds])
        board = np.mean(
            [(each.board - each.board_reference[:, None] - arm_lifts(each.fresh).mean(1)).mean() for each in rounds]
        )
        return float(dev - reference), float(board)

    assert gaps(worlds.DESIGNED["G_flat"])[0] == pytest.approx(0.135, abs=0.02)  # 13.7 points in statistics.md 5.1
    assert gaps(worlds.DESIGNED["X_flat"]) == pytest.approx((0, -0.135 / 6), abs=0.01)
    assert gaps(worlds.DESIGNED["leaky"])[1] == pytest.approx(0.135 / 6, abs=0.006)
    assert gaps(worlds.NULLS["healthy"]) == pytest.approx((0, 0), abs=0.01)


def levels(rounds: list, which: str) -> tuple[np.ndarray, np.ndarray]:
    """(F,) probits of the accuracies of the arms together and of the reference, over campaigns and rounds."""
    sets = [getattr(each, which) for each in rounds]
    arms = np.mean([counts.right.mean((0, 2)) / counts.num_items for counts in sets], 0)
    reference = np.mean([counts.reference.mean(0) / counts.num_items for counts in sets], 0)
    return ndtri(arms), ndtri(reference)


@pytest.mark.parametrize("probits", [0.6, -0.6])
def test_where_a_set_is_easier_all_models_move_by_the_same_probits(probits):
    quiet = World(recipe_sd=0, common_sd=0, collapse_probability=0, unequal=(-1, 2), dev_easier=probits)
    rounds = [each for runs in batches(quiet, DESIGN, (7,), 200) for each in runs]
    expected = np.array([0, 0, probits, 0, 0, probits])
    for easy, plain in zip(levels(rounds, "dev"), levels(rounds, "fresh"), strict=True):
        assert easy - plain == pytest.approx(expected, abs=0.05)
    board = World(recipe_sd=0, common_sd=0, collapse_probability=0, board_easier=probits)
    (harder, plain) = (
        next(iter(batches(world, DESIGN, (8,), 50))) for world in (board, replace(board, board_easier=0))
    )
    moved = harder[0].board_reference.mean() - plain[0].board_reference.mean()
    base = ndtri([float(level) for level in DESIGN.accuracies])
    assert moved == pytest.approx((ndtr(base + probits) - ndtr(base)).mean(), abs=0.01)


def test_the_reference_is_a_run_with_a_seed_of_its_own():
    """Its luck is in dev, fresh and board alike, so that every lift over it contains it."""
    world = World(recipe_sd=0, common_sd=0, collapse_probability=0, seed_sd=0.02)
    rounds = [runs[-1] for runs in batches(world, DESIGN, (9,), 400)]
    lifts = [
        np.concatenate([arm_lifts(getattr(each, which)).mean((1, 2)) for each in rounds]) for which in ("dev", "fresh")
    ]
    board = np.concatenate([each.board.mean(1) - each.board_reference for each in rounds])
    expected = (0.02**2 * (1 + 1 / DESIGN.arms)) ** 0.5
    for one, other in ((lifts[0], lifts[1]), (lifts[1], board)):
        assert np.cov(one, other)[0, 1] ** 0.5 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("world", "spread"),
    [
        (World(seed_sd=0.03, seed_freedom=3, collapse_probability=0), 0.03),
        (World(family_seed_sd=0.04, seed_sd=0.03, collapse_probability=0), 0.05),
        (World(seed_sd=0.0, collapse_probability=0.3, collapse=0.1), 0.1 * 0.21**0.5),
    ],
)
def test_seeds_have_the_stated_spread(world, spread):
    drawn = world.seeds(np.random.default_rng(10), (20_000, 2, 3))
    assert drawn.std() == pytest.approx(spread, rel=0.1)
    shared = np.corrcoef(drawn[:, 0].ravel(), drawn[:, 1].ravel())[0, 1]
    assert shared == pytest.approx(1 - (world.family_seed_sd / spread) ** 2, abs=0.05)
