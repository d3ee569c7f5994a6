"""All rounds so far, looked at once: the three tests, the canaries, each family's state, what every arm is worth. Pure.

A round takes part with its arms that have dev and fresh scores; one without any, or without the reference's, is left out and moves no
state but that of trust, which lapses. Printed board scores are those that were known then, never what came later.
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
    """One round as the tests take it. `outcomes` are its arms', `repeats` names those of the reference recipe; `scores` the board's, by arm."""

    name: str
    reference: Outcome
    outcomes: tuple[Outcome, ...]
    repeats: frozenset[str] = frozenset()
    scores: Mapping[str, Decimal] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[Outcome, ...]:
        return tuple(each for each in self.outcomes if each.scored("dev") and each.scored("fresh"))

    @property
    def counts(self) -> bool:
        return self.reference.scored("dev") and self.reference.scored("fresh") and len(self.scored) >= LEAST_ARMS


@dataclass(frozen=True)
class Target:
    """What a campaign froze: its design, critical values, and what the board printed for the reference (None: it has no score yet)."""

    design: Design
    critical: CriticalValues
    reference_score: Decimal | None = None

    @property
    def exists(self) -> bool:
        return bool(self.design.board_rows and self.design.submissions)


@dataclass(frozen=True)
class Assessed:
    """Of one look: the record, and the states that it leaves."""

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
    """At the newest of `rounds`. before, external: the states that the round before left (empty: the start); repaired: family -> round.

    Raises IntegrityError when arms and reference of a round were not scored on the same items.
    """
    newest = rounds[-1]
    if not newest.counts:
        return Assessed(
            None,
            {family: family_states.next_state(state, None, False, rules) for family, state in before.items()},
            external,
        )
    played = [each for each in rounds if each.counts]
    counted = [counts_of(each, target) for each in played]
    families = sorted(counted[-1].dev)
    before = {family: before.get(family, FamilyState()) for family in families}
    terms = {
        family: Terms(
            since=next(i for i, each in enumerate(played) if each.name >= repaired.get(family, "") or each is newest),
            level_factor=Fraction(1, 2 if rules.permit(state.name, "half_level") else 1),
        )
        for family, state in before.items()
    }
    found = verdict(counted, target.design, target.critical, terms)
    fired = {family: fired_canaries(family, played, counted[-1]) for family in families}
    external = family_states.next_external(external, found.leak_alarm and target.exists)
    has_target = target.exists and external == family_states.EXTERNAL_CLEAR
    num_scores = sum(len(each.scores) for each in counted)
    after = {
        family: family_states.next_state(
            state,
            family_states.family_seen(
                found,
                family,
                rules,
                num_scores,
                len(fired[family]),
                family in repaired and newest.name >= repaired[family],
            ),
            has_target,
            rules,
        )
        for family, state in before.items()
    }
    permitted = {family: rules.permit(state.name, "dev_in_selection") for family, state in after.items()}
    values = arm_values.arm_values(counted, found, permitted, target.design, has_target)
    old_values = arm_values.arm_values(counted, found, dict.fromkeys(families, True), target.design, has_target)
    names = [each.names for each in counted]
    card = power.power_card(
        {
            family: [overfit_test.FamilyCounts(each.dev[family], each.fresh[family]) for each in counted]
            for family in families
        },
        overfit_test.shares({family: (each.reference, each.num_items) for family, each in counted[0].dev.items()}),
        board_rounds(counted),
        target.design,
        target.critical,
    )
    record = Assessment(
        rounds=tuple(each.name for each in played),
        verdict=named(found, played, names[-1]),
        canaries=fired,
        values={names[-1][arm]: rounded(value) for arm, value in sorted(values[-1].items())},
        old_values={names[-1][arm]: rounded(value) for arm, value in sorted(old_values[-1].items())},
        finalists=finalists(values, played, counted, target),
        power=rounded_card(card),
    )
    return Assessed(record, after, external)


def finalists(
    values: arm_values.Values, rounds: Sequence[RoundOutcomes], counted: Sequence[RoundCounts], target: Target
) -> tuple[Finalist, ...]:
    """The campaign's arms with the largest values, each with its own gap tests; ties go to the earlier round and the lower arm."""
    ranked = sorted((-value, number, arm) for number, each in enumerate(values) for arm, value in each.items())
    found = []
    for value, number, arm in ranked[:NUM_FINALISTS]:
        seen, run = counted[number], rounds[number].scored[arm]
        portions = overfit_test.shares({family: (each.reference, each.num_items) for family, each in seen.dev.items()})
        alarms = [
            test.family
            for family in sorted(seen.dev)
            for test in overfit_test.arm_tests(family, overfit_test.FamilyCounts(seen.dev[family], seen.fresh[family]))
            if test.arm == arm and test.exceeds(target.critical.arm_level * portions[family])
        ]
        variance = paired_lift(run, rounds[number].reference, "fresh").variance
        found.append(Finalist(rounds[number].name, run.arm, rounded(-value), variance, tuple(alarms)))
    return tuple(found)


