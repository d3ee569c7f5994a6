"""What may be done with a family's dev score: six states, the moves between them, and what each state permits. The functions are pure.

    UNPROVEN          the start
    TRUSTED           for one round: the upper bound of the gap is small, nothing suggests a shift, and at least four arms have board scores
    SUSPECT           a test is beyond its suspicion level, or two canaries fired
    REVERSED-overfit  the gap test raised an alarm
    REVERSED-shift    the board test raised an alarm and named the family
    RESTORED          two looks after a repair were clean; the family is treated as UNPROVEN, at half the level

For the campaign there is EXTERNAL-SUSPECT, from the leak test: the board is no target any more. Without an external target no family
can be TRUSTED, because nothing that we hold can tell whether fresh items still mean what the target means (statistics.md 4b).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import ConfigError
from pipeline.campaign.records import FamilyState
from pipeline.stats.alarms import Verdict
from pipeline.stats.overfit_test import ALL

UNPROVEN, TRUSTED, SUSPECT, RESTORED = "UNPROVEN", "TRUSTED", "SUSPECT", "RESTORED"
OVERFIT, SHIFT = "REVERSED-overfit", "REVERSED-shift"
EXTERNAL_CLEAR, EXTERNAL_SUSPECT = "EXTERNAL-CLEAR", "EXTERNAL-SUSPECT"
STATES = (UNPROVEN, TRUSTED, SUSPECT, OVERFIT, SHIFT, RESTORED)
PERMISSIONS: Mapping[str, str] = {
    "dev_in_selection": "arms are compared on dev and fresh pooled; without it fresh counts alone",
    "contrast_submission": "the next round spends an arm and a submission on a contrast for this family",
    "propose_repair": "the family gets new dev items",
    "half_level": "the gap test of this family has half its level",
}
"""What article 9 may permit or demand of a state. Dev of an UNPROVEN family is pooled with fresh, because in simulations this chooses
better arms than fresh alone in every world (docs/evidence.md)."""


@dataclass(frozen=True)
class StateRules:
    """Article 9: what each state permits, and the numbers that decide when a family moves to another state."""

    permits: Mapping[str, frozenset[str]]
    small_gap: Decimal  # a look is clean if the gap's upper bound is at most this (0.05 is 5 points)
    small_posterior: Decimal  # a family may be trusted if its probability of a shift is at most this
    least_scores: int  # the number of external scores in the campaign that trust needs
    least_canaries: int  # the number of canaries that makes a family suspect
    clean_looks: int  # the number of clean looks in a row that ends a suspicion or a repair

    @classmethod
    def of(cls, rules: Constitution) -> StateRules:
        """Read article 9 of a constitution that was checked."""
        article = rules.articles["9"]
        permits = {state: frozenset(names) for state, names in article["permits"].items()}
        small_gap, small_posterior = Decimal(article["small_gap"]), Decimal(article["small_posterior"])
        counts = (int(article[name]) for name in ("least_scores", "least_canaries", "clean_looks"))
        return cls(permits, small_gap, small_posterior, *counts)

    def permit(self, state: str, permission: str) -> bool:
        """Whether a state has one of the PERMISSIONS."""
        return permission in self.permits[state]

    def suspicion(self, findings: FamilyFindings) -> str:
        """The code of the first finding that makes a family suspect; an empty string without one."""
        if findings.gap_suspect:
            return "gap_suspect"
        if findings.board_suspect:
            return "board_suspect"
        return "canaries" if findings.num_canaries >= self.least_canaries else ""

    def is_clean(self, findings: FamilyFindings) -> bool:
        """Whether there is no alarm and no suspicion, and the gap's upper bound is small."""
        alarmed = findings.gap_alarm or findings.board_alarm or self.suspicion(findings)
        return not alarmed and findings.upper_bound <= self.small_gap


def check_article(rules: Constitution) -> None:
    """Raise ConfigError where article 9 leaves out a state, or names a state or a permission that no code acts on.

    `init` calls it. Articles of an older campaign may name more, and are read as they are.
    """
    permits = rules.articles["9"]["permits"]
    if wrong := set(STATES) ^ set(permits):
        raise ConfigError(
            f"article 9 leaves out a state or has one that nobody knows: {', '.join(sorted(wrong))}",
            f"Valid: exactly {', '.join(STATES)}",
        )
    if wrong := {name for names in permits.values() for name in names} - set(PERMISSIONS):
        raise ConfigError(
            f"article 9 permits {', '.join(sorted(wrong))}, which no code acts on", f"Valid: {', '.join(PERMISSIONS)}"
        )


