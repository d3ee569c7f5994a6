"""The verdict of the three tests at the newest round, from all rounds so far. The functions are pure: the same input gives the same verdict.

    gap     overfit_test   dev against fresh, by family and by arm      (C1: overfit)
    board   shift_test     dev and fresh against the board, by family   (C2: shift)
    leak    leak_test      the board against fresh                      (C3: the board is learned)

The critical values that a campaign froze at `init` bound its false alarms: in at most 5 % of campaigns without a fault does the gap
or the board test raise one in any round and family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from pipeline.campaign.records import Outcome
from pipeline.stats.counts import Counts, count
from pipeline.stats.decimal_math import exactly, upper_quantile
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.leak_test import LeakTest, leak_test
from pipeline.stats.overfit_test import (
    FamilyCounts,
    GapTest,
    arm_tests,
    family_tests,
    latest_gap,
    mean_tests,
    portion,
    shares,
)
from pipeline.stats.shift_test import BoardRound, BoardTest, board_test

NAMED = Decimal("0.5")  # the least share of E with which the board test names a family
SHIFT_PRIOR = Decimal("0.1")
BOUND_LEVEL = Fraction(1, 20)  # the level of the upper bound of a gap, which decides whether a family can be TRUSTED


@dataclass(frozen=True)
class RoundCounts:
    """One round as the tests see it. `dev` and `fresh` map families, in name order, to counts; an arm is known by its position in them.

    `scores` maps an arm's position to its printed board score minus the mean of the reference's scores. `ahead` is the position of the arm
    that is ahead on dev.
    """

    dev: Mapping[str, Counts]
    fresh: Mapping[str, Counts]
    scores: Mapping[int, Decimal]
    ahead: int | None = None
    names: tuple[str, ...] = ()  # the arms' names, by position
    reference_score: Decimal | None = None  # the mean of the reference's printed scores


@dataclass(frozen=True)
class Terms:
    """How the gap test treats a family. `since` is the position of the first round with the family's present dev items.

    `level_factor` multiplies the test's level; it is 1/2 after a repair.
    """

    since: int = 0
    level_factor: Fraction = Fraction(1)


@dataclass(frozen=True)
class Verdict:
    """What the three tests say at the newest round. Where nothing is wrong, the tuples are empty and the flags False."""

    gap_alarms: tuple[GapTest, ...]
    gap_suspects: tuple[GapTest, ...]
    arm_alarms: tuple[GapTest, ...]
    upper_bounds: Mapping[str, Decimal]  # one-sided 95 % upper bound of each family's gap in this round
    board: BoardTest
    board_alarm: bool
    board_suspect: bool
    board_near: bool  # E lies within the guard band of a critical value, which raises no alarm
    leak: LeakTest
    leak_alarm: bool

    @property
    def alarm(self) -> bool:
        """Whether the gap test, the arm test or the board test raises an alarm."""
        return bool(self.gap_alarms or self.arm_alarms or self.board_alarm)

    @property
    def named_family(self) -> str | None:
        """The family that carries at least half of E, if one does. None without a suspicion, because then the shares are mostly the prior's."""
        family, share = max(self.board.posteriors.items(), key=lambda item: item[1])
        return family if (self.board_alarm or self.board_suspect) and share >= NAMED else None

    def shift_posterior(self, family: str, prior: Decimal = SHIFT_PRIOR) -> Decimal:
        """P(this family stopped | scores), if a family stops in a share `prior` of the campaigns."""
        with exactly():
            return prior * self.board.carried[family] / (1 - prior + prior * self.board.e_value)


