"""Test that the numpy rule decides as the exact one does, and chooses the same submissions."""

import numpy as np
import pytest

from pipeline.stats import arm_values
from studies.rule_twin import Twin
from studies.simulated import RoundSeen, counts_of
from tests.support import ledgers


def test_numpy_and_exact_rule_decide_alike_on_random_ledgers():
    looks, alarms = ledgers.compare(60, seed=1)
    assert looks > 150 and 0.2 < alarms / looks < 0.8


@pytest.mark.long  # `make test-long` also takes 10,000 ledgers
def test_numpy_and_exact_rule_decide_alike_on_a_thousand_looks():
    assert ledgers.compare(400, seed=2)[0] > 1000


def test_slots_are_those_of_the_twin_in_the_first_round():
    compared = 0
    for seed in range(12):
        design, rounds = ledgers.ledger(np.random.default_rng([56, seed]))
        if design.submissions < 2:
            continue
        twin, seen, first = Twin(design), ledgers.exact_rounds(rounds)[:1], rounds[0]["ahead"]
        dev, fresh = (counts_of(rounds[0][name], rounds[0][f"{name}_reference"]) for name in ("dev", "fresh"))
        twin.take(RoundSeen(dev, fresh, rounds[0]["board"][None], np.array([rounds[0]["board_reference"]])))
        chosen = arm_values.submissions(seen, design, [first], design.submissions)
        assert chosen == list(twin.choose(np.array([first]), design.submissions)[0])
        assert chosen[0] == first and sorted(chosen) == sorted(set(chosen))
        compared += 1
    assert compared > 3
