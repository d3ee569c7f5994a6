"""States of a family: every way from one to another, and what can never happen."""

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decision import family_states
from pipeline.decision.family_states import (
    EXTERNAL_CLEAR,
    EXTERNAL_SUSPECT,
    OVERFIT,
    RESTORED,
    SHIFT,
    SUSPECT,
    TRUSTED,
    UNPROVEN,
    FamilySeen,
    FamilyState,
)
from pipeline.stats.alarms import Verdict
from pipeline.stats.leak_test import LeakTest
from pipeline.stats.overfit_test import ALL, GapTest
from pipeline.stats.shift_test import BoardTest

QUIET = FamilySeen(upper_bound=Decimal("0.04"), num_scores=8)
WIDE = replace(QUIET, upper_bound=Decimal("0.06"))
MOVES = [
    (UNPROVEN, QUIET, TRUSTED, "small_gap"),
    (UNPROVEN, WIDE, UNPROVEN, "unchanged"),
    (UNPROVEN, replace(QUIET, num_scores=3), UNPROVEN, "unchanged"),
    (UNPROVEN, replace(QUIET, shift_posterior=Decimal("0.2")), UNPROVEN, "unchanged"),
    (TRUSTED, QUIET, TRUSTED, "renewed"),
    (TRUSTED, WIDE, UNPROVEN, "lapsed"),
    (TRUSTED, None, UNPROVEN, "not_looked"),
    (UNPROVEN, replace(QUIET, gap_suspect=True), SUSPECT, "gap_suspect"),
    (TRUSTED, replace(QUIET, board_suspect=True), SUSPECT, "board_suspect"),
    (UNPROVEN, replace(QUIET, num_canaries=2), SUSPECT, "canaries"),
    (UNPROVEN, replace(WIDE, num_canaries=1), UNPROVEN, "unchanged"),
    (UNPROVEN, replace(QUIET, gap_alarm=True, gap_suspect=True), OVERFIT, "gap_alarm"),
    (SUSPECT, replace(QUIET, gap_alarm=True), OVERFIT, "gap_alarm"),
    (UNPROVEN, replace(QUIET, board_alarm=True, board_suspect=True), SHIFT, "board_alarm"),
    (SHIFT, replace(QUIET, gap_alarm=True), OVERFIT, "gap_alarm"),
    (OVERFIT, replace(QUIET, board_alarm=True), OVERFIT, "unchanged"),
    (OVERFIT, QUIET, OVERFIT, "unchanged"),
    (OVERFIT, None, OVERFIT, "start"),
    (SUSPECT, QUIET, SUSPECT, "clean_look"),
    (SUSPECT, WIDE, SUSPECT, "clean_look"),
    (RESTORED, WIDE, RESTORED, "unchanged"),
    (RESTORED, QUIET, TRUSTED, "small_gap"),
]


