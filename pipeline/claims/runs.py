"""The runs that claims rest on: each training run's fresh lift over the reference adapter, all families together.

The run is the unit, not the item: two runs of one recipe differ by their training seeds, and no number of items removes this
difference. A planned run without a score may be missing because it went badly, or because somebody disliked it. So it counts against the
claim: a standing run as the lowest scored run of its round, a run of the reference recipe as the highest. All values are exact rationals.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pipeline.campaign.records import Arm, Outcome, Setting
from pipeline.stats.lifts import paired_lift

STANDING, REFERENCE, AXIS = "standing", "reference", "axis"


@dataclass(frozen=True)
class Run:
    """One scored run. `lift` is its fresh lift over the reference adapter and `variance` the lift's variance over items, which is never
    taken as smaller than that of one answer: where nearly every answer is wrong, a few equal runs say nothing about the next one.

    `kind` is STANDING for the standing recipe, REFERENCE for a0 and the repeats of the reference recipe, AXIS for an arm with one moved
    axis. `overwrites` says that the axis replaces a setting of the standing recipe, so that the arm is not "the standing recipe and one more".
    `is_missing` says that the run has no score, and that lift and variance are those of the run that it counts as.
    """

    round: int
    arm: str
    kind: str
    lift: Fraction
    variance: Fraction
    overwrites: bool = False
    is_missing: bool = False


def of_round(
    number: int, reference: Outcome, outcomes: Sequence[Outcome], arms: Sequence[Arm], standing: Sequence[Setting]
) -> list[Run]:
    """The runs of a round, the scored ones first, in the order of the outcomes; none where the reference or every arm has no fresh score.

    `arms` is the round's plan and `standing` the recipe that its axes moved from. Contrasts and the control are left out, and so is an
    axis arm whose fork an agent edited: it is a run of no recipe (article 16). Raises IntegrityError where a run and the reference were
    scored on different items.
    """
    if not reference.scored("fresh"):
        return []
    kept_keys = {key for key, _ in standing}
    planned = {arm.name: arm for arm in arms}
    runs: list[Run] = []
    missing: list[tuple[str, str]] = []
    for outcome in outcomes:
        arm = planned[outcome.arm]
        kind = arm.replicate_of or arm.role
        if kind in (STANDING, REFERENCE) and (outcome.edited or not outcome.scored("fresh")):
            missing.append((arm.name, kind))
        elif kind in (STANDING, REFERENCE, AXIS) and outcome.scored("fresh") and not outcome.edited:
            lift = paired_lift(outcome, reference, "fresh")
            overwrites = kind == AXIS and arm.overrides[-1][0] in kept_keys
            one_answer = Fraction(2, lift.num_items**2)  # two runs that differ by chance in one answer each
            runs.append(Run(number, arm.name, kind, lift.mean, max(lift.variance, one_answer), overwrites))
    if not runs:
        return []
    ordered = sorted(runs, key=lambda run: run.lift)
    worst = {STANDING: ordered[0], REFERENCE: ordered[-1]}
    return runs + [replace(worst[kind], arm=arm, kind=kind, overwrites=False, is_missing=True) for arm, kind in missing]


def of_kind(runs: Sequence[Run], kind: str, rounds: Collection[int] | None = None) -> list[Run]:
    """The runs of one kind, of all rounds or of `rounds`."""
    return [run for run in runs if run.kind == kind and (rounds is None or run.round in rounds)]


def mean_lift(runs: Sequence[Run]) -> Fraction:
    """The mean lift of at least one run."""
    return sum((run.lift for run in runs), Fraction(0)) / len(runs)


def squares(runs: Sequence[Run]) -> tuple[Fraction, int]:
    """The sum of squared deviations of the lifts from the mean of their round, and its degrees of freedom."""
    total, degrees = Fraction(0), 0
    for of_round_runs in by_round(runs).values():
        mean = mean_lift(of_round_runs)
        total += sum(((run.lift - mean) ** 2 for run in of_round_runs), Fraction(0))
        degrees += len(of_round_runs) - 1
    return total, degrees


def by_round(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """The runs of each round, the earliest round first."""
    rounds: dict[int, list[Run]] = {}
    for run in runs:
        rounds.setdefault(run.round, []).append(run)
    return dict(sorted(rounds.items()))


def item_variances(runs: Sequence[Run]) -> dict[int, Fraction]:
    """For each round, half the mean item variance of its reference runs' lifts; of its standing runs' where it has no reference run.

    A lift is a difference of two runs with about the same item noise, so that half of its variance is one run's part.
    """
    result = {}
    for number, of_one_round in by_round(runs).items():
        counted = of_kind(of_one_round, REFERENCE) or of_kind(of_one_round, STANDING)
        if counted:
            result[number] = sum((run.variance for run in counted), Fraction(0)) / len(counted) / 2
    return result


def mean_of(variances: Mapping[int, Fraction]) -> Fraction:
    """The mean over rounds of what `item_variances` returns."""
    return sum(variances.values(), Fraction(0)) / len(variances)
