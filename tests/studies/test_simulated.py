"""Test that simulated campaigns have the properties that the module states."""

import numpy as np
import pytest

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
