"""Test the sentences about claims: what is compared with what, how far noise reaches, and on which condition a rate holds."""

from fractions import Fraction

from pipeline.campaign import facts
from pipeline.claims import wording
from pipeline.claims.assess_claims import Claims
from pipeline.claims.claim_test import Comparison
from pipeline.claims.worse_test import ArmComparison

ALLOWANCE = facts.load_constitution().crash_allowance


def found(difference: str, num: int = 1, degrees: int = 1) -> Comparison:
    return Comparison(
        Fraction(difference), Fraction(1, 10_000), degrees, Fraction("7.3006"), num, 3, tuple(range(2, 2 + num))
    )


def test_no_claim_says_above_below_or_level_and_what_may_confirm_one():
    said = {
        value: wording.of_improvement(Claims(Fraction(11, 1200), found(value))) for value in ("1/100", "-1/100", "0")
    }
    assert said["1/100"] == (
        "no improvement is claimed: in r0002 the standing run is 1.00 points above the 3 runs of the reference recipe on fresh items, and noise "
        "reaches to 7.30 points (7.30 standard errors: Student's t with 1 degree of freedom at this round's part of the level, 0.92 %); further runs "
        "of the standing recipe may confirm one"
    )
    assert "is 1.00 points below the 3 runs" in said["-1/100"] and "is level with the 3 runs" in said["0"]
    last = wording.of_improvement(Claims(Fraction(1, 100), found("1/100", 3, 9), num_missing=(1, 2)), is_last=True)
    assert (
        "in r0002 to r0004 the 3 standing runs are on average 1.00 points above" in last and "further runs" not in last
    )
    assert "; 1 run of the standing recipe without a score counts as the lowest of the round" in last
    assert "; 2 runs of the reference recipe without a score count as the highest of the round" in last


def test_what_is_shown_to_be_worse_names_its_runs_and_the_condition_of_its_rate():
    claims = Claims(worse_standing=found("9/10", 2), worse_level=Fraction(1, 80))
    said = wording.of_worse_standing(claims, ALLOWANCE)
    assert said.startswith(
        "what the search stood on in r0002 to r0003 is shown to be worse than the reference recipe: without the lowest, "
    )
    assert "the 2 standing runs are on average 90.00 points below the 3 runs of the reference recipe" in said
    condition = "at most 5 % of campaigns say this falsely of anything, as long as no run loses more than 10.00 points by chance"
    assert condition in said and "level, 1.25 %)" in said
    assert wording.of_improvement(claims) == "no improvement can be claimed in this round: no runs were compared"
    assert wording.of_worse_standing(Claims(), ALLOWANCE) == ""
    arm = ArmComparison(Fraction(-1, 2), Fraction(1, 4), True)
    for baseline, runs in (("reference", "runs of the reference recipe"), ("standing", "standing runs")):
        said = wording.of_worse_arm(arm, baseline, ALLOWANCE)
        assert f"50.00 points below the mean of this round's {runs} on fresh items" in said and condition in said


def test_one_run_that_answers_as_its_baseline_does_says_nothing_of_noise():
    said = wording.of_lift(Fraction(0), Fraction(0), "reference", "2.45", "within noise")
    assert said.startswith("gets the same fresh items right as the reference adapter") and "within noise" not in said
    said = wording.of_lift(Fraction(-1, 10), Fraction(1, 8), "standing", "2.45", "within noise")
    assert (
        "a fresh lift of -10.00 points over this round's standing run, within noise; 2.45 standard errors reach to 12.50 points on either"
        in said
    )
