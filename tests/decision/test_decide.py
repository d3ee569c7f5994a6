"""Test evidence and decisions: exact against numpy and scipy, right on average in simulations, and each branch of article 7."""

from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from pipeline.campaign import canonical, facts
from pipeline.campaign.errors import IntegrityError, Refused
from pipeline.campaign.records import Arm, FamilyState, Lift, Outcome, Policy
from pipeline.claims.assess_claims import Claims
from pipeline.claims.claim_test import Comparison
from pipeline.claims.worse_test import ArmComparison
from pipeline.decision import decide, policy_update, promotion
from pipeline.decision.evidence import Evidence, of_one_round
from pipeline.decision.family_states import StateRules
from pipeline.stats import lifts as lifts_module
from pipeline.stats.lifts import accuracy, paired_lift, show

RULES = facts.load_constitution()
NUM_ITEMS = 200
RANK, RATE = ("recipe.lora.rank", "8"), ("recipe.learning_rate", "0.008")
PLAN = (
    Arm(0, "anchor", 10, replicate_of="reference"),
    *(Arm(n, "axis", 10 + n, (("recipe.lora.alpha", str(n)),), axis="alpha") for n in range(1, 7)),
    Arm(7, "replicate", 17, replicate_of="reference"),
)
POLICY = Policy((), ())


def outcome(arm: str, marks: str, role: str = "axis") -> Outcome:
    """A scored arm with the same marks on dev and fresh, split over two families."""
    half = len(marks) // 2
    families = {"roman": marks[:half], "unit_conversion": marks[half:]}
    return Outcome(arm, role, "completed", "completed", outcomes={"dev": families, "fresh": families})


def score(num_correct: int) -> str:
    return "1" * num_correct + "0" * (NUM_ITEMS - num_correct)


def lost(arm: str, status: str = "failed", exit_class: str = "diverged") -> Outcome:
    return Outcome(arm, "axis", status, exit_class)


def round_of(changed: dict[int, Outcome] | None = None, plan: tuple[Arm, ...] = PLAN, reference: int = 100) -> Evidence:
    """A round in which every arm scores as the reference does, apart from those that are given."""
    arms = [(changed or {}).get(arm.index, outcome(arm.name, score(reference), arm.role)) for arm in plan]
    return of_one_round("r0001", outcome("a0", score(reference), "reference"), arms, plan)


def decided(seen: Evidence, plan: tuple[Arm, ...] = PLAN, policy: Policy = POLICY) -> decide.Decision:
    return decide.decide(seen, {arm.name: arm for arm in plan}, policy, RULES)


paired_marks = st.integers(2, 60).flatmap(lambda n: st.tuples(*[st.text("01T", min_size=n, max_size=n)] * 2))


@given(paired_marks)
def test_lift_and_variance_are_those_of_a_paired_t_test(pair):
    ours, theirs = (np.array([mark == "1" for mark in marks], float) for marks in pair)
    lift = paired_lift(outcome("a1", pair[0]), outcome("a0", pair[1]), "dev")
    differences = ours - theirs
    assert float(lift.mean) == pytest.approx(differences.mean())
    assert float(lift.variance) == pytest.approx(differences.var(ddof=1) / len(differences))
    if differences.std() > 0:
        t = float(lift.mean) / float(lift.variance) ** 0.5
        assert t == pytest.approx(ttest_rel(ours, theirs).statistic)


@given(paired_marks)
def test_lift_is_antisymmetric_and_nothing_against_itself(pair):
    one, other = outcome("a1", pair[0]), outcome("a2", pair[1])
    there, back = paired_lift(one, other, "dev"), paired_lift(other, one, "dev")
    assert (there.mean, there.variance) == (-back.mean, back.variance)
    assert (paired_lift(one, one, "dev").mean, paired_lift(one, one, "dev").variance) == (0, 0)


def test_runs_on_different_items_are_not_compared():
    with pytest.raises(IntegrityError, match="a1 and the reference were scored on different items of dev"):
        paired_lift(outcome("a1", "1100"), outcome("a0", "11001100"), "dev")


