"""Test that the level at which a test just alarms is the level at which it begins to alarm."""

import numpy as np
import pytest

from studies.look_scores import LookScores

RNG = np.random.default_rng(60)
CAMPAIGNS, FAMILIES = 200, 4


def look() -> LookScores:
    shares = RNG.dirichlet(np.ones(FAMILIES), CAMPAIGNS)
    gap_scores, arm_scores = RNG.normal(1.5, 1, (2, CAMPAIGNS, FAMILIES))
    mean_scores, leak_scores = RNG.normal(1.5, 1, (2, CAMPAIGNS))
    carried = RNG.dirichlet(np.ones(FAMILIES), CAMPAIGNS)
    return LookScores(shares, gap_scores, mean_scores, arm_scores, np.ones(CAMPAIGNS), carried, leak_scores)


@pytest.mark.parametrize("test", ["gap", "arm", "leak"])
def test_a_test_alarms_from_its_level_on(test):
    found = look()
    levels = getattr(found, f"{test}_level")()
    for level in (0.001, 0.01, 0.05, 0.2):
        alarms = getattr(found, test)(level)
        alarms = alarms.any(1) if alarms.ndim == 2 else alarms
        clear = np.abs(levels / level - 1) > 0.01  # quantiles are rounded up to 0.0001
        assert clear.sum() > 0.9 * CAMPAIGNS
        assert np.array_equal(alarms[clear], (levels < level)[clear])


def test_a_family_that_carries_half_is_named():
    found = look()
    named = found.named()
    assert set(named) == {-1, *range(FAMILIES)}
    for number, carried in zip(named, found.carried, strict=True):
        assert carried.max() < 0.5 if number < 0 else carried[number] >= 0.5