def round_counts(
    reference: Outcome, outcomes: Sequence[Outcome], scores: Mapping[str, Decimal], reference_score: Decimal | None
) -> RoundCounts:
    """Count the arms of one round that have dev and fresh scores. At least one must.

    `scores` maps the names of submitted arms to their printed board scores; `reference_score` is the reference's, and without it the scores
    do not count. Both are accuracies from 0 to 1. Raises IntegrityError where an arm and the reference have different numbers of items.
    """
    arms = [outcome for outcome in outcomes if outcome.scored("dev") and outcome.scored("fresh")]
    counted = {
        item_set: {
            family: count([arm.outcomes[item_set][family] for arm in arms], marks)
            for family, marks in sorted(reference.outcomes[item_set].items())
        }
        for item_set in ("dev", "fresh")
    }
    right = [sum(counts.right[position] for counts in counted["dev"].values()) for position in range(len(arms))]
    printed: dict[int, Decimal] = {}
    if reference_score is not None:
        with exactly():
            printed = {n: scores[arm.arm] - reference_score for n, arm in enumerate(arms) if arm.arm in scores}
    names = tuple(arm.arm for arm in arms)
    return RoundCounts(counted["dev"], counted["fresh"], printed, right.index(max(right)), names, reference_score)


def board_rounds(rounds: Sequence[RoundCounts]) -> list[BoardRound]:
    """Convert rounds to the form that the board and leak tests need, with families in name order."""
    families = sorted(rounds[-1].dev)
    return [
        BoardRound(
            tuple(counts.dev[f] for f in families),
            tuple(counts.fresh[f] for f in families),
            counts.scores,
            counts.reference_score,
        )
        for counts in rounds
    ]


def verdict(
    rounds: Sequence[RoundCounts], design: Design, critical: CriticalValues, terms: Mapping[str, Terms] | None = None
) -> Verdict:
    """Run the three tests at the newest of `rounds`. `terms` has the families that were repaired; the others have the default terms."""
    families = sorted(rounds[-1].dev)
    terms = {family: (terms or {}).get(family, Terms()) for family in families}
    portions = shares({family: (counts.reference, counts.num_items) for family, counts in rounds[0].dev.items()})
    looks = {
        family: [FamilyCounts(counts.dev[family], counts.fresh[family]) for counts in rounds] for family in families
    }
    tests = gap_tests(looks, terms)
    arms = [test for family in families for test in arm_tests(family, looks[family][-1])]
    boards = board_rounds(rounds)
    board = board_test(boards, {family: portions[family] for family in families}, design)
    leak = leak_test(boards, [counts.ahead for counts in rounds], design)

    def beyond(level: Fraction, candidates: Sequence[GapTest]) -> tuple[GapTest, ...]:
        def level_of(test: GapTest) -> Fraction:
            share = portions[test.family] if test.arm is not None else portion(test.family, portions)
            return level * share * (terms[test.family].level_factor if test.family in terms else 1)

        return tuple(test for test in candidates if test.exceeds(level_of(test)))

    return Verdict(
        gap_alarms=beyond(critical.gap_level, tests),
        gap_suspects=beyond(critical.gap_suspect_level, tests),
        arm_alarms=beyond(critical.arm_level, arms),
        upper_bounds={family: upper_bound(*latest_gap(looks[family][-1])) for family in families},
        board=board,
        board_alarm=board.exceeds(critical.board_alarm),
        board_suspect=board.exceeds(critical.board_suspect),
        board_near=board.is_near(critical.board_alarm) or board.is_near(critical.board_suspect),
        leak=leak,
        leak_alarm=leak.exceeds(critical.leak_level),
    )


def gap_tests(looks: Mapping[str, Sequence[FamilyCounts]], terms: Mapping[str, Terms]) -> list[GapTest]:
    """The gap tests of each family and of the mean over families, on present dev items alone. `since` counts from the first round."""
    tests = [
        replace(test, since=test.since + terms[family].since)
        for family, rounds in looks.items()
        for test in family_tests(family, rounds[terms[family].since :])
    ]
    common = max(of_family.since for of_family in terms.values())
    means = mean_tests([rounds[common:] for rounds in looks.values()])
    return tests + [replace(test, since=test.since + common) for test in means]


def upper_bound(gap: Decimal, variance: Decimal) -> Decimal:
    """The one-sided 95 % upper bound of a gap, as a difference of accuracies."""
    with exactly():
        return gap + upper_quantile(BOUND_LEVEL) * variance.sqrt()