@pytest.mark.parametrize(
    ("before", "seen", "after", "code"), MOVES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_look_moves_a_family(before, seen, after, code):
    moved = family_states.next_state(FamilyState(before), seen, external=True)
    assert (moved.name, moved.code) == (after, code)


def test_two_clean_looks_end_a_suspicion_and_anything_else_begins_anew():
    state = FamilyState(SUSPECT)
    for seen, name, looks in ((QUIET, SUSPECT, 1), (WIDE, SUSPECT, 0), (QUIET, SUSPECT, 1), (QUIET, UNPROVEN, 0)):
        state = family_states.next_state(state, seen, external=True)
        assert (state.name, state.clean_looks) == (name, looks)


@pytest.mark.parametrize("reversed_state", [OVERFIT, SHIFT])
def test_a_repair_and_two_clean_looks_restore(reversed_state):
    state, repaired = FamilyState(reversed_state), replace(QUIET, repaired=True)
    state = family_states.next_state(state, repaired, external=True)
    assert (state.name, state.clean_looks) == (reversed_state, 1)
    state = family_states.next_state(family_states.next_state(state, WIDE, external=True), repaired, external=True)
    assert (state.name, state.clean_looks) == (reversed_state, 1)  # the wide look between them began anew
    state = family_states.next_state(state, repaired, external=True)
    assert (state.name, state.was_restored) == (RESTORED, True)
    trusted = family_states.next_state(state, QUIET, external=True)
    assert trusted.name == TRUSTED and family_states.next_state(trusted, WIDE, external=True).name == RESTORED


anything = st.builds(
    FamilySeen,
    *[st.booleans()] * 4,
    st.integers(0, 3),
    st.decimals(-1, 1, places=3),
    st.decimals(0, 1, places=3),
    st.integers(0, 9),
    st.booleans(),
)


@given(st.lists(st.none() | anything, max_size=12))
def test_without_a_target_nothing_is_trusted_or_called_shifted(history):
    state = FamilyState()
    for seen in history:
        state = family_states.next_state(state, seen, external=False)
        assert state.name not in (TRUSTED, SHIFT)


@given(st.lists(st.none() | anything, max_size=12))
def test_what_was_reversed_comes_back_only_repaired(history):
    state = FamilyState()
    for seen in history:
        after = family_states.next_state(state, seen, external=True)
        if state.name in (OVERFIT, SHIFT) and after.name not in (OVERFIT, SHIFT):
            assert seen is not None and seen.repaired and after.name == RESTORED
        if seen is not None and seen.gap_alarm:
            assert after.name == OVERFIT
        assert after == family_states.next_state(state, seen, external=True)
        state = after


def test_every_state_says_what_it_permits():
    assert set(family_states.PERMITS) == {UNPROVEN, TRUSTED, SUSPECT, OVERFIT, SHIFT, RESTORED}
    assert [name for name, permit in family_states.PERMITS.items() if permit.cite_dev] == [TRUSTED]
    assert not any(permit.dev_in_selection and permit.propose_repair for permit in family_states.PERMITS.values())


def test_a_leak_is_not_undone():
    assert family_states.next_external(EXTERNAL_CLEAR, False) == EXTERNAL_CLEAR
    assert family_states.next_external(family_states.next_external(EXTERNAL_CLEAR, True), False) == EXTERNAL_SUSPECT


def verdict(**changed) -> Verdict:
    board = BoardTest(Decimal(10), {"gravity": Decimal(4), "roman": Decimal(6)})
    bounds = {"gravity": Decimal("0.1"), "roman": Decimal("0.01")}
    return replace(Verdict((), (), (), bounds, board, False, False, False, LeakTest(()), False), **changed)


def gap_of(family: str, arm: int | None = None) -> tuple[GapTest, ...]:
    return (GapTest(family, 0, arm, 1, 1),)


def test_what_a_verdict_means_for_a_family():
    def seen(family: str, **changed) -> FamilySeen:
        return family_states.family_seen(verdict(**changed), family, num_scores=5)

    assert seen("roman").upper_bound == Decimal("0.01") and not seen("roman").suspicion
    assert [seen(family, gap_alarms=gap_of("roman")).gap_alarm for family in ("gravity", "roman")] == [False, True]
    mean = {"gap_alarms": gap_of(ALL), "gap_suspects": gap_of(ALL) + gap_of("roman")}
    assert [(seen(f, **mean).gap_alarm, seen(f, **mean).suspicion) for f in ("gravity", "roman")] == [
        (False, ""),
        (True, "gap_suspect"),
    ]
    nobody = {"gap_alarms": gap_of(ALL), "gap_suspects": gap_of(ALL)}
    assert [seen(f, **nobody).suspicion for f in ("gravity", "roman")] == ["gap_suspect"] * 2
    assert seen("gravity", arm_alarms=gap_of("gravity", 3)).suspicion == "gap_suspect"
    assert not seen("gravity", arm_alarms=gap_of("gravity", 3)).gap_alarm
    fired = {"board_alarm": True, "board_suspect": True}
    assert [(seen(f, **fired).board_alarm, seen(f, **fired).board_suspect) for f in ("gravity", "roman")] == [
        (False, True),
        (True, True),
    ]
    assert float(seen("roman").shift_posterior) == pytest.approx(0.1 * 6 / (0.9 + 0.1 * 10))
