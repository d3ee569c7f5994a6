"""Evaluate all rounds so far (a *look*): the three tests, the canaries, each family's next state, and the value of every arm.

A round takes part with the arms that have dev and fresh scores. A round whose reference or arms lack them is left out and changes no state,
except that TRUSTED lapses. Only board scores that were known at that time count. The functions are pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

from pipeline.campaign.records import FamilyState, Outcome
from pipeline.decision import family_states
from pipeline.decision.evidence import Assessment, Finalist, NamedTest, NamedVerdict
from pipeline.decision.family_states import StateRules
from pipeline.stats import arm_values, canaries, overfit_test, power
from pipeline.stats.alarms import RoundCounts, Terms, Verdict, board_rounds, round_counts, verdict
from pipeline.stats.decimal_math import rounded
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.lifts import paired_lift
from pipeline.stats.overfit_test import GapTest

LEAST_ARMS = 2
NUM_FINALISTS = 4


@dataclass(frozen=True)
class RoundOutcomes:
    """One round as the tests need it.

    `outcomes` has every arm of the plan. `repeats` names the arms that ran the reference recipe. `scores` maps an arm to its printed board
    score, an accuracy from 0 to 1.
    """

    name: str
    reference: Outcome
    outcomes: tuple[Outcome, ...]
    repeats: frozenset[str] = frozenset()
    scores: Mapping[str, Decimal] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[Outcome, ...]:
        """The arms that have dev and fresh scores."""
        return tuple(run for run in self.outcomes if run.scored("dev") and run.scored("fresh"))

    @property
    def is_comparable(self) -> bool:
        """Whether the reference and at least two arms have dev and fresh scores, so that the round takes part in the tests."""
        return self.reference.scored("dev") and self.reference.scored("fresh") and len(self.scored) >= LEAST_ARMS


@dataclass(frozen=True)
class Target:
    """The frozen design and critical values, and the board's mean score of the reference, which is None while it has no score."""

    design: Design
    critical: CriticalValues
    reference_score: Decimal | None = None

    @property
    def exists(self) -> bool:
        """Whether the campaign has an external target."""
        return bool(self.design.board_rows and self.design.submissions)


@dataclass(frozen=True)
class Assessed:
    """The result of one look: its record (None where the newest round does not take part), and the states that follow."""

    look: Assessment | None
    families: dict[str, FamilyState]
    external: str


def assess(
    rounds: Sequence[RoundOutcomes],
    before: Mapping[str, FamilyState],
    external: str,
    repaired: Mapping[str, str],
    target: Target,
    rules: StateRules,
) -> Assessed:
    """Evaluate the rounds so far at the newest of them.

    `before` and `external` are the states that the round before left; `before` is empty at the start. `repaired` maps a family to the
    round from which on its dev items are new. Raises IntegrityError where arms and reference were scored on different items.
    """
    if not rounds[-1].is_comparable:
        return Assessed(
            None,
            {family: family_states.next_state(state, None, False, rules) for family, state in before.items()},
            external,
        )
    compared = [outcomes for outcomes in rounds if outcomes.is_comparable]
    counted = [counts_of(outcomes, target) for outcomes in compared]
    families = sorted(counted[-1].dev)
    before = {family: before.get(family, FamilyState()) for family in families}
    tests = verdict(counted, target.design, target.critical, terms(compared, before, repaired, rules))
    repeats = [(run, at.reference) for at in compared for run in at.scored if run.arm in at.repeats]
    others = [run for run in compared[-1].scored if run.arm not in compared[-1].repeats]
    fired = {family: canaries.fired(family, others, repeats, counted, compared[-1].reference) for family in families}
    external = family_states.next_external(external, tests.leak_alarm and target.exists)
    has_target = target.exists and external == family_states.EXTERNAL_CLEAR
    num_scores = sum(len(counts.scores) for counts in counted)
    newest = compared[-1].name
    after = {}
    for family, state in before.items():
        is_repaired = family in repaired and newest >= repaired[family]
        findings = family_states.family_findings(tests, family, rules, num_scores, len(fired[family]), is_repaired)
        after[family] = family_states.next_state(state, findings, has_target, rules)
    permitted = {family: rules.permit(state.name, "dev_in_selection") for family, state in after.items()}
    values = old_values = arm_values.arm_values(counted, tests, permitted, target.design, has_target)
    if not all(permitted.values()):
        every = dict.fromkeys(families, True)
        old_values = arm_values.arm_values(counted, tests, every, target.design, has_target)
    names = counted[-1].names
    record = Assessment(
        rounds=tuple(outcomes.name for outcomes in compared),
        verdict=with_names(tests, compared, names),
        canaries=fired,
        num_repeats=len(repeats),
        values=_rounded({names[arm]: value for arm, value in values[-1].items()}),
        old_values=_rounded({names[arm]: value for arm, value in old_values[-1].items()}),
        finalists=finalists(values, compared, counted, target),
        power=_power(counted, target),
    )
    return Assessed(record, after, external)


