"""Outcomes in, evidence out: paired lifts over a baseline and the noise of retraining. Exact, no I/O.

For arm j and item i of a set, D_ij = Y_ij - Y_i,base with Y in {0, 1}. The lift is mean_i D_ij; items are the sampling unit, so its
variance is sum_i (D_ij - mean)^2 / (n (n-1)) (Miller 2411.00640, paired differences). What another seed alone does to a score is
estimated from runs of one recipe: the reference, a0 and its replicates; their sample variance still holds the items'
own share, which is taken out (floor 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Lift, Outcome


def paired_lift(
    arm: Outcome, baseline: Outcome, item_set: str, name: str = "reference", families: Sequence[str] | None = None
) -> Lift:
    """Lift of one arm on one set (all of it, or some families) over the baseline called `name`.

    Raises IntegrityError when the two were not scored on the same items.
    """
    (ours, n), (theirs, _) = arm.right(item_set, families), baseline.right(item_set, families)
    sizes = [{family: len(marks) for family, marks in run.outcomes[item_set].items()} for run in (arm, baseline)]
    if sizes[0] != sizes[1]:
        raise IntegrityError(
            f"{arm.arm} and the {name} were scored on different items of {item_set}: {sizes[0]}, {sizes[1]}"
        )
    won, lost = (ours & ~theirs).bit_count(), (theirs & ~ours).bit_count()
    mean = Fraction(won - lost, n)
    squares = won + lost - n * mean**2
    variance = squares / (n * (n - 1)) if n > 1 else Fraction(1)
    return Lift(arm.arm, name, item_set, n, mean, variance)


def seed_variance(groups: Sequence[Sequence[Outcome]], item_set: str) -> tuple[Fraction, int]:
    """Variance of one training run's true score under other seeds, and from how many repeats it is known. Each group has runs of one recipe.

    A run's difference to the first of its group has expected square 2 s^2 + item variance; the mean over all gives s^2 (0 where there
    are none).
    """
    lifts = [paired_lift(run, first, item_set) for first, *others in filter(None, groups) for run in others]
    if not lifts:
        return Fraction(0), 0
    mean_square = sum((lift.mean**2 - lift.variance for lift in lifts), Fraction(0)) / len(lifts)
    return max(Fraction(0), mean_square / 2), len(lifts)


def accuracy(outcome: Outcome, item_set: str) -> Fraction | None:
    """Share of right answers, or None where there is no score."""
    if not outcome.scored(item_set):
        return None
    right, num_items = outcome.right(item_set)
    return Fraction(right.bit_count(), num_items)


def show(value: Fraction) -> str:
    """A difference of accuracies, as `+8.67 points`: exact input, the same text anywhere."""
    return f"{signed(value)} points"


def amount(value: Fraction) -> str:
    """How large a difference is, as `8.67 points`."""
    return f"{signed(abs(value))[1:]} points"


def signed(value: Fraction) -> str:
    """Points to hundredths, rounded half to even, with their sign."""
    hundredths = round(value * 10000)
    return f"{'-' if hundredths < 0 else '+'}{abs(hundredths) // 100}.{abs(hundredths) % 100:02d}"
