"""Test that decisions follow from the log alone, even if records come late, are revised or are missing; golden files fix two campaigns."""

import json
import re
import sys
from dataclasses import asdict, replace
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import pytest

from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError, NotFound, Refused
from pipeline.campaign.records import Arm, Policy
from pipeline.claims import assess_claims
from pipeline.decision import decide, derive, family_states, history, plan
from pipeline.decision.evidence import Finalist
from pipeline.stats import overfit_test
from tests.support import logs
from tests.support.logs import HARD, LogCampaign, Truth, scripted
from tests.support.paths import GOLDEN

played = cache(scripted)


def position(records: list[dict], event: str, name: str) -> int:
    return next(n for n, record in enumerate(records) if (record["event"], record.get("round")) == (event, name))


def healthy(name: str, arm: Arm) -> Truth:
    return Truth()


def small(world: logs.World = healthy) -> LogCampaign:
    return LogCampaign(world, replace(logs.Design(), dev_items=100, fresh_items=100, submissions=2))


def derived_bytes(records: list[dict], name: str) -> bytes:
    found = derive.derive(records, name)
    return canonical.encoded([found.evidence.to_json(), asdict(found.decision), found.overrides])


@pytest.mark.parametrize("script", logs.SCRIPTS)
def test_scripted_campaigns_decide_as_the_golden_files_say(script):
    assert logs.decisions_text(played(script)) == (GOLDEN / f"decisions_{script}.json").read_text()


def caches() -> list[Any]:
    """The caches of every module that a decision is computed in."""
    ours = ("pipeline.stats.", "pipeline.claims.", "pipeline.decision.")
    found = [vars(module).values() for name, module in sys.modules.items() if name.startswith(ours)]
    return list({id(each): each for values in found for each in values if hasattr(each, "cache_clear")}.values())


@pytest.mark.parametrize("script", logs.SCRIPTS)
def test_what_earlier_looks_left_in_caches_changes_no_byte(script):
    """An audit derives all rounds in one process and in order, a meta stage one round in a new process."""
    records = played(script).records
    names = [record["round"] for record in records if record["event"] == "decision"]
    assert len(caches()) > 10

    def derived(name: str, is_new: bool) -> bytes:
        for each in caches() if is_new else ():
            each.cache_clear()
        return derived_bytes(records[: position(records, "decision", name)], name)

    alone = {name: derived(name, True) for name in names}
    assert {name: derived(name, False) for name in names} == alone  # after the last round
    derived(names[0], True)
    assert {name: derived(name, False) for name in names} == alone


def test_a_look_computes_for_its_own_round_what_does_not_change_later(monkeypatch):
    """A gap's covariances with those of earlier rounds, one for each pair, and the comparisons of one round's arms."""
    rounds, pairs, compared = 20, [], []
    covariance, worse_arms = overfit_test.covariance, assess_claims.worse_arms
    monkeypatch.setattr(overfit_test, "covariance", lambda *given: pairs.append(1) or covariance(*given))
    monkeypatch.setattr(assess_claims, "worse_arms", lambda *given: compared.append(given[1]) or worse_arms(*given))
    campaign = LogCampaign(
        healthy,
        replace(logs.Design(), rounds=rounds, dev_items=20, fresh_items=20, submissions=0, families=1),
        {"roman": 0.5},
    )
    for each in caches():
        each.cache_clear()
    for _ in range(rounds):
        campaign.play()
    assert len(pairs) == rounds * (rounds - 1) // 2
    assert compared == list(range(1, rounds + 1))


def test_the_scripts_come_through_every_state():
    seen = {
        state.name
        for script in logs.SCRIPTS
        for each in played(script).derived.values()
        for state in each.evidence.families.values()
    }
    assert seen == set(family_states.STATES)
    assert played("leaky").derived["r0004"].evidence.external == family_states.EXTERNAL_SUSPECT
    assert played("walk").derived["r0004"].evidence.external == family_states.EXTERNAL_CLEAR


def test_every_decision_follows_from_the_records_before_it():
    campaign = played("walk")
    for position, record in enumerate(campaign.records):
        if record["event"] == "decision":
            again = derive.derive(json.loads(json.dumps(campaign.records[:position])), record["round"])
            assert canonical.encoded(asdict(again.decision)) == canonical.encoded(record["decision"])