def terms(
    rounds: Sequence[RoundOutcomes],
    states: Mapping[str, FamilyState],
    repaired: Mapping[str, str],
    rules: StateRules,
) -> dict[str, Terms]:
    """How the gap test treats each family: on its present dev items alone, and at half the level where its state says so."""
    return {
        family: Terms(
            since=next(n for n, at in enumerate(rounds) if at.name >= repaired.get(family, "") or at is rounds[-1]),
            level_factor=Fraction(1, 2 if rules.permit(state.name, "half_level") else 1),
        )
        for family, state in states.items()
    }


def _power(counted: Sequence[RoundCounts], target: Target) -> power.PowerCard:
    """The power card at the newest round, with accuracies rounded to twelve significant digits."""
    looks = {
        family: [overfit_test.FamilyCounts(counts.dev[family], counts.fresh[family]) for counts in counted]
        for family in sorted(counted[-1].dev)
    }
    card = power.power_card(looks, portions_of(counted[0]), board_rounds(counted), target.design, target.critical)
    total, family = card.threshold_total, card.threshold_family
    return power.PowerCard(
        _rounded(card.gap_now),
        _rounded(card.gap_since_first),
        None if total is None else rounded(total),
        None if family is None else rounded(family),
    )


def portions_of(counts: RoundCounts) -> dict[str, Fraction]:
    """Each family's share of a test's level, by the reference's headroom on dev."""
    return overfit_test.shares({family: (of.reference, of.num_items) for family, of in counts.dev.items()})


def finalists(
    values: arm_values.Values, rounds: Sequence[RoundOutcomes], counted: Sequence[RoundCounts], target: Target
) -> tuple[Finalist, ...]:
    """The arms of the campaign with the largest values, the best first, each with the families in which its own gap test raises an alarm.

    Ties go to the earlier round and the lower arm.
    """
    ranked = sorted(
        (value.copy_negate(), number, arm) for number, of_round in enumerate(values) for arm, value in of_round.items()
    )
    best = []
    for value, number, arm in ranked[:NUM_FINALISTS]:
        counts, run = counted[number], rounds[number].scored[arm]
        portions = portions_of(counts)
        alarms = [
            test.family
            for family in sorted(counts.dev)
            for test in overfit_test.arm_tests(
                family, overfit_test.FamilyCounts(counts.dev[family], counts.fresh[family])
            )
            if test.arm == arm and test.exceeds(target.critical.arm_level * portions[family])
        ]
        variance = paired_lift(run, rounds[number].reference, "fresh").variance
        best.append(Finalist(rounds[number].name, run.arm, rounded(value.copy_negate()), variance, tuple(alarms)))
    return tuple(best)


def submissions(rounds: Sequence[RoundOutcomes], target: Target, first: Sequence[str]) -> tuple[str, ...]:
    """The arms of the newest round to submit, in order; an empty tuple without a target.

    The first is the arm that is ahead on dev, because the leak test needs it and the nulls were simulated with it. The arms of `first`
    follow (the contrasts that a state demands), then those that reveal most about the families' slopes.
    """
    if not target.exists or not rounds[-1].is_comparable:
        return ()
    counted = [counts_of(outcomes, target) for outcomes in rounds if outcomes.is_comparable]
    names = counted[-1].names
    ahead = counted[-1].ahead
    wanted = [ahead] if ahead is not None else []
    wanted += [names.index(arm) for arm in first if arm in names]
    return tuple(
        names[arm] for arm in arm_values.submissions(counted, target.design, wanted, target.design.submissions)
    )


def counts_of(outcomes: RoundOutcomes, target: Target) -> RoundCounts:
    """Count a round. Its board scores count only where the reference has one to compare with."""
    return round_counts(outcomes.reference, outcomes.scored, outcomes.scores, target.reference_score)


def with_names(tests: Verdict, rounds: Sequence[RoundOutcomes], arms: Sequence[str]) -> NamedVerdict:
    """The verdict with the names of rounds and arms in place of their positions. `arms` has the newest round's names."""

    def by_name(test: GapTest) -> NamedTest:
        if test.arm is None:
            return NamedTest(test.family, rounds[test.since].name, None, test.gap, test.variance)
        return NamedTest(test.family, rounds[-1].name, arms[test.arm], test.gap, test.variance)

    return NamedVerdict(
        gap_alarms=tuple(map(by_name, tests.gap_alarms)),
        gap_suspects=tuple(map(by_name, tests.gap_suspects)),
        arm_alarms=tuple(map(by_name, tests.arm_alarms)),
        upper_bounds=_rounded(tests.upper_bounds),
        e_value=rounded(tests.board.e_value),
        carried=_rounded(tests.board.carried),
        named=tests.named_family,
        board_alarm=tests.board_alarm,
        board_suspect=tests.board_suspect,
        board_near=tests.board_near,
        leak_scores=tuple(map(rounded, tests.leak.scores)),
        leak_alarm=tests.leak_alarm,
        alarm=tests.alarm,
    )


def _rounded(values: Mapping[str, Decimal]) -> dict[str, Decimal]:
    """The values in name order, rounded to twelve significant digits."""
    return {name: rounded(value) for name, value in sorted(values.items())}
