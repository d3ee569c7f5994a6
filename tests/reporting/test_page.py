"""Test the text page of a decision: it follows from the log alone. (tests/pages tests its HTML.)"""

import json
from dataclasses import replace
from decimal import Decimal
from functools import cache

from pipeline.__main__ import main
from pipeline.campaign.log import Log
from pipeline.decision.history import read_history
from pipeline.pages import write
from pipeline.reporting import counterfactual, document, page, said
from pipeline.reporting.document import Section
from tests.support import example_page, logs
from tests.support.campaigns import frozen_campaign, publish
from tests.support.paths import ROOT

walk = cache(lambda: logs.scripted("walk", 3))
leaky = cache(lambda: logs.scripted("leaky", 3))


def shown(campaign: logs.LogCampaign, name: str) -> dict[str, Section]:
    return {section.title: section for section in page.of_log(campaign.records, name, "tiny")}


def test_it_says_what_was_seen_who_decided_what_was_refused_and_what_would_have_changed_it():
    found = shown(walk(), "r0002")
    assert list(found) == [
        "Decision of r0002", "Plan of the round", "Scores of the arms", "Results of the tests", "Scores of the external target",
        "Reasons by article", "Refusals and arms without a score", "What would have changed the decision", "Policy of the next round",
    ]  # fmt: skip
    assert found["Reasons by article"].lines == list(walk().derived["r0002"].decision.reasons)
    assert found["Plan of the round"].lines[0] == "The standing recipe, decided by r0001: recipe.lora.rank=8."
    assert found["Decision of r0002"].lines[1].startswith("Article 13: no human baseline")
    assert [row[0] for row in found["Scores of the arms"].table[1:]] == ["reference", *(f"a{n}" for n in range(8))]
    assert "standing recipe: recipe.lora.rank=16" in found["Policy of the next round"].lines
    would = found["What would have changed the decision"].lines
    assert would[0] == (
        "The value of a3 is 3.00 points above that of the standing recipe's run (a7). It would not have been kept if it were 3.00 points lower."
    )
    assert any(
        line.startswith("The largest value of the campaign so far is that of a2 of r0001: +5.76") for line in would
    )
    a3 = next(row for row in found["Scores of the arms"].table if row[0] == "a3")
    assert a3[-2:] == ["0.76", "+3.69"]
    assert shown(walk(), "r0001")["Refusals and arms without a score"].lines == ["a4 has no score: failed, diverged"]


def test_a_suspect_board_is_told():
    lines = shown(leaky(), "r0003")["What would have changed the decision"].lines
    assert "alarms of its own" not in lines[0] and "a3 comes nearest to being kept" in lines[0]
    assert "a6 is not kept: its dev runs ahead" in document.as_text(list(shown(leaky(), "r0002").values()))
    assert any("runs ahead of fresh items" in line for line in shown(leaky(), "r0002")["Reasons by article"].lines)


def test_what_comes_later_changes_only_what_became_of_the_submissions():
    campaign = walk()
    at = next(n for n, r in enumerate(campaign.records) if (r["event"], r.get("round")) == ("decision", "r0001"))
    then, now = (page.of_log(records, "r0001", "tiny") for records in (campaign.records[: at + 1], campaign.records))
    assert then == now