def test_what_comes_later_changes_no_earlier_decision():
    campaign = played("walk")
    at = next(
        n for n, record in enumerate(campaign.records) if record["event"] == "decision" and record["round"] == "r0002"
    )
    later = [
        record
        for record in campaign.records[at + 1 :]
        if record.get("round", "r0009") > "r0002" and record["event"] != "board_score"
    ]
    assert derived_bytes(campaign.records[:at] + later, "r0002") == derived_bytes(campaign.records[:at], "r0002")


def test_a_cheating_arm_is_not_kept_and_the_old_objective_runs_beside():
    second = played("leaky").derived["r0002"]
    assert {test.arm for test in second.evidence.look.verdict.arm_alarms} == {"a6"}
    assert any(
        "a6 is not kept: its dev runs ahead of its fresh in roman" in reason for reason in second.decision.reasons
    )
    assert second.decision.kept is None
    control = second.decision.policy.control
    assert control == (("recipe.lora.rank", "8"), ("recipe.clip_norm", "0.196"))
    third = next(r for r in played("leaky").records if r["event"] == "plan" and r["round"] == "r0003")["plan"]["arms"]
    assert [arm["overrides"] for arm in third if arm["role"] == "control"] == [[list(setting) for setting in control]]
    contrast = next(arm for arm in third if arm["role"] == "contrast")
    assert contrast["overrides"][-1] == ["recipe.mix.roman", "0.5"]
    assert any(
        "that dev's gain was learned items is" in reason for reason in played("leaky").derived["r0003"].decision.reasons
    )


def test_a_campaign_that_froze_max_dev_keeps_the_largest_dev_score_whatever_the_tests_say():
    greedy = LogCampaign(logs.leaky, logs.SCRIPTED, choice="max_dev")
    ours = played("leaky")
    right: dict[tuple[str, str], int] = {}
    for number in range(1, 5):
        derived = greedy.play()
        name, plan = derived.evidence.round, history.read_history(greedy.records).plans[derived.evidence.round]
        reference = next(run for run in derived.evidence.outcomes if run.arm == "reference")
        dev = {run.arm: sum(run.num_right("dev").values()) for run in derived.evidence.outcomes}
        right |= {(name, arm.name): dev[arm.name] - sum(reference.num_right("dev").values()) for arm in plan.arms}
        axes = [arm.name for arm in plan.arms if arm.role == "axis"]
        base = next((arm.name for arm in plan.arms if arm.replicate_of == "standing"), "reference")
        best = max(axes, key=lambda arm: dev[arm])
        assert derived.decision.kept == (best if dev[best] > dev[base] else None)
        assert derived.decision.winner == max(right, key=lambda each: right[each])
        policy = derived.decision.policy
        assert (policy.contrasts, policy.control, policy.repaired, policy.replicates) == ((), None, (), 0)
        if number == 1:  # the same runs give the same findings
            assert derived.evidence.families == ours.derived["r0001"].evidence.families
    second = greedy.derived["r0002"]
    assert {test.arm for test in second.evidence.look.verdict.arm_alarms} == {second.decision.kept}
    assert any("whatever the tests say (policy.choice=max_dev)" in reason for reason in second.decision.reasons)


def test_a_suspect_board_gets_no_more_submissions():
    campaign = played("leaky")
    of_round = [record["round"] for record in campaign.records if record["event"] == "submission"]
    assert set(of_round) == {"r0001", "r0002"}


def test_reversed_dev_is_replaced_and_restored_after_two_clean_looks():
    walk = played("walk").derived
    assert dict(walk["r0002"].decision.policy.repaired) == {family: "r0003" for family in (HARD, "equation", "gravity")}
    assert [walk[name].evidence.families["gravity"].name for name in walk] == [
        "UNPROVEN",
        family_states.OVERFIT,
        family_states.OVERFIT,
        family_states.RESTORED,
    ]


def test_without_a_target_nothing_is_trusted_and_nothing_submitted():
    campaign = LogCampaign(healthy, replace(logs.SCRIPTED, board_rows=0, submissions=0))
    for _ in range(2):
        found = campaign.play()
    assert {state.name for state in found.evidence.families.values()} == {family_states.UNPROVEN}
    assert found.evidence.look.power.threshold_total is None
    assert not any(record["event"] == "submission" for record in campaign.records)


def change_score(campaign: LogCampaign, **changes: object) -> list[dict]:
    """The records with the last score of the newest round changed after it was known."""
    last = next(record for record in reversed(campaign.records) if record["event"] == "board_score")
    before = next(n for n, r in enumerate(campaign.records) if r["event"] == "decision")
    return [*campaign.records[:before], {**last, **changes}]