@dataclass(frozen=True)
class FamilyFindings:
    """What one look finds about one family.

    `upper_bound` is the 95 % upper bound of the gap, as a difference of accuracies. `shift_posterior` is the probability that the family
    stopped. `repaired` says that the family has new dev items since it was reversed and that this look is on them.
    """

    gap_alarm: bool = False
    gap_suspect: bool = False
    board_alarm: bool = False  # the board test raised an alarm and named this family
    board_suspect: bool = False
    num_canaries: int = 0
    upper_bound: Decimal = Decimal(1)
    shift_posterior: Decimal = Decimal(0)
    num_scores: int = 0  # the number of external scores in the campaign so far
    repaired: bool = False


def next_state(state: FamilyState, findings: FamilyFindings | None, external: bool, rules: StateRules) -> FamilyState:
    """The state after one look. `findings` is None where the round could not be evaluated.

    `external` says that there is an external target that is not suspect itself; without it, findings of the board do not count.
    """
    if findings is None:
        return _rest(state, "not_looked") if state.name == TRUSTED else state
    if not external:
        findings = replace(findings, board_alarm=False, board_suspect=False)
    if findings.gap_alarm:
        return FamilyState(OVERFIT, 0, state.was_restored, "gap_alarm")
    if state.name in (OVERFIT, SHIFT):
        return _repairing(state, findings, rules)
    if findings.board_alarm:
        return FamilyState(SHIFT, 0, state.was_restored, "board_alarm")
    if suspicion := rules.suspicion(findings):
        return FamilyState(SUSPECT, 0, state.was_restored, suspicion)
    if state.name == SUSPECT:
        looks = state.clean_looks + 1 if rules.is_clean(findings) else 0
        return (
            _rest(state, "clean_looks")
            if looks >= rules.clean_looks
            else replace(state, clean_looks=looks, code="clean_look")
        )
    known = external and findings.num_scores >= rules.least_scores and findings.shift_posterior <= rules.small_posterior
    if known and findings.upper_bound <= rules.small_gap:
        return FamilyState(TRUSTED, 0, state.was_restored, "renewed" if state.name == TRUSTED else "small_gap")
    return _rest(state, "lapsed") if state.name == TRUSTED else replace(state, code="unchanged")


def next_external(state: str, leak_alarm: bool) -> str:
    """The state of the external target. Once a leak alarm was raised, board scores count for nothing in the rest of the campaign."""
    return EXTERNAL_SUSPECT if leak_alarm else state


def family_findings(
    verdict: Verdict, family: str, rules: StateRules, num_scores: int, num_canaries: int = 0, repaired: bool = False
) -> FamilyFindings:
    """What the verdict of the tests means for one family.

    A gap alarm of the mean over families reverses each family that is itself beyond its suspicion level; where none is, all become
    suspect. Where E is beyond its suspicion level, every family that carries a tenth of it becomes suspect. An alarm of one arm counts
    against the arm and makes the family suspect.
    """
    alarms = {test.family for test in verdict.gap_alarms}
    suspects = {test.family for test in verdict.gap_suspects}
    arms = {test.family for test in verdict.arm_alarms}
    share = verdict.board.posteriors[family]
    return FamilyFindings(
        gap_alarm=family in alarms or (ALL in alarms and family in suspects),
        gap_suspect=family in suspects | alarms | arms or suspects | alarms == {ALL},
        board_alarm=verdict.board_alarm and verdict.named_family == family,
        board_suspect=verdict.board_suspect and share >= rules.small_posterior,
        num_canaries=num_canaries,
        upper_bound=verdict.upper_bounds[family],
        shift_posterior=verdict.shift_posterior(family),
        num_scores=num_scores,
        repaired=repaired,
    )


def _repairing(state: FamilyState, findings: FamilyFindings, rules: StateRules) -> FamilyState:
    """A reversed family after one look: enough clean looks on its new dev items make it RESTORED."""
    looks = state.clean_looks + 1 if findings.repaired and rules.is_clean(findings) else 0
    if looks >= rules.clean_looks:
        return FamilyState(RESTORED, 0, True, "repaired")
    return replace(state, clean_looks=looks, code="clean_look" if looks else "unchanged")


def _rest(state: FamilyState, code: str) -> FamilyState:
    """Back to UNPROVEN, or to RESTORED where the family was restored before."""
    return FamilyState(RESTORED if state.was_restored else UNPROVEN, 0, state.was_restored, code)