def test_seed_variance_is_right_on_average():
    """Runs whose true score varies by sd 0.08 around one recipe: the mean estimate over many campaigns is 0.08 squared."""
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(300):
        shared = rng.uniform(0.2, 0.8, 150)  # item difficulties, common to all runs
        runs = [rng.random(150) < np.clip(shared + rng.normal(0, 0.08), 0, 1) for _ in range(3)]
        reference, *repeats = [outcome(f"a{n}", "".join("01"[int(mark)] for mark in run)) for n, run in enumerate(runs)]
        lifts = [paired_lift(run, reference, "dev") for run in repeats]
        estimates.append(float(sum(lift.mean**2 - lift.variance for lift in lifts) / len(lifts) / 2))
        assert lifts_module.seed_variance([[reference, *repeats]], "dev")[0] == pytest.approx(max(0.0, estimates[-1]))
    standard_error = np.std(estimates) / len(estimates) ** 0.5
    assert np.mean(estimates) == pytest.approx(0.08**2, abs=4 * standard_error)
    assert standard_error < 0.0008  # so that the line above can fail


def test_without_replicates_there_is_no_seed_variance():
    assert lifts_module.seed_variance([[outcome("a0", "10")], []], "dev") == (0, 0)


def test_replicates_are_the_anchor_and_repeats_of_the_reference_that_have_a_score():
    assert round_of().num_replicates == 2
    assert round_of({7: lost("a7")}).num_replicates == 1


def test_failed_and_absent_arms_have_no_lift():
    seen = round_of({1: lost("a1"), 2: lost("a2", "absent", "absent")})
    assert {lift.arm for lift in seen.lifts} == {"a0", "a3", "a4", "a5", "a6", "a7"}
    assert accuracy(seen.outcomes[2], "fresh") is None
    assert accuracy(outcome("a1", "1T10"), "fresh") == Fraction(1, 2)


def test_evidence_holds_no_float_and_seals_to_the_same_bytes():
    assert canonical.encoded(asdict(round_of())) == canonical.encoded(asdict(round_of()))


@given(st.fractions(-1, 1), st.fractions(0, 1, max_denominator=1000), st.fractions(0, 1, max_denominator=1000))
def test_verdict_is_the_rule_of_article_7(mean, variance, seed_variance):
    limit = float(RULES.z) * float(variance + 2 * seed_variance) ** 0.5
    verdict = promotion.compare(Lift("a1", "reference", "fresh", 9, mean, variance), seed_variance, RULES)
    if abs(abs(float(mean)) - limit) > 1e-9:
        assert verdict == ("within noise" if abs(mean) <= limit else "above noise" if mean > 0 else "below noise")


def test_a_lift_exactly_at_the_limit_is_noise():
    z = Fraction(RULES.z)
    at_limit = Lift("a1", "reference", "fresh", 9, z / 10, Fraction(1, 100))
    assert promotion.compare(at_limit, Fraction(0), RULES) == "within noise"
    assert promotion.compare(replace(at_limit, mean=z / 10 + Fraction(1, 10**9)), Fraction(0), RULES) == "above noise"
    assert promotion.compare(replace(at_limit, mean=-z / 10 - Fraction(1, 10**9)), Fraction(0), RULES) == "below noise"


def test_the_largest_lift_above_noise_joins_the_standing_recipe():
    decision = decided(round_of({2: outcome("a2", score(130)), 5: outcome("a5", score(150))}))
    assert (decision.state, decision.kept, decision.policy.standing) == ("decided", "a5", (("recipe.lora.alpha", "5"),))
    assert "article 8: a5's recipe.lora.alpha=5 joins the standing recipe" in decision.reasons


def test_of_equal_lifts_the_lower_arm_wins():
    assert decided(round_of({n: outcome(f"a{n}", score(140)) for n in (6, 3)})).kept == "a3"


def test_one_run_below_noise_is_set_aside_once_and_nothing_is_forgotten():
    old, setting = ("recipe.schedule", "SquareAnnealing"), ("recipe.lora.alpha", "4")
    decision = decided(round_of({4: outcome("a4", score(50))}), policy=Policy((), (), (old,), (old,)))
    assert (decision.kept, decision.policy.dead_ends, decision.policy.set_aside) == (None, (old,), (setting,))
    again = decided(round_of({4: outcome("a4", score(50))}), policy=decision.policy)
    assert (again.policy.dead_ends, again.policy.set_aside) == ((old,), (setting,))
    assert any(f"a4 ({setting[0]}=4) is set aside" in reason and "shows nothing" in reason for reason in again.reasons)