def test_scores_may_be_revised_withdrawn_or_missing():
    campaign = small()
    campaign.play()
    board = history.read_history(campaign.records).scores["r0001"]
    arm = list(board)[-1]
    assert history.read_history(change_score(campaign, score="0.99")).scores["r0001"][arm] == Decimal("0.99")
    for gone in ({"withdrawn": True}, {"score": None, "why": "the target is down"}):
        records = change_score(campaign, **gone)
        assert arm not in history.read_history(records).scores["r0001"]
        assert derive.derive(records, "r0001").decision.state == "decided"
    without = [record for record in change_score(campaign) if record["event"] != "board_score"]
    found = derive.derive(without, "r0001")
    assert (found.evidence.board, found.decision.ladder) == ({}, "")


def test_a_late_score_counts_from_the_next_round_on():
    campaign = small()
    first = campaign.play()
    arm = derive.choose_submissions(history.read_history(campaign.records), "r0001")[0]
    late_arm = min({f"a{n}" for n in range(8)} - set(first.evidence.board["r0001"]))
    held = [record for record in campaign.records if record["event"] != "decision"]
    late = (
        {"event": "submission", "number": 5, "round": "r0001", "arm": late_arm, "purpose": "slot", "adapter_digest": "",
         "target": "local", "day": "2026-11-24"},
        {"event": "board_score", "number": 5, "score": "0.71"},
    )  # fmt: skip
    campaign.records += late
    second = campaign.play()
    assert late_arm not in first.evidence.board["r0001"] and arm in first.evidence.board["r0001"]
    assert second.evidence.board["r0001"][late_arm] == "0.71"
    assert derived_bytes(held, "r0001") == canonical.encoded(
        [first.evidence.to_json(), asdict(first.decision), first.overrides]
    )


def test_below_the_quorum_a_person_may_close():
    campaign = small(lambda name, arm: Truth(missing="diverged" if arm.index > 3 else ""))
    found = campaign.play()
    assert (found.decision.state, found.overrides) == ("undecided", None)
    campaign.add("by_hand", round="r0001")
    closed = derive.derive(campaign.records, "r0001")
    assert (closed.decision.state, closed.overrides["round"]) == ("closed", "r0002")
    frozen = history.read_history(campaign.records).plans["r0001"]
    assert closed.decision.policy == plan.with_tried(frozen.policy, frozen.arms), "the next round moves other axes on"


def test_axes_retire_while_enough_are_left_and_leave_their_slots_to_replicates():
    campaign = small(lambda name, arm: Truth(dict.fromkeys(logs.LEVELS, -0.05)) if arm.role == "axis" else Truth())
    for _ in range(6):
        found = campaign.play()
    retired = found.decision.policy.retired
    assert len(retired) == len(found.decision.policy.axes) - logs.RULES.least_axes
    last = next(r for r in reversed(campaign.records) if r["event"] == "plan")["plan"]["arms"]
    assert not {arm["axis"] for arm in last} & set(retired)
    assert sum(arm["role"] == "replicate" for arm in last) >= 3


def test_an_axis_without_values_left_gives_up_its_turn():
    campaign = small()
    spent = tuple(("recipe.trace_style", value) for value in ("short", "stepwise"))
    campaign.policy = replace(campaign.policy, dead_ends=spent)
    campaign.play()
    plan = campaign.records[1]["plan"]["arms"]
    assert "trace_style" not in {arm["axis"] for arm in plan}
    assert [arm["role"] for arm in plan].count("axis") == 6


def test_replicates_are_bought_while_retraining_moves_as_much_as_the_largest_gain():
    noisy = small(lambda name, arm: Truth({HARD: 0.35} if arm.role == "anchor" else {}))
    assert noisy.play().decision.policy.replicates == 1
    assert noisy.play().decision.policy.replicates == 2
    assert noisy.play().decision.policy.replicates == 2  # and no more
    roles = [arm["role"] for arm in next(r for r in reversed(noisy.records) if r["event"] == "plan")["plan"]["arms"]]
    assert roles.count("replicate") == 2
    assert small().play().decision.policy.replicates == 0


