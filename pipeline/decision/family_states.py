"""What may be done with a family's dev score: six states, what moves between them, and what each permits. Pure.

    UNPROVEN          the start
    TRUSTED           for one round: the gap's upper bound is small, no sign of shift, at least four external scores
    SUSPECT           a test at its suspicion level, or two canaries
    REVERSED-overfit  the gap test's alarm         REVERSED-shift   the board test's alarm, and it names the family
    RESTORED          after a repair and two clean looks: as UNPROVEN, at half the level

and for the campaign EXTERNAL-SUSPECT, from the leak test: the board is no target any more. Without an external target TRUSTED is out of
reach: nothing that we hold can tell whether fresh items still mean what the target means (statistics.md 4b).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import FamilyState
from pipeline.stats.alarms import Verdict
from pipeline.stats.overfit_test import ALL

UNPROVEN, TRUSTED, SUSPECT, RESTORED = "UNPROVEN", "TRUSTED", "SUSPECT", "RESTORED"
OVERFIT, SHIFT = "REVERSED-overfit", "REVERSED-shift"
EXTERNAL_CLEAR, EXTERNAL_SUSPECT = "EXTERNAL-CLEAR", "EXTERNAL-SUSPECT"
STATES = (UNPROVEN, TRUSTED, SUSPECT, OVERFIT, SHIFT, RESTORED)
PERMISSIONS: Mapping[str, str] = {
    "dev_in_selection": "arms are compared on dev and fresh pooled; without it fresh counts alone",
    "contrast_submission": "the next round spends an arm, and a submission, on a contrast that tells about this family",
    "propose_repair": "the family gets new dev items",
    "half_level": "the gap test of this family has half its level",
}
"""What article 9 may permit or demand. UNPROVEN dev is pooled with fresh: in simulations that chooses better than fresh alone in every
world (docs/evidence.md)."""


@dataclass(frozen=True)
class StateRules:
    """Article 9: of each state what it permits, and the numbers that move a family from one state to another."""

    permits: Mapping[str, frozenset[str]]
    small_gap: Decimal  # an upper bound of the gap up to which a look is clean
    small_posterior: Decimal  # a probability of shift up to which a family may be trusted
    least_scores: int  # external scores of the campaign that trust needs
    least_canaries: int  # canaries that make a family suspect
    clean_looks: int  # in a row, after which a suspicion or a repair is over

    @classmethod
    def of(cls, rules: Constitution) -> StateRules:
        article = rules.articles["9"]
        permits = {state: frozenset(names) for state, names in article["permits"].items()}
        small_gap, small_posterior = Decimal(article["small_gap"]), Decimal(article["small_posterior"])
        counts = (int(article[name]) for name in ("least_scores", "least_canaries", "clean_looks"))
        return cls(permits, small_gap, small_posterior, *counts)

    def permit(self, state: str, permission: str) -> bool:
        """Whether a state has one of PERMISSIONS."""
        return permission in self.permits[state]

    def suspicion(self, seen: FamilySeen) -> str:
        """The first of what makes a family suspect, "" for none."""
        if seen.gap_suspect:
            return "gap_suspect"
        if seen.board_suspect:
            return "board_suspect"
        return "canaries" if seen.num_canaries >= self.least_canaries else ""

    def is_clean(self, seen: FamilySeen) -> bool:
        alarmed = seen.gap_alarm or seen.board_alarm or self.suspicion(seen)
        return not alarmed and seen.upper_bound <= self.small_gap


@dataclass(frozen=True)
class FamilySeen:
    """One family at one look. `repaired`: its dev items are new since it was reversed, and this look is on the new ones."""

    gap_alarm: bool = False
    gap_suspect: bool = False
    board_alarm: bool = False  # and this family is the one named
    board_suspect: bool = False
    num_canaries: int = 0
    upper_bound: Decimal = Decimal(1)
    shift_posterior: Decimal = Decimal(0)
    num_scores: int = 0  # external scores of the campaign so far
    repaired: bool = False


def next_state(state: FamilyState, seen: FamilySeen | None, external: bool, rules: StateRules) -> FamilyState:
    """After one look; None for a round without one (no fresh scores). external: there is a target, and it is not suspect itself."""
    if seen is None:
        return _rest(state, "not_looked") if state.name == TRUSTED else state
    if not external:
        seen = replace(seen, board_alarm=False, board_suspect=False)
    if seen.gap_alarm:
        return FamilyState(OVERFIT, 0, state.was_restored, "gap_alarm")
    if state.name in (OVERFIT, SHIFT):
        return _repairing(state, seen, rules)
    if seen.board_alarm:
        return FamilyState(SHIFT, 0, state.was_restored, "board_alarm")
    if suspicion := rules.suspicion(seen):
        return FamilyState(SUSPECT, 0, state.was_restored, suspicion)
    if state.name == SUSPECT:
        looks = state.clean_looks + 1 if rules.is_clean(seen) else 0
        return (
            _rest(state, "clean_looks")
            if looks >= rules.clean_looks
            else replace(state, clean_looks=looks, code="clean_look")
        )
    known = external and seen.num_scores >= rules.least_scores and seen.shift_posterior <= rules.small_posterior
    if known and seen.upper_bound <= rules.small_gap:
        return FamilyState(TRUSTED, 0, state.was_restored, "renewed" if state.name == TRUSTED else "small_gap")
    return _rest(state, "lapsed") if state.name == TRUSTED else replace(state, code="unchanged")


def next_external(state: str, leak_alarm: bool) -> str:
    """A leak is not undone: the campaign's board stays out of every coefficient, and the last choice is made on fresh items."""
    return EXTERNAL_SUSPECT if leak_alarm else state


def family_seen(
    verdict: Verdict, family: str, rules: StateRules, num_scores: int, num_canaries: int = 0, repaired: bool = False
) -> FamilySeen:
    """What the rule's verdict means for one family.

    A gap of the mean over families reverses those that are suspect of one themselves; where none is, it makes all suspect. A board alarm
    that names none makes suspect whoever carries a tenth of E. An arm's alarm is held against the arm, and makes its family suspect.
    """
    alarms = {test.family for test in verdict.gap_alarms}
    suspects = {test.family for test in verdict.gap_suspects}
    arms = {test.family for test in verdict.arm_alarms}
    share = verdict.board.posteriors[family]
    return FamilySeen(
        gap_alarm=family in alarms or (ALL in alarms and family in suspects),
        gap_suspect=family in suspects | alarms | arms or suspects | alarms == {ALL},
        board_alarm=verdict.board_alarm and verdict.named == family,
        board_suspect=verdict.board_suspect and share >= rules.small_posterior,
        num_canaries=num_canaries,
        upper_bound=verdict.upper_bounds[family],
        shift_posterior=verdict.shift_posterior(family),
        num_scores=num_scores,
        repaired=repaired,
    )


def _repairing(state: FamilyState, seen: FamilySeen, rules: StateRules) -> FamilyState:
    looks = state.clean_looks + 1 if seen.repaired and rules.is_clean(seen) else 0
    if looks >= rules.clean_looks:
        return FamilyState(RESTORED, 0, True, "repaired")
    return replace(state, clean_looks=looks, code="clean_look" if looks else "unchanged")


def _rest(state: FamilyState, code: str) -> FamilyState:
    return FamilyState(RESTORED if state.was_restored else UNPROVEN, 0, state.was_restored, code)
