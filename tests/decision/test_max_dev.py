"""Test a campaign that froze the greedy rule: dev alone decides what is kept and what goes out, and no test closes a value."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.campaign.records import Arm, Outcome
from pipeline.decision import decide, derive, history
from pipeline.reporting import document, page
from tests.support import logs
from tests.support.logs import LEVELS, LogCampaign, Truth

KEY = "recipe.mix.text_cipher"


@dataclass
class Changed(LogCampaign):
    """A greedy campaign whose arms' outcomes are changed before they are logged."""

    choice: str = "max_dev"
    change: Callable[[Outcome], Outcome] = replace

    def outcome(self, name: str, arm: Arm, truth: Truth) -> Outcome:
        found = super().outcome(name, arm, truth)
        return found if arm.role == "reference" else self.change(found)


def narrow(name: str, arm: Arm) -> Truth:
    """Whoever moves one axis gains much on dev and loses much on fresh items."""
    moved = any(key == KEY for key, _ in arm.overrides)
    return Truth(dict.fromkeys(LEVELS, -0.25), dict.fromkeys(LEVELS, 0.4)) if moved else Truth()


def test_no_value_is_closed_whatever_the_tests_say():
    """What is kept although fresh items show it to be worse is no dead end: the next rounds would run a dead end again."""
    campaign = Changed(narrow, logs.SCRIPTED)
    for _ in range(3):
        decision = campaign.play().decision
        assert (decision.policy.dead_ends, decision.policy.set_aside) == ((), ())
        assert not any("set aside" in reason for reason in decision.reasons)
    first = campaign.derived["r0001"].decision
    assert (KEY in dict(first.policy.standing)) and any("is shown to be worse" in reason for reason in first.reasons)


def test_an_arm_that_ran_edited_code_is_never_kept():
    """Article 16 holds for the greedy rule too: no setting says what the arm did."""
    kept = Changed(narrow, logs.SCRIPTED).play().decision
    edited = Changed(narrow, logs.SCRIPTED, change=lambda found: replace(found, edited=found.arm == kept.kept))
    decision = edited.play().decision
    assert kept.kept and decision.kept not in (None, kept.kept) and decision.winner == kept.winner
    assert any(f"article 16: {kept.kept} trained edited code" in reason for reason in decision.reasons)


def test_without_a_dev_score_nothing_is_kept_and_nothing_goes_out():
    def without_dev(found: Outcome) -> Outcome:
        return replace(found, outcomes={"fresh": found.outcomes["fresh"]})

    good = lambda name, arm: Truth(dict.fromkeys(LEVELS, 0.05) if arm.name == "a3" else {})  # noqa: E731
    campaign = Changed(good, logs.SCRIPTED, change=without_dev)
    for _ in range(2):
        decision = campaign.play().decision
        assert (decision.state, decision.kept, decision.winner, decision.policy.standing) == ("decided", None, None, ())
    assert derive.choose_finalists(history.read_history(campaign.records)) == ()


def test_a_round_that_moves_no_axis_says_so():
    campaign = Changed(narrow, logs.SCRIPTED)
    derived = campaign.play()
    plan = history.read_history(campaign.records).plans["r0001"]
    arms = {arm.name: replace(arm, role="replicate", axis=None, replicate_of="reference") for arm in plan.arms}
    leader = ("r0001", "a3")
    decision = decide.decide(derived.evidence, arms, plan.policy, logs.RULES, decide.NONE, "max_dev", leader)
    assert (decision.kept, decision.winner) == (None, leader)
    assert decide.NO_AXIS in decision.reasons and not any("on dev" in reason for reason in decision.reasons)


def test_the_page_tells_what_another_dev_score_would_have_changed():
    campaign = Changed(narrow, logs.SCRIPTED)
    kept = campaign.play().decision.kept
    found = {section.title: section for section in page.of_log(campaign.records, "r0001", "tiny")}
    text = document.as_text([found["What would have changed the decision"]])
    assert f"{kept} is 11.72 points ahead of the reference recipe on dev. It would not have been kept" in text
    assert "comes next. It would have been kept if its dev lift were more than" in text
    assert "set aside" not in text and "value" not in text