def test_report_shows_the_newest_decision_and_its_json_is_the_same(tmp_path, capsys):
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    for number in range(3):
        publish(folder, f"a{number}")
    assert main(["report", str(campaign.folder)]) == 0
    said = capsys.readouterr().out
    assert "r0001 is not decided yet: 3 of 8 arms have a score" in said and "next: python -m pipeline status" in said
    for number in range(8):
        publish(folder, f"a{number}", 30 if number == 2 else 20)
    from pipeline.rounds import meta

    meta.close(campaign, folder)
    assert write.write_pages(folder) == []
    for words in ((), ("--round", "r0001")):
        assert main(["report", str(campaign.folder), *words]) == 0
    said = capsys.readouterr().out
    assert "r0001 is decided; a2 is kept for now" in said and "The campaign has no external target" in said
    assert said.splitlines()[-1].startswith(f"next: python -m pipeline round {campaign.folder}    (with figures: ")
    assert main(["report", str(campaign.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["round"] == "r0001" and found["sections"][0]["lines"][0] == "r0001 is decided; a2 is kept for now"
    records = Log(campaign.log).records()
    assert folder.report.read_text() == write.round_page(records, folder)
    planned = next(section for section in page.of_round(records, folder) if section.title == "Plan of the round")
    assert planned.table[:2] == [
        ["LoRA target", "kind of layer", "layers", "modules"],
        ["q_proj", "attention", "2", "2"],
    ]
    assert next(part for part in found["sections"] if part["title"] == planned.title)["table"] == planned.table
    bare = [
        replace(each, table=[]) if each.title == planned.title else each for each in page.of_round(records, folder)[:-1]
    ]
    assert bare == page.of_log(records, "r0001", "tiny")


def test_a_model_with_a_human_baseline_is_not_fenced():
    found = page.of_log(walk().records, "r0001", "nemotron3_nano_30b")
    assert not any("Article 13" in line for line in found[0].lines)
    assert replace(found[0], title="x").lines == found[0].lines


def test_what_is_kept_claimed_set_aside_and_worse_is_told_apart_for_programs():
    walk_said = {name: said.as_json(walk().records, name) for name in ("r0001", "r0002", "r0003")}
    assert walk_said["r0001"]["shown_worse"] == ["recipe.clip_norm=0.14"] and not walk_said["r0001"]["claimed"]
    assert walk_said["r0003"]["set_aside"] == ["recipe.lora.alpha=16"]
    assert walk_said["r0002"]["kept_for_now"] == "recipe.lora.rank=16"
    claimed = [name for name, found in walk_said.items() if found["claimed"]]
    assert claimed and walk_said["r0001"]["claimed_in"] == claimed
    improvement = walk_said["r0002"]["improvement"]
    assert improvement["shown"] == (improvement["difference"] > improvement["noise_reaches"])
    worse = walk_said["r0003"]["worse_standing"]
    assert not worse["shown"] and worse["difference"] > 0, (
        "it is what is above the reference, not below it, in both comparisons"
    )
    assert 0 < worse["level"] < 0.05 and worse["student_t"] > 1
    assert json.loads(json.dumps(walk_said)) == walk_said


def test_a_round_that_decided_nothing_claims_nothing():
    """The runs of an undecided round may lie far above the reference's; its page is silent about them."""
    campaign = logs.LogCampaign(
        lambda name, arm: logs.Truth(
            {} if arm.replicate_of == "reference" else dict.fromkeys(logs.LEVELS, 0.04),
            missing="diverged" if name == "r0003" and arm.role == "axis" else "",
        ),
        logs.Design(rounds=4, submissions=2),
    )
    for _ in range(3):
        campaign.play()
    assert campaign.derived["r0002"].decision.claimed
    last = page.of_log(campaign.records, "r0003", "tiny")
    text = document.as_text(last)
    assert "r0003 is undecided" in text and "An improvement is claimed" not in text
    assert "An improvement was claimed in r0002; that stands, whatever later rounds claim." in text
    why = said.as_json(campaign.records, "r0003")["improvement"]["not_evaluated"]
    assert why.startswith("nothing is decided (article 3: 2 of 8 arms have a score") and f"because {why}." in text


def test_the_last_round_speaks_of_no_next_one_and_a_final_round_without_a_standing_recipe_says_so():
    """One campaign whose last round keeps something, and one that confirms at the end and never kept anything."""
    campaign = logs.LogCampaign(
        lambda name, arm: logs.Truth(dict.fromkeys(logs.LEVELS, 0.04) if arm.axis == "lora_rank" else {}),
        logs.Design(rounds=2, submissions=2),
    )
    for _ in range(2):
        campaign.play()
    text = document.as_text(page.of_log(campaign.records, "r0002", "tiny"))
    kept = campaign.derived["r0002"].decision.kept
    assert f"r0002 is decided; {kept} is worth most, and no round follows that could test it" in text
    assert "No round follows" in text and "kept for now" not in text and "further runs" not in text

    never = logs.LogCampaign(lambda name, arm: logs.Truth(), logs.Design(rounds=2, submissions=2))
    never.records[0]["facts"]["confirmation"] = "final_round"
    for _ in range(2):
        never.play()
        never.policy = replace(never.policy, standing=())
    last = shown(never, "r0002")
    plan = "\n".join(last["Plan of the round"].lines)
    assert (
        "if an earlier round kept something, the last round moves no axis" in plan
        and "Axes that this round moves" in plan
    )
    assert "No earlier round kept anything, so there is no standing recipe to confirm" in plan
    why = "no earlier round kept anything, so the standing recipe is the reference recipe"
    assert f"No improvement can be claimed in this round: {why}." in last["Decision of r0002"].lines


def test_the_page_that_is_explained_is_the_one_that_the_code_makes():
    made = {line.rstrip() for line in example_page.text().splitlines()}
    shown = [
        line[4:].rstrip()
        for line in (ROOT / "docs/report.md").read_text().splitlines()
        if line.startswith("    ") and not line.startswith("    python -m pipeline")
    ]
    lora = [line for line in shown if line.split()[0] in ("LoRA", "q_proj", "in_proj")]
    assert len(lora) == 3 and len(shown) > 40
    assert not [line for line in shown if line not in made and line not in lora]


def test_an_edited_arm_above_the_kept_one_is_named_and_no_other_verdict_is_promised_of_it():
    """Article 16: its score belongs to no setting, so nothing that it could have would set one aside."""
    campaign = walk()
    plain, plan = campaign.derived["r0002"], read_history(campaign.records).plans["r0002"]
    arms = {arm.name: arm for arm in plan.arms}
    look = plain.evidence.look
    assert look is not None and plain.decision.kept == "a3" and arms["a2"].role == "axis"
    outcomes = tuple(replace(each, edited=each.arm == "a2") for each in plain.evidence.outcomes)
    for value, is_above in ((look.values["a3"] + Decimal("0.01"), True), (look.values["a3"] - Decimal("0.01"), False)):
        changed = replace(look, values={**look.values, "a2": value})
        edited = replace(plain, evidence=replace(plain.evidence, outcomes=outcomes, look=changed))
        choice = [each for each in counterfactual.of_choice(edited, arms, logs.RULES, "value") if each.startswith("a2")]
        assert bool(choice) == is_above
        if is_above:
            assert (
                "a2, which ran edited code, has a larger value (+4.69 points) than a3, which is kept (+3.69 points)"
                in choice[0]
            )
        lines = counterfactual.of_arms_and_families(edited, arms, plan, logs.RULES, "value")
        assert not any(line.startswith("a2 ") for line in lines)
        assert any(
            line.startswith("a2 ")
            for line in counterfactual.of_arms_and_families(plain, arms, plan, logs.RULES, "value")
        )