def submissions(rounds: Sequence[RoundOutcomes], target: Target, first: Sequence[str]) -> tuple[str, ...]:
    """Arms of the newest round to score: the one ahead on dev (the leak test needs it, and the nulls were simulated with it), then
    `first` (the contrasts that a state demands), then those that tell most about the families' slopes. None without a target."""
    played = [each for each in rounds if each.counts]
    if not target.exists or not rounds[-1].counts:
        return ()
    counted = [counts_of(each, target) for each in played]
    names = counted[-1].names
    ahead = counted[-1].ahead
    wanted = [ahead] if ahead is not None else []
    wanted += [names.index(arm) for arm in first if arm in names]
    return tuple(
        names[arm] for arm in arm_values.submissions(counted, target.design, wanted, target.design.submissions)
    )


def counts_of(played: RoundOutcomes, target: Target) -> RoundCounts:
    """With board scores only where the reference has one to compare with."""
    known = played.scores if target.reference_score is not None else {}
    return round_counts(played.reference, played.scored, known, target.reference_score or Decimal(0))


def fired_canaries(family: str, rounds: Sequence[RoundOutcomes], newest: RoundCounts) -> tuple[str, ...]:
    """Those that outcome strings alone can tell: drift of the generator, truncation, the worst family's fall."""
    played = rounds[-1]
    repeats = [run for each in rounds for run in each.scored if run.arm in each.repeats]
    fired = ["generator_drift"] if canaries.generator_drifts(newest.dev[family], newest.fresh[family]) else []
    arms = [run for run in played.scored if run.arm not in played.repeats]
    if arms:
        value = sum((truncated(run, family) for run in arms), Fraction(0)) / len(arms)
        fired += ["truncation"] * canaries.fires("truncation", value, [truncated(run, family) for run in repeats])
        behind = [fall(run, played.reference, family) for run in arms]
        of_repeats = [
            fall(run, each.reference, family) for each in rounds for run in each.scored if run.arm in each.repeats
        ]
        fired += ["worst_family"] * canaries.fires("worst_family", sum(behind, Fraction(0)) / len(behind), of_repeats)
    return tuple(fired)


def truncated(run: Outcome, family: str) -> Fraction:
    """Share of truncated completions on fresh."""
    marks = run.outcomes["fresh"][family]
    return Fraction(marks.count("T"), len(marks))


def fall(run: Outcome, reference: Outcome, family: str) -> Fraction:
    """Mean fresh lift over families minus this family's; 0 for a family that does not lag."""
    lifts = {
        name: Fraction(marks.count("1") - reference.outcomes["fresh"][name].count("1"), len(marks))
        for name, marks in run.outcomes["fresh"].items()
    }
    return max(Fraction(0), sum(lifts.values(), Fraction(0)) / len(lifts) - lifts[family])


def named(found: Verdict, rounds: Sequence[RoundOutcomes], arms: Sequence[str]) -> NamedVerdict:
    """The verdict with rounds and arms by name instead of position."""

    def by_name(test: GapTest) -> NamedTest:
        if test.arm is None:
            return NamedTest(test.family, rounds[test.since].name, None, test.gap, test.variance)
        return NamedTest(test.family, rounds[-1].name, arms[test.arm], test.gap, test.variance)

    return NamedVerdict(
        gap_alarms=tuple(map(by_name, found.gap_alarms)),
        gap_suspects=tuple(map(by_name, found.gap_suspects)),
        arm_alarms=tuple(map(by_name, found.arm_alarms)),
        upper_bounds=_rounded(found.upper_bounds),
        e_value=rounded(found.board.e_value),
        carried=_rounded(found.board.carried),
        named=found.named,
        board_alarm=found.board_alarm,
        board_suspect=found.board_suspect,
        board_near=found.board_near,
        leak_scores=tuple(map(rounded, found.leak.scores)),
        leak_alarm=found.leak_alarm,
        alarm=found.alarm,
    )


def rounded_card(card: power.PowerCard) -> power.PowerCard:
    """Accuracies to twelve significant digits."""
    total, family = card.threshold_total, card.threshold_family
    return power.PowerCard(
        _rounded(card.gap_now),
        _rounded(card.gap_since_first),
        None if total is None else rounded(total),
        None if family is None else rounded(family),
    )


def _rounded(values: Mapping[str, Decimal]) -> dict[str, Decimal]:
    return {name: rounded(value) for name, value in sorted(values.items())}
