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

from pipeline.campaign.records import FamilyState
from pipeline.stats.alarms import Verdict
from pipeline.stats.overfit_test import ALL

UNPROVEN, TRUSTED, SUSPECT, RESTORED = "UNPROVEN", "TRUSTED", "SUSPECT", "RESTORED"
OVERFIT, SHIFT = "REVERSED-overfit", "REVERSED-shift"
EXTERNAL_CLEAR, EXTERNAL_SUSPECT = "EXTERNAL-CLEAR", "EXTERNAL-SUSPECT"
SMALL_GAP = Decimal("0.05")
SMALL_POSTERIOR = Decimal("0.1")
LEAST_SCORES = 4
LEAST_CANARIES = 2
CLEAN_LOOKS = 2


@dataclass(frozen=True)
class Permit:
    """What a state allows and demands."""

    dev_in_selection: bool  # pooled with fresh; else fresh alone
    cite_dev: bool  # a claim from dev alone, beside its surrogate threshold effect
    halve_fresh: bool  # half as many fresh items next round
    target_dev: bool  # arms that aim at this family's dev score
    propose_repair: bool  # new dev items, a purge of what was learned
    contrast_submission: bool  # the next round must spend one on an arm that tells about this family
    posterior_slope: bool  # the family's coefficient is the slope's posterior mean, never below 0
    annotate_past: bool  # what was claimed from this dev before is marked
    level_factor: str  # of the gap test's level


PERMITS: Mapping[str, Permit] = {
    UNPROVEN: Permit(True, False, False, True, False, False, False, False, "1"),
    TRUSTED: Permit(True, True, True, True, False, False, False, False, "1"),
    SUSPECT: Permit(False, False, False, False, False, True, False, False, "1"),
    OVERFIT: Permit(False, False, False, False, True, False, False, True, "1"),
    SHIFT: Permit(False, False, False, False, True, False, True, False, "1"),
    RESTORED: Permit(True, False, False, True, False, False, False, False, "0.5"),
}
"""UNPROVEN dev is pooled with fresh: simulated, that chooses better than fresh alone in every world (docs/evidence.md)."""


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

    @property
    def suspicion(self) -> str:
        """The first of what makes a family suspect, "" for none."""
        if self.gap_suspect:
            return "gap_suspect"
        if self.board_suspect:
            return "board_suspect"
        return "canaries" if self.num_canaries >= LEAST_CANARIES else ""

    @property
    def clean(self) -> bool:
        return not (self.gap_alarm or self.board_alarm or self.suspicion) and self.upper_bound <= SMALL_GAP


def next_state(state: FamilyState, seen: FamilySeen | None, external: bool) -> FamilyState:
    """After one look; None for a round without one (no fresh scores). external: there is a target, and it is not suspect itself."""
    if seen is None:
        return _rest(state, "not_looked") if state.name == TRUSTED else state
    if not external:
        seen = replace(seen, board_alarm=False, board_suspect=False)
    if seen.gap_alarm:
        return FamilyState(OVERFIT, 0, state.was_restored, "gap_alarm")
    if state.name in (OVERFIT, SHIFT):
        return _repairing(state, seen)
    if seen.board_alarm:
        return FamilyState(SHIFT, 0, state.was_restored, "board_alarm")
    if seen.suspicion:
        return FamilyState(SUSPECT, 0, state.was_restored, seen.suspicion)
    if state.name == SUSPECT:
        looks = state.clean_looks + 1 if seen.clean else 0
        return (
            _rest(state, "clean_looks")
            if looks >= CLEAN_LOOKS
            else replace(state, clean_looks=looks, code="clean_look")
        )
    known = external and seen.num_scores >= LEAST_SCORES and seen.shift_posterior <= SMALL_POSTERIOR
    if known and seen.upper_bound <= SMALL_GAP:
        return FamilyState(TRUSTED, 0, state.was_restored, "renewed" if state.name == TRUSTED else "small_gap")
    return _rest(state, "lapsed") if state.name == TRUSTED else replace(state, code="unchanged")


def next_external(state: str, leak_alarm: bool) -> str:
    """A leak is not undone: the campaign's board stays out of every coefficient, and the last choice is made on fresh items."""
    return EXTERNAL_SUSPECT if leak_alarm else state


def family_seen(
    verdict: Verdict, family: str, num_scores: int, num_canaries: int = 0, repaired: bool = False
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
        board_suspect=verdict.board_suspect and share >= SMALL_POSTERIOR,
        num_canaries=num_canaries,
        upper_bound=verdict.upper_bounds[family],
        shift_posterior=verdict.shift_posterior(family),
        num_scores=num_scores,
        repaired=repaired,
    )


def _repairing(state: FamilyState, seen: FamilySeen) -> FamilyState:
    looks = state.clean_looks + 1 if seen.repaired and seen.clean else 0
    if looks >= CLEAN_LOOKS:
        return FamilyState(RESTORED, 0, True, "repaired")
    return replace(state, clean_looks=looks, code="clean_look" if looks else "unchanged")


def _rest(state: FamilyState, code: str) -> FamilyState:
    return FamilyState(RESTORED if state.was_restored else UNPROVEN, 0, state.was_restored, code)
