"""The sentences in which reasons and page tell what is claimed, shown to be worse, or set aside, each with its error rate."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pipeline.claims.assess_claims import Claims
from pipeline.claims.claim_test import Comparison
from pipeline.claims.worse_test import ArmComparison
from pipeline.stats.lifts import amount, show

FALSE_CLAIMS = "at most 5 % of campaigns make a false claim"
NOT_SHOWN = "this is one run and shows nothing"
ONE_RUN = {"reference": "the reference adapter", "standing": "this round's standing run"}
"""What a fresh lift is measured from: one run, by the baseline's name."""
MEAN_OF_RUNS = {
    "reference": "the mean of this round's runs of the reference recipe", "standing": "the mean of this round's standing runs",
}  # fmt: skip
"""What an axis arm is compared with before it is shown to be worse. The reference adapter is none of these runs."""


def false_worse(allowance: Fraction) -> str:
    """How often something is falsely shown to be worse, with the condition. `allowance` is article 7's, a difference of accuracies."""
    return f"at most 5 % of campaigns say this falsely of anything, as long as no run loses more than {amount(allowance)} by chance"


def of_improvement(claims: Claims, is_last: bool = False) -> str:
    """Whether an improvement is claimed of the recipes that the search stood on, or what would confirm one; an empty string where they are
    shown to be worse."""
    found = claims.improvement
    if found.not_evaluated:
        return f"no improvement can be claimed in this round: {found.not_evaluated}"
    if claims.worse_standing.is_shown:
        return ""
    facts = (
        f"in {_rounds(found.rounds)} {_standing_runs(found)} {_compared(found)} the {_runs(found.num_reference)} of the reference recipe on "
        f"fresh items, and {_noise(found, claims.level)}{_missing(claims)}"
    )
    if claims.is_claimed:
        return f"an improvement is claimed: {facts} ({FALSE_CLAIMS}; this says nothing of one setting alone)"
    further = "" if is_last else "; further runs of the standing recipe may confirm one"
    return f"no improvement is claimed: {facts}{further}"


def of_worse_standing(claims: Claims, allowance: Fraction) -> str:
    """That what the search stood on is shown to be worse than the reference recipe; an empty string where it is not."""
    found = claims.worse_standing
    if not found.is_shown:
        return ""
    return (
        f"what the search stood on in {_rounds(found.rounds)} is shown to be worse than the reference recipe: without the lowest, "
        f"{_standing_runs(found)} {'is' if found.num_standing == 1 else 'are on average'} {amount(found.difference)} below the "
        f"{_runs(found.num_reference)} of the reference recipe on fresh items, and {_noise(found, claims.worse_level)} "
        f"({false_worse(allowance)}); the search goes on from its standing recipe, and a person may end the campaign"
    )


def of_worse_arm(found: ArmComparison, baseline: str, allowance: Fraction) -> str:
    """The clause that says that an axis arm is shown to be worse than the recipe that it moved from."""
    return (
        f"is shown to be worse than the {baseline} recipe: {amount(found.difference)} below {MEAN_OF_RUNS[baseline]} on fresh items, and noise "
        f"(Student's t, and {amount(allowance)} for a collapse) reaches to {amount(found.reach)} ({false_worse(allowance)})"
    )


def of_set_aside(difference: Fraction, limit: Fraction, baseline: str, z: str) -> str:
    """The clause that says that an axis arm's setting is set aside. `limit` is the distance that `z` standard errors reach."""
    return (
        f"is set aside: {amount(difference)} below {ONE_RUN[baseline]} on fresh items, and {z} standard errors reach to {amount(limit)}; "
        f"{NOT_SHOWN}"
    )


def of_lift(difference: Fraction, limit: Fraction, baseline: str, z: str, verdict: str) -> str:
    """The clause about an axis arm that is neither set aside nor shown to be worse. `verdict` says where its lift lies, such as "within noise"."""
    if not limit and not difference:
        return f"gets the same fresh items right as {ONE_RUN[baseline]}: no run differs from another, so nothing tells how far chance reaches"
    return f"has a fresh lift of {show(difference)} over {ONE_RUN[baseline]}, {verdict}; {z} standard errors reach to {amount(limit)} on either side"


def _standing_runs(found: Comparison) -> str:
    return "the standing run" if found.num_standing == 1 else f"the {found.num_standing} standing runs"


def _compared(found: Comparison) -> str:
    """By how much the standing runs lie above or below."""
    verb = "is" if found.num_standing == 1 else "are on average"
    if not found.difference:
        return f"{verb} level with"
    return f"{verb} {amount(found.difference)} {'above' if found.difference > 0 else 'below'}"


def _noise(found: Comparison, level: Fraction) -> str:
    degrees = f"{found.degrees} degree{'' if found.degrees == 1 else 's'} of freedom"
    return (
        f"noise reaches to {amount(found.reach)} ({_decimals(found.quantile)} standard errors: Student's t with {degrees} at this round's part "
        f"of the level, {_decimals(100 * level)} %)"
    )


def _decimals(value: Fraction) -> str:
    """A number of at least 0 with two decimals, rounded half to even."""
    whole, rest = divmod(round(value * 100), 100)
    return f"{whole}.{rest:02d}"


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
