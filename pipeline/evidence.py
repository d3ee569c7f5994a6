"""Outcomes in, evidence out: paired lifts over a baseline and the noise of retraining. Exact, no I/O.

For arm j and item i of a set, D_ij = Y_ij - Y_i,base with Y in {0, 1}. The lift is mean_i D_ij; items are the sampling unit, so its
variance is sum_i (D_ij - mean)^2 / (n (n-1)) (Miller 2411.00640, paired differences). What another seed alone does to a score is
estimated from runs of one recipe: the reference, a0 and its replicates; their sample variance still holds the items'
own share, which is taken out (floor 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from pipeline.errors import IntegrityError
from pipeline.records import Arm, Evidence, Lift, Outcome

SETS = ("dev", "fresh")


def paired_lift(arm: Outcome, baseline: Outcome, item_set: str, name: str = "reference") -> Lift:
    """Lift of one arm on one set over the baseline called `name`. Raises IntegrityError when the two were not scored on the same items."""
    ours, theirs = arm.correct(item_set), baseline.correct(item_set)
    sizes = [{family: len(marks) for family, marks in run.outcomes[item_set].items()} for run in (arm, baseline)]
    if sizes[0] != sizes[1]:
        raise IntegrityError(
            f"{arm.arm} and the {name} were scored on different items of {item_set}: {sizes[0]}, {sizes[1]}"
        )
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    mean = Fraction(sum(differences), n)
    squares = sum(d * d for d in differences) - n * mean**2
    variance = squares / (n * (n - 1)) if n > 1 else Fraction(1)
    return Lift(arm.arm, name, item_set, n, mean, variance)


def seed_variance(replicates: Sequence[Outcome], reference: Outcome, item_set: str) -> Fraction:
    """Variance of one training run's true score under other seeds, from runs of the reference recipe (the reference included).

    Each replicate's difference to the reference has expected square 2 s^2 + item variance; the mean over replicates gives s^2.
    """
    lifts = [paired_lift(run, reference, item_set) for run in replicates]
    if not lifts:
        return Fraction(0)
    mean_square = sum((lift.mean**2 - lift.variance for lift in lifts), Fraction(0)) / len(lifts)
    return max(Fraction(0), mean_square / 2)


def gather(round_name: str, reference: Outcome, outcomes: Sequence[Outcome], plan: Sequence[Arm]) -> Evidence:
    """Evidence of one round: every scored arm against the reference and, where one ran, the standing recipe.

    The reference goes by that name: it was a0 of r0000, and is not to be counted as a0 of this round.
    """
    reference = replace(reference, arm="reference")
    repeats_of = {arm.name: arm.replicate_of for arm in plan}
    standing = [("standing", outcome) for outcome in outcomes if repeats_of[outcome.arm] == "standing"]
    baselines = dict([("reference", reference), *standing])
    lifts = tuple(
        paired_lift(outcome, baseline, item_set, name)
        for outcome in outcomes
        for name, baseline in baselines.items()
        for item_set in SETS
        if outcome is not baseline and outcome.scored(item_set) and baseline.scored(item_set)
    )
    repeats = [outcome for outcome in outcomes if repeats_of[outcome.arm] == "reference" and outcome.scored("fresh")]
    noise = seed_variance(repeats, reference, "fresh") if reference.scored("fresh") else Fraction(0)
    return Evidence(round_name, (reference, *outcomes), lifts, len(repeats), noise)


def accuracy(outcome: Outcome, item_set: str) -> Fraction | None:
    """Share of right answers, or None where there is no score."""
    if not outcome.scored(item_set):
        return None
    marks = outcome.correct(item_set)
    return Fraction(sum(marks), len(marks))
