"""Test that the simulated search runs the arms that the real plan makes, and keeps, sets aside and retires as the real decision does."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.claims.assess_claims import CONFIRMATIONS
from pipeline.decision import plan
from studies.claims.claim_search import CHOICES, Judged, Search
from studies.claims.claim_twin import AXIS, OVERWRITES, REFERENCE, STANDING
from studies.closed_loop import start

ROUNDS = 4


def real_arms(search: Search, number: int, confirmation: str, tried):
    """The real plan from the same policy: the kinds of its arms, the names of the moved axes, and what was tried after it."""
    begin = start()
    axes = begin.policy.axes
    standing = tuple(
        (axes[at].key, axes[at].choices[0] if axes[at].choices else "0.123") for at in np.flatnonzero(search.stands[0])
    )
    retired = tuple(axes[at].name for at in np.flatnonzero(search.retired[0]))
    policy = replace(begin.policy, standing=standing, retired=retired, replicates=int(search.bought[0]), tried=tried)
    replicates = begin.rules.first_round_replicates if number == 1 else 0
    made = plan.make_arms(policy, number, 0, replicates, begin.reference, confirmation, number == ROUNDS)
    kept = {key for key, _ in standing}
    repeated = {"reference": REFERENCE, "standing": STANDING}

    def kind(arm):
        if arm.role == "axis":
            return OVERWRITES if arm.overrides[-1][0] in kept else AXIS
        return repeated[arm.replicate_of]

    kinds = [kind(arm) for arm in made]
    return kinds, [arm.axis for arm in made if arm.role == "axis"], plan.with_tried(policy, made).tried


@pytest.mark.parametrize("confirmation", CONFIRMATIONS)
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("stands", "retired", "bought"), [([], [], 0), ([0], [], 0), ([0, 3], [5], 1), ([2], [], 2), ([], [1, 4], 2)]
)
def test_the_arms_are_those_of_the_real_plan(confirmation, number, stands, retired, bought):
    if number == 1 and (stands or retired or bought):
        return
    search = Search(3, 2)
    names = [axis.name for axis in start().policy.axes]
    tried = ()
    for each in range(1, number + 1):
        if each == number:
            search.stands[:, stands], search.retired[:, retired], search.bought[:] = True, True, bought
            for at in stands:
                if CHOICES[at]:
                    search.choice[:, at] = 0
        planned = search.plan(each, ROUNDS, confirmation)
        search.count_turns(planned)
        kinds, axes, tried = real_arms(search, each, confirmation, tried)
        assert sorted(planned.kind[1]) == sorted(kinds)
        assert [names[axis] for axis in planned.axis[1] if axis >= 0] == axes
        assert (planned.kind == planned.kind[0]).all() and planned.kind.shape == (3, 8)


def test_the_largest_gain_is_kept_and_replaces_what_its_axis_had():
    search = Search(1, 1)
    for number, best in ((1, 3), (2, 1)):
        planned = search.plan(number, ROUNDS, "running")
        gains = np.where(planned.moved, 0.01, -np.inf)
        gains[0, best] = 0.05
        effects = np.full((1, 8, 1), 0.01 * number)
        kept = search.take(planned, Judged(np.zeros((1, 8), bool), gains, np.zeros(1, bool)), effects)
        axis = planned.axis[0, best]
        assert kept[0] and search.stands[0, axis] and search.effects[0, axis] == pytest.approx(0.01 * number)
    assert search.stands.sum() == 2


def test_without_a_gain_nothing_is_kept_and_axes_retire_until_four_are_left():
    search = Search(1, 1)
    for number in range(1, 9):
        planned = search.plan(number, 8, "running")
        none = np.full((1, 8), -np.inf)
        assert not search.take(planned, Judged(np.zeros((1, 8), bool), none, np.ones(1, bool)), np.zeros((1, 8, 1)))[0]
        assert search.bought[0] == min(number, 2)
    assert search.retired.sum() == 3 and not search.stands.any()


def test_a_choice_that_is_set_aside_is_not_tried_again():
    search = Search(1, 1)
    planned = search.plan(1, ROUNDS, "running")
    aside = planned.axis == 1  # the rank, which has two more values
    search.take(planned, Judged(aside, np.full((1, 8), -np.inf), np.zeros(1, bool)), np.zeros((1, 8, 1)))
    tried = set()
    for number in range(2, 8):
        later = search.plan(number, ROUNDS, "running")
        search.count_turns(later)
        tried |= set(later.value[later.axis == 1])
    assert planned.value[0, 2] not in tried and len(tried) == 1
