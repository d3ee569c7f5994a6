"""The sentences in which reasons, page and status tell what is claimed, shown to be worse, or set aside, each with its error rate."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pipeline.claims.assess_claims import Claims
from pipeline.claims.worse_test import ArmComparison
from pipeline.stats.lifts import amount, show

FALSE_CLAIMS = "at most 5 % of campaigns make a false claim"
FALSE_WORSE = "at most 5 % of campaigns say this falsely of anything"
NOT_SHOWN = "this is one run and shows nothing"


def of_improvement(claims: Claims, is_last: bool = False) -> str:
    """Whether an improvement is claimed of the recipes that the search stood on, or what would confirm one; an empty string where they are
    shown to be worse."""
    found = claims.improvement
    if found.not_evaluated:
        return f"no improvement can be claimed in this round: {found.not_evaluated}"
    if claims.worse_standing.is_shown:
        return ""
    facts = (
        f"what the search stood on in {_rounds(found.rounds)}: on fresh items it differs (mean of {_runs(found.num_standing)}) from the "
        f"reference recipe ({_runs(found.num_reference)}) by {show(found.difference)}, and noise reaches to {amount(found.reach)}{_missing(claims)}"
    )
    if claims.is_claimed:
        return f"an improvement is claimed of {facts} ({FALSE_CLAIMS}; this says nothing of one setting alone)"
    further = "" if is_last else "; further runs of the standing recipe may confirm one"
    return f"no improvement is claimed of {facts}{further}"


def of_worse_standing(claims: Claims) -> str:
    """That the standing recipe is shown to be worse than the reference; an empty string where it is not."""
    found = claims.worse_standing
    if not found.is_shown:
        return ""
    return (
        f"the standing recipe is shown to be worse than the reference: its runs without the lowest lie {amount(found.difference)} below, and "
        f"noise reaches to {amount(found.reach)} ({FALSE_WORSE}); the search goes on from it, and a person may end the campaign"
    )


def of_worse_arm(found: ArmComparison, baseline: str) -> str:
    """The clause that says that an axis arm is shown to be worse than the recipe that it moved from."""
    return (
        f"is shown to be worse than the {baseline} recipe: {show(found.difference)}, and noise with the allowance for collapses reaches to "
        f"{show(-found.reach)} ({FALSE_WORSE})"
    )


def of_set_aside(difference: Fraction, limit: Fraction, baseline: str) -> str:
    """The clause that says that an axis arm's setting is set aside. `limit` is the distance that noise reaches."""
    return (
        f"is set aside: {show(difference)} against the {baseline} recipe, noise reaches to {show(-limit)}; {NOT_SHOWN}"
    )


def _rounds(numbers: Sequence[int]) -> str:
    first, *others = [f"r{number:04d}" for number in numbers]
    return f"{first} to {others[-1]}" if others else first


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def _missing(claims: Claims) -> str:
    """How the planned runs without a score count; an empty string without any."""
    parts = [
        f"{_runs(number)} of the {recipe} recipe without a score count{'s' if number == 1 else ''} as the {extreme} of the round"
        for number, recipe, extreme in zip(
            claims.num_missing, ("standing", "reference"), ("lowest", "highest"), strict=True
        )
        if number
    ]
    return "".join(f"; {part}" for part in parts)