def test_what_is_shown_to_be_worse_is_closed_for_good():
    seen = round_of({4: outcome("a4", score(50))})
    worse = {"a4": ArmComparison(Fraction(-1, 4), Fraction(1, 5), True)}
    decision = decided(replace(seen, claims=Claims(worse_arms=worse)))
    assert (decision.policy.dead_ends, decision.policy.set_aside) == ((("recipe.lora.alpha", "4"),), ())
    assert any("a4" in reason and "is shown to be worse" in reason for reason in decision.reasons)


def test_a_claim_is_the_claim_test_s_alone():
    better = round_of({2: outcome("a2", score(190))})
    assert not decided(better).claimed
    found = Comparison(Fraction(1, 10), Fraction(1, 10_000), 9, Fraction(3), 2, 3, (2, 3))
    decision = decided(replace(better, claims=Claims(Fraction(1, 50), found)))
    assert decision.claimed
    assert any(
        "an improvement is claimed: in r0002 to r0003 the 2 standing runs are on average 10.00 points above the 3 runs of the reference recipe on "
        "fresh items, and noise reaches to 3.00 points (3.00 standard errors: Student's t with 9 degrees of freedom at this round's part of the "
        "level, 2.00 %) (at most 5 % of campaigns make a false claim; this says nothing of one setting alone)" in reason
        for reason in decision.reasons
    )
    assert any("it is kept for now, and nothing is claimed of it" in reason for reason in decision.reasons)


def test_equal_arms_change_nothing():
    decision = decided(round_of())
    assert (decision.state, decision.kept, decision.policy.standing, decision.policy.dead_ends) == (
        "decided",
        None,
        (),
        (),
    )
    assert any("nothing is kept" in reason for reason in decision.reasons)


def test_the_anchor_and_its_replicate_are_never_kept():
    seen = round_of({0: outcome("a0", score(200), "anchor"), 7: outcome("a7", score(199), "replicate")})
    assert decided(seen).kept is None


def test_retraining_noise_hides_a_lift_that_items_alone_would_show():
    better = {3: outcome("a3", score(130))}
    assert decided(round_of(better)).kept == "a3"
    assert decided(round_of({**better, 0: outcome("a0", score(60), "anchor")})).kept is None


@pytest.mark.parametrize("num_scored", range(9))
def test_quorum(num_scored):
    changed = {index: lost(f"a{index}", "absent", "absent") for index in range(num_scored, 8)}
    decision = decided(round_of(changed))
    assert (decision.state == "decided") == (num_scored >= RULES.quorum)
    for index in range(num_scored, 8):
        assert any(f"a{index}" in reason and "absent" in reason for reason in decision.reasons)


def test_without_the_reference_nothing_is_decided():
    arms = [outcome(arm.name, score(100), arm.role) for arm in PLAN]
    seen = of_one_round("r0001", Outcome("a0", "reference", "absent", "absent"), arms, PLAN)
    decision = decided(seen)
    assert (decision.state, decision.kept) == ("undecided", None)
    assert decision.reasons == ("article 7: the reference recipe has no score on this round's fresh items",)


def standing_plan() -> tuple[tuple[Arm, ...], Policy]:
    """A round whose standing recipe is no more the reference: a7 runs it, a1 to a6 move from it."""
    moved = [replace(arm, overrides=(RANK, *arm.overrides)) for arm in PLAN[1:7]]
    return (PLAN[0], *moved, Arm(7, "replicate", 17, (RANK,), None, "standing")), Policy((RANK,), ())


def test_a_moved_axis_is_compared_with_the_recipe_that_it_moved_from():
    arms, policy = standing_plan()
    standing = outcome("a7", score(150), "replicate")
    as_good = {7: standing, **{n: outcome(f"a{n}", score(150)) for n in range(1, 7)}}
    decision = decided(round_of(as_good, arms), arms, policy)
    assert (decision.kept, decision.policy.standing) == (
        None,
        (RANK,),
    )  # all beat the reference, none the standing recipe
    better = {**as_good, 2: outcome("a2", score(190))}
    assert decided(round_of(better, arms), arms, policy).policy.standing == (RANK, ("recipe.lora.alpha", "2"))


