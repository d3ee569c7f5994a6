"""Test the states of a family: every possible change, and that no other happens."""

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import load_constitution
from pipeline.decision import family_states
from pipeline.decision.family_states import (
    EXTERNAL_CLEAR,
    EXTERNAL_SUSPECT,
    OVERFIT,
    RESTORED,
    SHIFT,
    STATES,
    SUSPECT,
    TRUSTED,
    UNPROVEN,
    FamilyFindings,
    FamilyState,
    StateRules,
    check_article,
)
from pipeline.stats.alarms import Verdict
from pipeline.stats.leak_test import LeakTest
from pipeline.stats.overfit_test import ALL, GapTest
from pipeline.stats.shift_test import BoardTest

CONSTITUTION = load_constitution()
RULES = StateRules.of(CONSTITUTION)
QUIET = FamilyFindings(upper_bound=Decimal("0.04"), num_scores=8)
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
    moved = family_states.next_state(FamilyState(before), seen, external=True, rules=RULES)
    assert (moved.name, moved.code) == (after, code)


def test_two_clean_looks_end_a_suspicion_and_anything_else_begins_anew():
    state = FamilyState(SUSPECT)
    for seen, name, looks in ((QUIET, SUSPECT, 1), (WIDE, SUSPECT, 0), (QUIET, SUSPECT, 1), (QUIET, UNPROVEN, 0)):
        state = family_states.next_state(state, seen, external=True, rules=RULES)
        assert (state.name, state.clean_looks) == (name, looks)


@pytest.mark.parametrize("reversed_state", [OVERFIT, SHIFT])
def test_a_repair_and_two_clean_looks_restore(reversed_state):
    state, repaired = FamilyState(reversed_state), replace(QUIET, repaired=True)
    state = family_states.next_state(state, repaired, external=True, rules=RULES)
    assert (state.name, state.clean_looks) == (reversed_state, 1)
    state = family_states.next_state(
        family_states.next_state(state, WIDE, external=True, rules=RULES), repaired, external=True, rules=RULES
    )
    assert (state.name, state.clean_looks) == (reversed_state, 1)  # the wide look between them began anew
    state = family_states.next_state(state, repaired, external=True, rules=RULES)
    assert (state.name, state.was_restored) == (RESTORED, True)
    trusted = family_states.next_state(state, QUIET, external=True, rules=RULES)
    assert (
        trusted.name == TRUSTED and family_states.next_state(trusted, WIDE, external=True, rules=RULES).name == RESTORED
    )


anything = st.builds(
    FamilyFindings,
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
        state = family_states.next_state(state, seen, external=False, rules=RULES)
        assert state.name not in (TRUSTED, SHIFT)


@given(st.lists(st.none() | anything, max_size=12))
def test_what_was_reversed_comes_back_only_repaired(history):
    state = FamilyState()
    for seen in history:
        after = family_states.next_state(state, seen, external=True, rules=RULES)
        if state.name in (OVERFIT, SHIFT) and after.name not in (OVERFIT, SHIFT):
            assert seen is not None and seen.repaired and after.name == RESTORED
        if seen is not None and seen.gap_alarm:
            assert after.name == OVERFIT
        assert after == family_states.next_state(state, seen, external=True, rules=RULES)
        state = after


def test_article_9_says_of_every_state_what_it_permits_and_the_code_knows_no_other_permission():
    assert set(RULES.permits) == set(family_states.STATES)
    assert set().union(*RULES.permits.values()) == set(family_states.PERMISSIONS)
    assert not any(
        RULES.permit(state, "dev_in_selection") and RULES.permit(state, "propose_repair") for state in RULES.permits
    )


@pytest.mark.parametrize(
    ("number", "value", "before", "seen", "after"),
    [
        ("small_gap", "0.07", UNPROVEN, WIDE, TRUSTED),
        ("small_posterior", "0.3", UNPROVEN, replace(QUIET, shift_posterior=Decimal("0.2")), TRUSTED),
        ("least_scores", 3, UNPROVEN, replace(QUIET, num_scores=3), TRUSTED),
        ("least_canaries", 1, UNPROVEN, replace(QUIET, num_canaries=1), SUSPECT),
        ("clean_looks", 1, SUSPECT, QUIET, UNPROVEN),
    ],
)
def test_the_numbers_that_move_a_family_are_the_articles(number, value, before, seen, after):
    articles = CONSTITUTION.articles | {"9": CONSTITUTION.articles["9"] | {number: value}}
    other = StateRules.of(replace(CONSTITUTION, articles=articles))
    assert family_states.next_state(FamilyState(before), seen, external=True, rules=RULES).name != after
    assert family_states.next_state(FamilyState(before), seen, external=True, rules=other).name == after


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
    def seen(family: str, **changed) -> FamilyFindings:
        return family_states.family_findings(verdict(**changed), family, RULES, num_scores=5)

    assert seen("roman").upper_bound == Decimal("0.01") and not RULES.suspicion(seen("roman"))
    assert [seen(family, gap_alarms=gap_of("roman")).gap_alarm for family in ("gravity", "roman")] == [False, True]
    mean = {"gap_alarms": gap_of(ALL), "gap_suspects": gap_of(ALL) + gap_of("roman")}
    assert [(seen(f, **mean).gap_alarm, RULES.suspicion(seen(f, **mean))) for f in ("gravity", "roman")] == [
        (False, ""),
        (True, "gap_suspect"),
    ]
    nobody = {"gap_alarms": gap_of(ALL), "gap_suspects": gap_of(ALL)}
    assert [RULES.suspicion(seen(f, **nobody)) for f in ("gravity", "roman")] == ["gap_suspect"] * 2
    assert RULES.suspicion(seen("gravity", arm_alarms=gap_of("gravity", 3))) == "gap_suspect"
    assert not seen("gravity", arm_alarms=gap_of("gravity", 3)).gap_alarm
    fired = {"board_alarm": True, "board_suspect": True}
    assert [(seen(f, **fired).board_alarm, seen(f, **fired).board_suspect) for f in ("gravity", "roman")] == [
        (False, True),
        (True, True),
    ]
    assert float(seen("roman").shift_posterior) == pytest.approx(0.1 * 6 / (0.9 + 0.1 * 10))


@pytest.mark.parametrize(
    ("states", "what"),
    [
        ({state: [] for state in STATES if state != SUSPECT}, "leaves out a state or has one that nobody knows: SUSPECT"),
        ({state: [] for state in (*STATES, "DOUBTED")}, "nobody knows: DOUBTED"),
        ({state: ["dev_in_selektion"] for state in STATES}, "permits dev_in_selektion, which no code acts on"),
    ],
)  # fmt: skip
def test_an_article_that_no_code_can_follow_is_refused_at_the_start(states, what) -> None:
    rules = load_constitution()
    check_article(rules)
    article = {**rules.articles["9"], "permits": states}
    with pytest.raises(ConfigError, match=what):
        check_article(replace(rules, articles={**rules.articles, "9": article}))
