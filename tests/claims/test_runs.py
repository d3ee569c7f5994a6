"""Test which runs count in a claim, and what a planned run without a score counts as."""

from dataclasses import replace
from fractions import Fraction

from pipeline.campaign.records import Arm, Outcome
from pipeline.claims.runs import AXIS, REFERENCE, STANDING, of_round

RANK = ("recipe.lora.rank", "8")
PLAN = (
    Arm(0, "anchor", 0, replicate_of="reference"),
    Arm(1, "axis", 1, (RANK, ("recipe.lora.alpha", "64")), axis="alpha"),
    Arm(2, "axis", 2, (("recipe.lora.rank", "32"),), axis="rank"),
    Arm(3, "contrast", 3, (RANK,), axis="roman"),
    Arm(4, "replicate", 4, (RANK,), replicate_of="standing"),
)


def outcome(arm: str, right: int | None) -> Outcome:
    if right is None:
        return Outcome(arm, "axis", "failed", "diverged")
    marks = {"roman": "1" * right + "0" * (10 - right)}
    return Outcome(arm, "axis", "completed", "completed", outcomes={"dev": marks, "fresh": marks})


def lifts(*right: int | None) -> dict[str, tuple[str, Fraction, bool, bool]]:
    runs = of_round(2, outcome("reference", 5), [outcome(f"a{n}", r) for n, r in enumerate(right)], PLAN, (RANK,))
    return {run.arm: (run.kind, run.lift, run.overwrites, run.is_missing) for run in runs}


def test_runs_of_the_recipes_and_axes_count_and_contrasts_do_not():
    assert lifts(5, 6, 4, 9, 8) == {
        "a0": (REFERENCE, Fraction(0), False, False),
        "a1": (AXIS, Fraction(1, 10), False, False),
        "a2": (AXIS, Fraction(-1, 10), True, False),
        "a4": (STANDING, Fraction(3, 10), False, False),
    }


def test_a_missing_run_counts_against_the_claim():
    """Whoever lets a bad standing run or a good anchor disappear gains nothing by it."""
    assert lifts(5, 6, 4, 9, None)["a4"] == (STANDING, Fraction(-1, 10), False, True)
    assert lifts(None, 6, 4, 9, 8)["a0"] == (REFERENCE, Fraction(3, 10), False, True)
    assert "a1" not in lifts(5, None, 4, 9, 8)  # an axis arm without a score is no measure of anything


def test_equal_runs_are_not_taken_as_free_of_chance():
    runs = of_round(2, outcome("reference", 0), [outcome(f"a{n}", 0) for n in range(5)], PLAN, (RANK,))
    assert {run.variance for run in runs} == {Fraction(2, 100)}  # ten items


def test_without_the_reference_or_any_run_nothing_counts():
    assert lifts(None, None, None, 9, None) == {}
    arms = [outcome(f"a{n}", 5) for n in range(5)]
    assert of_round(2, outcome("reference", None), arms, PLAN, (RANK,)) == []


def test_edited_code_is_a_run_of_no_recipe():
    """An edited axis arm counts nowhere; an edited run of a recipe, which article 16 forbids, counts as missing, and so against the claim."""
    arms = [outcome(f"a{n}", right) for n, right in enumerate((5, 10, 4, 9, 10))]
    edited = [replace(arm, edited=arm.arm in ("a1", "a4")) for arm in arms]
    found = {run.arm: run for run in of_round(2, outcome("reference", 5), edited, PLAN, (RANK,))}
    assert "a1" not in found
    assert (found["a4"].lift, found["a4"].is_missing) == (Fraction(-1, 10), True)