def test_without_a_run_of_the_standing_recipe_nothing_is_decided():
    arms, policy = standing_plan()
    decision = decided(round_of({7: lost("a7")}, arms), arms, policy)
    assert (decision.state, decision.policy.standing) == ("undecided", (RANK,))
    assert "the standing recipe has no score" in decision.reasons[0]


def test_next_overrides_are_the_policy_and_nothing_else():
    decision = replace(
        decided(round_of()), policy=Policy((RANK,), (), (RATE,), retired=("alpha",), replicates=1, control=())
    )
    content = policy_update.overrides(decision, "r0002", RULES)
    assert content == {
        "round": "r0002",
        "policy": {
            "standing": [{"key": RANK[0], "value": "8"}],
            "dead_ends": [{"key": RATE[0], "value": "0.008"}],
            "set_aside": [],
            "tried": [],
            "quiet": [],
            "retired": ["alpha"],
            "replicates": 1,
            "contrasts": [],
            "has_control": True,
            "control": [],
            "repaired": [],
        },
    }


def test_a_setting_off_the_allow_list_never_reaches_the_next_round():
    with pytest.raises(Refused, match="article 2 .closed_key.: 'recipe.num_steps'"):
        policy_update.overrides(
            replace(decided(round_of()), policy=Policy((("recipe.num_steps", "900"),), ())), "r0002", RULES
        )


@given(st.fractions(-1, 1, max_denominator=10**6))
def test_shown_ratios_are_rounded_half_to_even(value):
    text = show(value)
    assert text[0] in "+-" and text.endswith(" points")
    assert abs(Fraction(text.removesuffix(" points")) - 100 * value) <= Fraction(1, 200)


@pytest.mark.parametrize(
    ("value", "text"),
    [("0", "+0.00"), ("-1/30000", "+0.00"), ("1/20000", "+0.00"), ("3/20000", "+0.02"), ("-1/8", "-12.50"), ("1", "+100.00")],
)  # fmt: skip
def test_shown_ratio(value, text):
    assert show(Fraction(value)) == f"{text} points"


@pytest.mark.parametrize(("code", "repaired", "what"), [
    ("board_alarm", (), (("roman", "r0003"),)),
    ("unchanged", (), (("roman", "r0003"),)),  # reversed by an earlier decision of the round, which no plan took up
    ("unchanged", (("roman", "r0002"),), (("roman", "r0002"),)),
])  # fmt: skip
def test_whatever_is_reversed_gets_new_dev_items_once(code, repaired, what):
    seen = replace(round_of(), round="r0002", families={"roman": FamilyState("REVERSED-shift", code)})
    policy, _ = policy_update._repair(replace(POLICY, repaired=repaired), seen, StateRules.of(RULES))
    assert policy.repaired == what


def test_a_round_is_one_look_at_an_axis_however_many_arms_it_had():
    arms = {arm.name: arm for arm in PLAN[1:4]}  # all three of alpha
    verdicts = dict.fromkeys(arms, "within noise")
    for gains, quiet in (({}, 1), ({"a1": Fraction(1, 10)}, 0)):
        policy, _ = policy_update._retire(POLICY, arms, verdicts, gains, RULES)
        assert policy.quiet == (("alpha", quiet),)


@pytest.mark.parametrize("right", [200, 0])
def test_an_arm_of_edited_code_is_not_kept_and_closes_no_value(right):
    """Article 16: whether it is far better or far worse, its score belongs to no setting."""
    plain, edited = (replace(outcome("a3", score(right)), edited=is_edited) for is_edited in (False, True))
    as_recipe, as_edit = decided(round_of({3: plain})), decided(round_of({3: edited}))
    setting = ("recipe.lora.alpha", "3")
    assert as_recipe.kept == ("a3" if right else None) and (as_recipe.policy.set_aside == (setting,)) == (not right)
    assert as_edit.kept is None and setting not in (*as_edit.policy.set_aside, *as_edit.policy.dead_ends)
    assert dict(as_edit.policy.quiet).get("alpha") == 1  # the other arms of the axis were looked at
    (reason,) = [each for each in as_edit.reasons if each.startswith("article 16")]
    assert "a3 trained edited code" in reason and "no setting says" in reason
