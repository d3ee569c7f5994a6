"""The rule: all rounds so far -> what the three tests say at the newest one. Pure; the same bytes in, the same verdict out.

    gap     gaptest     dev against fresh, by family and by arm      (C1: overfit)
    board   boardtest   dev and fresh against the board, by family   (C2: shift)
    leak    leaktest    the board against fresh                      (C3: the board is learned)

A campaign's false alarms (gap or board, over all rounds and families) are at most 5 % by the critical values it froze at `init`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from pipeline.campaign.records import Outcome
from pipeline.stats.counts import Counts, count
from pipeline.stats.decimal_math import decimal_of, exactly, upper_quantile
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

NAMED = Decimal("0.5")  # share of E from which the board test names a family
SHIFT_PRIOR = Decimal("0.1")
BOUND_LEVEL = Fraction(1, 20)  # of the upper bound that trust rests on


@dataclass(frozen=True)
class RoundCounts:
    """One round as the rule sees it. Families in name order; arms in the order of their counts.

    `scores`: position of an arm -> printed board score minus the mean of the reference's. `ahead`: the arm ahead on dev.
    """

    dev: Mapping[str, Counts]
    fresh: Mapping[str, Counts]
    scores: Mapping[int, Decimal]
    ahead: int | None = None
    names: tuple[str, ...] = ()  # of the arms, in the order of their counts


@dataclass(frozen=True)
class Terms:
    """How a family is looked at. `since`: position of the first round on its present dev items; after a repair half the level."""

    since: int = 0
    level_factor: Fraction = Fraction(1)


@dataclass(frozen=True)
class Verdict:
    """What the rule says of the newest round. Empty tuples and False where nothing is wrong."""

    gap_alarms: tuple[GapTest, ...]
    gap_suspects: tuple[GapTest, ...]
    arm_alarms: tuple[GapTest, ...]
    upper_bounds: Mapping[str, Decimal]  # 95 % one-sided, of each family's gap in this round
    board: BoardTest
    board_alarm: bool
    board_suspect: bool
    board_near: bool  # within the guard band of its critical value: no alarm, and told
    leak: LeakTest
    leak_alarm: bool

    @property
    def alarm(self) -> bool:
        return bool(self.gap_alarms or self.arm_alarms or self.board_alarm)

    @property
    def named(self) -> str | None:
        """The family that carries half of E, if any does. None without suspicion: before any score the shares are the prior's."""
        family, share = max(self.board.posteriors.items(), key=lambda item: item[1])
        return family if (self.board_alarm or self.board_suspect) and share >= NAMED else None

    def shift_posterior(self, family: str, prior: Decimal = SHIFT_PRIOR) -> Decimal:
        """P(this family stopped | scores), if a share `prior` of campaigns has a family that stops."""
        with exactly():
            return prior * self.board.carried[family] / (1 - prior + prior * self.board.e_value)


def round_counts(
    reference: Outcome, outcomes: Sequence[Outcome], scores: Mapping[str, Decimal], reference_score: Decimal
) -> RoundCounts:
    """Of one round's arms, those with dev and fresh scores; `scores`: arm name -> printed board score, of those that were submitted.

    Raises IntegrityError when an arm and the reference were not scored on the same items.
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
    with exactly():
        printed = {
            position: scores[arm.arm] - reference_score for position, arm in enumerate(arms) if arm.arm in scores
        }
    return RoundCounts(
        counted["dev"], counted["fresh"], printed, right.index(max(right)), tuple(arm.arm for arm in arms)
    )


def board_rounds(rounds: Sequence[RoundCounts]) -> list[BoardRound]:
    """As the board and leak tests take them: families in name order."""
    families = sorted(rounds[-1].dev)
    return [
        BoardRound(tuple(seen.dev[f] for f in families), tuple(seen.fresh[f] for f in families), seen.scores)
        for seen in rounds
    ]


def verdict(
    rounds: Sequence[RoundCounts], design: Design, critical: CriticalValues, terms: Mapping[str, Terms] | None = None
) -> Verdict:
    """At the newest of `rounds`. terms: of families that were repaired; the others stand as they began."""
    families = sorted(rounds[-1].dev)
    kept = {family: (terms or {}).get(family, Terms()) for family in families}
    portions = shares({family: (counts.reference, counts.num_items) for family, counts in rounds[0].dev.items()})
    looks = {family: [FamilyCounts(seen.dev[family], seen.fresh[family]) for seen in rounds] for family in families}
    tests = [
        replace(test, since=test.since + kept[family].since)
        for family in families
        for test in family_tests(family, looks[family][kept[family].since :])
    ]
    common = max(each.since for each in kept.values())
    tests += [
        replace(test, since=test.since + common) for test in mean_tests([each[common:] for each in looks.values()])
    ]
    arms = [test for family in families for test in arm_tests(family, looks[family][-1])]
    boards = board_rounds(rounds)
    board = board_test(boards, {family: portions[family] for family in families}, design)
    leak = leak_test(boards, [seen.ahead for seen in rounds], design)

    def beyond(level: Fraction, candidates: Sequence[GapTest]) -> tuple[GapTest, ...]:
        def own(test: GapTest) -> Fraction:
            share = portions[test.family] if test.arm is not None else portion(test.family, portions)
            return level * share * (kept[test.family].level_factor if test.family in kept else 1)

        return tuple(test for test in candidates if test.exceeds(own(test)))

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


def upper_bound(gap: Fraction, variance: Fraction) -> Decimal:
    """One-sided 95 % bound of a gap."""
    with exactly():
        return decimal_of(gap) + upper_quantile(BOUND_LEVEL) * decimal_of(variance).sqrt()