def test_a_dead_end_left_out_of_the_next_plan_is_refused():
    walk = played("walk")
    policy = walk.derived["r0002"].decision.policy
    assert policy.dead_ends, [list(found.decision.reasons) for found in walk.derived.values()]
    until = walk.records[: 1 + position(walk.records, "decision", "r0002")]
    derive.check_policy(until, "r0003", policy)
    for changed, code in (
        (replace(policy, dead_ends=()), "dead_end_removed"),
        (replace(policy, control=None, replicates=2), "policy_changed"),
    ):
        with pytest.raises(Refused) as refused:
            derive.check_policy(until, "r0003", changed)
        assert (refused.value.article, refused.value.code) == ("8", code)


def test_the_ladder_tells_a_score_only_when_it_beats_the_last_by_a_step():
    told = [decide.ladder({f"r{n}": {"a": score} for n, score in enumerate(scores)}, logs.RULES.ladder_step)
            for scores in ([], ["0.80"], ["0.80", "0.81"], ["0.80", "0.82"], ["0.80", "0.81", "0.83"], ["0.8", "0.5"])]  # fmt: skip
    assert told == ["", "0.80", "0.80", "0.82", "0.83", "0.8"]


def test_finalists_within_a_standard_error_go_by_their_own_alarms():
    def finalist(arm: str, value: str, *alarms: str) -> Finalist:
        return Finalist("r0001", arm, Decimal(value), Fraction(1, 10000), alarms)

    assert decide.winner(()) is None
    assert decide.winner((finalist("a3", "0.10", "roman"), finalist("a5", "0.09"))) == ("r0001", "a5")
    assert decide.winner((finalist("a3", "0.10", "roman"), finalist("a5", "0.08"))) == ("r0001", "a3")
    assert decide.winner((finalist("a3", "0.10"), finalist("a1", "0.099"))) == ("r0001", "a3")
    assert decide.winner((finalist("a1", "0.10"), finalist("a3", "0.10"))) == ("r0001", "a1")
    wide = (finalist("a3", "0.10", "roman"), finalist("a5", "0.08"))
    assert decide.winner(wide, Fraction(4)) == ("r0001", "a5")


def test_a_log_that_is_none_is_refused():
    with pytest.raises(IntegrityError, match="no campaign of this version"):
        derive.derive([], "r0001")
    with pytest.raises(NotFound, match="r0007 has no plan"):
        derive.derive(played("walk").records, "r0007")
    assert Policy.from_json(json.loads(canonical.encoded(asdict(played("walk").policy)))) == played("walk").policy


def test_evidence_is_written_without_floats_and_says_what_decided():
    for script in logs.SCRIPTS:
        for found in played(script).derived.values():
            look, written = found.evidence.look, json.loads(canonical.encoded(found.evidence.to_json()))["look"]
            assert "." not in re.sub(r'"[^"]*"', "", json.dumps(written))
            assert {arm: Decimal(text) for arm, text in written["values"].items()} == look.values
            assert [Fraction(test["gap"]) for test in written["verdict"]["gap_suspects"]] == [
                test.gap for test in look.verdict.gap_suspects
            ]
            assert Decimal(written["verdict"]["e_value"]) == look.verdict.e_value


def test_a_dead_end_that_a_late_arm_shows_is_kept_by_later_rounds():
    """r0002 was planned before the ruinous arm of r0001 arrived, so its plan does not know the dead end; its decision does."""
    campaign = small(lambda name, arm: Truth(dict.fromkeys(logs.LEVELS, -0.6) if arm.axis == "clip_norm" else {}))
    campaign.play()
    dead = campaign.derived["r0001"].decision.policy.dead_ends
    assert [key for key, _ in dead] == ["recipe.clip_norm"]
    campaign.policy = replace(campaign.policy, dead_ends=())  # as the plan was made before
    campaign.play()
    assert set(dead) <= set(campaign.derived["r0002"].decision.policy.dead_ends)


def test_nothing_is_claimed_while_the_reference_has_no_score_in_a_round():
    def gains(name, arm):
        better = dict.fromkeys(logs.LEVELS, 0.04)
        return Truth({} if arm.replicate_of == "reference" else better)

    campaign = small(gains)
    campaign.play()
    assert campaign.play().decision.claimed
    for record in campaign.records:
        if record["event"] == "outcome" and (record["round"], record["arm"]) == ("r0002", "reference"):
            record["outcome"] |= {"status": "failed", "exit_class": "judge_failed", "outcomes": {}}
    found = derive.derive(
        [r for r in campaign.records if (r["event"], r.get("round")) != ("decision", "r0002")], "r0002"
    )
    assert not found.decision.claimed
    assert "no score on the fresh items of r0002" in found.evidence.claims.improvement.not_evaluated
