"""Test the HTML pages: nothing of the text page is missing, all that can happen is shown, hostile text stays text, and files may be damaged."""

import argparse
import json
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError, NotFound
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.cli import job_stages
from pipeline.decision import family_states
from pipeline.pages import arms, figures, glossary, html, numbers, overview, page, story, write
from pipeline.pages.chart import numbered, scale, spread, ticks
from pipeline.pages.page import Source
from pipeline.pages.parts import Part, Rows, with_anchors
from pipeline.reporting import page as text_page
from pipeline.reporting.document import Section
from pipeline.rounds import chain
from pipeline.rounds.init import freeze_code
from tests.support import decided, logs, pictures, told
from tests.support.campaigns import frozen_campaign, tree
from tests.support.paths import ROOT
from tests.support.told import Read

walk = cache(lambda: logs.scripted("walk", 3))
leaky = cache(lambda: logs.scripted("leaky", 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return told.reversal(tmp_path_factory.mktemp("told") / "reversal", rounds=3)


def plain(text: str) -> str:
    return " ".join(text.split())


def of_round(campaign: logs.LogCampaign, name: str) -> Read:
    return Read(page.of_round(Source(campaign.records, "walk", "tiny"), name))


@pytest.mark.parametrize("campaign", [walk, leaky, told.everything])
def test_no_sentence_and_no_cell_of_the_text_page_is_missing(campaign):
    name = sorted(campaign().derived)[-1]
    read = of_round(campaign(), name)
    cells = {plain(cell) for row in read.rows for cell in row}
    for section in text_page.of_log(campaign().records, name, "tiny"):
        for line in section.lines:
            assert plain(line) in read.text, (section.title, line)
        for row in section.table:
            assert {plain(cell) for cell in row} <= cells | {""}, (section.title, row)


def test_a_campaign_s_page_tells_every_round_in_full():
    read = Read(page.of_campaign(Source(walk().records, "walk", "tiny")))
    for name in walk().derived:
        for section in text_page.of_log(walk().records, name, "tiny"):
            for line in section.lines:
                assert plain(line) in read.text, (name, section.title, line)


def test_every_state_every_refusal_and_every_article_is_shown():
    """A new state, refusal or article fails here until the scripted campaign has it and the page shows it."""
    read = Read(page.of_campaign(Source(told.everything().records, "everything", "tiny")))
    cells = {cell for row in read.rows for cell in row}
    for state in (*family_states.STATES, family_states.EXTERNAL_CLEAR, family_states.EXTERNAL_SUSPECT):
        assert any(cell.split(" (")[0] == overview.with_sign(state) for cell in cells), state
    assert len(told.refusal_codes()) > 50
    for code, article in told.refusal_codes().items():
        assert f"article {article} ({code}): refused as {code}" in read.text, code
    for number, article in logs.RULES.articles.items():
        assert f"article-{number}" in read.ids and plain(article["text"]) in read.text, number


def test_links_stay_on_the_page_and_lead_somewhere():
    for text in (
        page.of_campaign(Source(told.everything().records, "all", "tiny")),
        page.of_round(Source(walk().records, "w", "tiny"), "r0001"),
    ):
        read = Read(text)
        assert len(read.ids) == len(set(read.ids))
        assert {link[0] for link in read.links} == {"#"} and {link[1:] for link in read.links} <= set(read.ids)
        assert read.headings[0] == 1 and read.headings.count(1) == 1
        assert all(after - before <= 1 for before, after in zip(read.headings, read.headings[1:], strict=False))
        assert not [tag for tag, found in read.tags if tag in ("script", "img", "link", "iframe") or "src" in found]
        assert not re.search(r"@import|url\(|https?:", text)
        assert all(found.get("scope") for tag, found in read.tags if tag == "th")
        charts = [found for tag, found in read.tags if tag == "svg"]
        assert charts and all(found.get("aria-label") or found.get("aria-hidden") for found in charts)


def test_every_word_of_the_page_s_glossary_is_one_of_the_glossary():
    known = set(re.findall(r"^### (.*)$", (ROOT / "docs/glossary.md").read_text(), re.M))
    assert set(glossary.TERMS) <= known
    with pytest.raises(KeyError, match="nonsense"):
        html.prose("[[nonsense]]")


def test_hostile_text_stays_text():
    bad = '<script>alert(1)</script>\x1b[2J\u202e"onload=x ' + "w" * 300
    campaign = logs.LogCampaign(
        lambda name, arm: logs.Truth(missing=bad if arm.index == 3 else ""), logs.Design(rounds=4, submissions=2)
    )
    campaign.play()
    campaign.add("refusal", round="r0001", number=0, slot=1, article="14", code="not_json", what=bad)
    text = page.of_round(Source(campaign.records, bad, bad), "r0001")
    assert "<script>" not in text and "&lt;script&gt;" in text and "\x1b" not in text and "\u202e" not in text
    assert "\\u001b[2J\\u202e" in text
    names = {name for tag, found in Read(text).tags for name in found}
    assert not [name for name in names if name.startswith("on")]
    sections = [Section(bad, [bad], [[bad], [bad]]), Section(f"{bad} 2", [bad], [[bad], [bad]])]
    assert "<script>" not in page.of_sections(sections)
    compared = page.of_sections([Section("A", ["by article 7"]), Section("B", ["article 99"], [["a"], ["article 7"]])])
    assert "article 99" in compared and not [link for link in Read(compared).links if link.startswith("#article")]
    assert "[[gap]]" in str(html.said("[[gap]]")) and "<a" not in str(html.said("[[gap]]"))


@pytest.mark.parametrize("name", ["r0001", "r0003"])
def test_the_numbers_are_those_of_the_evidence(name):
    for campaign in (walk(), leaky()):
        at = next(each for each in numbers.rounds_of(campaign.records) if each.name == name)
        evidence = campaign.derived[name].evidence
        assert evidence.look is not None
        verdict, findings = evidence.look.verdict, at.findings()
        for what, tests in (("alarm", verdict.gap_alarms), ("suspicion", verdict.gap_suspects)):
            named = {
                each.about
                for each in findings
                if each.what == "gap" and (each.result == what or what == "suspicion" and each.result == "alarm")
            }
            assert {test.family for test in tests} == named
        for each in findings:
            if each.result == "alarm":
                assert each.size > 1 or each.what == "arm", each
            elif each.result == "suspicion":
                assert each.suspect is not None and each.suspect < each.size, each
        for test in verdict.arm_alarms:
            assert any(each.about == f"{test.arm} in {test.family}" and each.size > 1 for each in findings)
        for run in evidence.outcomes:
            if run.scored("dev"):
                right, number = run.right("dev")
                found = at.score(run.arm, "dev")
                assert (
                    found
                    and abs(found.value - right.bit_count() / number) < 1e-12
                    and found.low < found.value < found.high
                )
        printed = {(at, arm): score for at, scores in evidence.board.items() for arm, score in scores.items()}
        for one in at.predicted():
            assert one.words == f"{one.printed:.2f}" == printed[one.round, one.arm]


def test_a_predicted_score_is_that_of_the_board_test_s_model():
    """Where nothing is wrong, what is printed lies within two standard deviations of the prediction nearly always."""
    quiet = told.with_design(lambda name, arm: logs.Truth(dict.fromkeys(logs.LEVELS, 0.02 * (arm.index - 3))), 4)
    found = numbers.rounds_of(quiet.records)[-1].predicted()
    assert len(found) >= 6
    assert sum(abs(one.printed - one.predicted) <= 2 * one.spread for one in found) >= len(found) - 1


def test_the_story_names_the_decision_its_article_and_its_reason():
    at = numbers.rounds_of(walk().records)[1]
    stands, decided_words, why = story.of_round(at, "walk", "tiny")
    assert stands.startswith("This is round 2 of 4 of the campaign walk, which trains the model tiny")
    fresh = [f"{100 * at.score(arm, 'fresh').value:.1f} %" for arm in ("a3", "reference")]
    assert decided_words.startswith(
        f"Of 8 arms with a score, a3 (recipe.lora.rank=16) is kept for now, with {fresh[0]} of the fresh puzzles right where the reference "
        f"adapter has {fresh[1]}, and the tests raise the alarm: dev of"
    )
    assert why.startswith("Article 7 decided it: a3 is worth most, 3.00 points more than")
    for campaign in (walk(), leaky(), told.everything()):
        for each in numbers.rounds_of(campaign.records):
            reason = story.deciding_reason(each.derived.decision.reasons, each.derived.decision.kept)
            assert "kept" in reason or "worth most" in reason, reason


def test_a_campaign_s_page_tells_what_happened_in_each_round():
    rounds = numbers.rounds_of(told.everything().records)
    lines = {part.title: part.lines for part in story.by_round(rounds).parts}
    for at in rounds:
        reasons, states = at.derived.decision.reasons, at.derived.evidence.families
        same = {f"article 9: dev of {family} is {state.name} ({state.code})" for family, state in states.items()}
        followed = [each for each in reasons if each.startswith("article 9: ") and each not in same]
        assert [each for each in lines[at.name] if each.startswith("article 9: ")] == followed
        assert story.deciding_reason(reasons, at.derived.decision.kept) in lines[at.name]
        assert ("An improvement is claimed (article 7)." in lines[at.name]) == at.derived.decision.claimed
    assert (
        "text_cipher was TRUSTED and is SUSPECT (gap_suspect); its dev score does not count in the choice of an arm."
        in lines["r0003"]
    )
    assert "gravity was REVERSED-overfit and is RESTORED (repaired); its dev score counts again." in lines["r0004"]
    assert lines["r0003"][0].startswith("Alarm: a4 (recipe.lora.rank=8) runs further ahead on dev of text_cipher than")
    shares = {
        who: [f"{100 * rounds[2].score(who, of).value:.1f} %" for of in ("dev", "fresh")] for who in ("a4", "reference")
    }
    assert lines["r0003"][-1] == (
        f"Ahead on dev is a4 (recipe.lora.rank=8), with {' and '.join(shares['a4'])} right on dev and fresh, where the reference adapter has "
        f"{' and '.join(shares['reference'])}."
    )
    text = page.of_campaign(Source(told.everything().records, "everything", "tiny"))
    assert text.index("What happened, round by round</h2>") < text.index("Scores by round</h2>")


def test_a_campaign_that_goes_by_dev_is_told_so():
    """Its tests alarm, and nothing follows: no dev score stops counting, and the arm ahead on dev is the one that is kept."""
    greedy = logs.LogCampaign(logs.walk, logs.SCRIPTED, choice="max_dev")
    for _ in range(3):
        greedy.play()
    part = story.by_round(numbers.rounds_of(greedy.records))
    assert part.lines[0].startswith("What is kept follows policy.choice=max_dev: ")
    assert "nothing follows from a state" in overview.states(numbers.rounds_of(greedy.records)).how[0]
    lines = [line for each in part.parts for line in each.lines]
    assert any("and is REVERSED-overfit (gap_alarm)." in line for line in lines)
    assert not any("does not count" in line for line in lines)
    for each, at in zip(part.parts, numbers.rounds_of(greedy.records), strict=True):
        assert at.derived.decision.kept is None or not any(line.startswith("Ahead on dev") for line in each.lines)


def test_the_story_says_since_when_a_dev_score_does_not_count_and_what_would_go_out():
    at = numbers.rounds_of(told.everything().records)[2]
    stands, decided_words, _ = story.of_round(at, "everything", "tiny")
    name, arm = at.derived.decision.winner
    assert f"; the best arm so far, which would go out now, is {arm} of {name}" in stands
    assert "gravity (REVERSED-overfit since r0002) and text_cipher (SUSPECT) do not count any more" in decided_words
    last = numbers.rounds_of(told.everything().records)[-1]
    assert "from which further rounds start" in stands
    assert "from which further rounds start" not in story.of_round(last, "x", "y", has_ended=True)[0]


def test_new_dev_items_a_slice_and_a_finalist_s_board_score_are_told():
    campaign = logs.LogCampaign(told.everything_world, logs.SCRIPTED)
    for _ in range(3):
        campaign.play()
    limits = {"gravity": {"g": {"low": "5", "high": "7.5"}}}
    campaign.add("basis", round="r0003", tasks={"dev_slices": limits})
    before = [numbers.rounds_of(campaign.records), page.of_round(Source(campaign.records, "x", "tiny"), "r0003")]
    unsent = next(
        (at, arm.name)
        for at in before[0]
        for arm in at.plan.arms
        if arm.role == "axis" and at.score(arm.name, "board") is None
    )
    number = 1 + sum(record["event"] == "submission" for record in campaign.records)
    sent = {"number": number, "round": unsent[0].name, "arm": unsent[1], "purpose": "finalist"}
    campaign.add("submission", **sent, adapter_digest="", target="local", day="2026-11-24")
    campaign.add("board_score", number=number, score="0.61")
    at = next(each for each in numbers.rounds_of(campaign.records) if each.name == unsent[0].name)
    assert at.score(unsent[1], "board") is None and at.score_so_far(unsent[1], "board").value == pytest.approx(0.61)
    assert at.score_so_far(unsent[1], "dev") == at.score(unsent[1], "dev")
    assert numbers.rounds_of(campaign.records, "r0003")[0].finals == {}
    text = Read(page.of_campaign(Source(campaign.records, "x", "tiny"))).text
    assert "Dev of gravity was declared as a slice of its puzzles (g from 5 to 7.5)" in text
    assert "Dev items of gravity are new from r0003 on, because its dev was reversed" in text


def test_an_undecided_round_and_one_without_any_score_have_pages(tmp_path):
    campaign = Campaign.at(told.failed(tmp_path / "failed"))
    for text in (
        write.round_page(Log(campaign.log).records(), campaign.round("r0001")),
        write.campaign_page(Log(campaign.log).records(), campaign),
    ):
        read = Read(text)
        assert "Nothing is decided yet: 2 of 8 arms have a score" in read.text
        assert "a1 has no score: failed, out_of_memory" in read.text and "the loss is not finite" in read.text
    nothing = logs.LogCampaign(lambda name, arm: logs.Truth(missing="crashed"), logs.Design(rounds=4, submissions=2))
    nothing.play()
    assert "There is no chart of evidence, because the tests did not run" in of_round(nothing, "r0001").text


def test_the_same_log_gives_the_same_bytes_and_what_comes_later_changes_no_earlier_page(folder):
    campaign = Campaign.at(folder)
    records = Log(campaign.log).records()
    before = tree(folder)
    pages = [write.round_page(records, each) for each in campaign.frozen_rounds() if each.number] + [
        write.campaign_page(records, campaign)
    ]
    assert pages == [write.round_page(records, each) for each in campaign.frozen_rounds() if each.number] + [
        write.campaign_page(records, campaign)
    ]
    at = next(n for n, r in enumerate(records) if (r["event"], r.get("round")) == ("plan", "r0002"))
    assert write.round_page(records[:at], campaign.round("r0001")) == pages[0]
    assert tree(folder) == before
    read = Read(pages[-1])
    assert (
        "failed: diverged" in read.text and "Waiting in the queue" in read.text and "Training loss of a2" in pages[-1]
    )


def test_a_damaged_file_costs_only_its_figure(tmp_path):
    campaign = decided.decided_campaign(tmp_path)
    good = write.round_page(Log(campaign.log).records(), campaign.round("r0001"))
    assert "Training loss of a0" in good and "Training loss of a2" in good
    attempt = campaign.round("r0001").folder / "a2" / "attempt_01"
    (attempt / "phases.jsonl").write_bytes(b"\xff\xfe broken\n")
    text = write.round_page(Log(campaign.log).records(), campaign.round("r0001"))
    assert "Training loss of a0" in text and "Training loss of a2" not in text
    read = Read(text)
    assert "The training curve of a2 is not shown, because its files cannot be read (" in read.text
    assert "The cost of a2 is not shown" in read.text
    for other in ("[1]\n3\n", '{"phase": "train", "at": "noon"}\n{"phase": 1}\n'):
        (attempt / "phases.jsonl").write_text(other)
        read = Read(write.round_page(Log(campaign.log).records(), campaign.round("r0001")))
        assert "The cost of a2 is not shown" in read.text
    campaign.round("r0001").config.write_text("model: [")
    with pytest.raises(Exception, match="parsing"):
        write.round_page(Log(campaign.log).records(), campaign.round("r0001"))
    lines = write.write_pages(campaign.round("r0001"))
    assert len(lines) == 2 and all("could not be written" in line for line in lines)


def test_neither_a_fifo_nor_a_file_of_any_size_keeps_a_page_from_its_end(tmp_path):
    """A meta stage writes pages before it ends, so nothing that lies in an arm's folder may stop it."""
    campaign = decided.decided_campaign(tmp_path)
    folder = campaign.round("r0001")
    with open(folder.folder / "a0" / "attempt_00" / "progress.jsonl", "w") as huge:
        huge.truncate(arms.MOST_BYTES + 1)
    for name in ("progress.jsonl", "phases.jsonl"):
        path = folder.folder / "a2" / "attempt_01" / name
        path.unlink()
        os.mkfifo(path)
    read = Read(write.round_page(Log(campaign.log).records(), folder))
    assert "a0 is not shown, because its training wrote 32 MB of lines; a page reads at most 32 MB." in read.text
    assert "The training curve of a2 is not shown, because its files cannot be read (OSError)" in read.text
    assert "The cost of a2 is not shown" in read.text


def test_a_training_that_writes_any_number_costs_only_its_points(tmp_path):
    campaign = decided.decided_campaign(tmp_path)
    place = campaign.round("r0001").folder / "a0" / "attempt_00" / "progress.jsonl"
    losses = [1e308, -1e308, 1e-300, 2.5, 2.5, 0.0]
    steps = [
        {**line, "step": 2**52 + n, "loss": loss}
        for n, (line, loss) in enumerate(zip(decided.steps(1, 6), losses, strict=True))
    ]
    place.write_text("".join(json.dumps(line) + "\n" for line in [decided.start(), *steps]))
    text = write.round_page(Log(campaign.log).records(), campaign.round("r0001"))
    assert "2 of 6 steps of a0 are not drawn, because their loss is beyond 1,000,000." in Read(text).text
    assert "Training loss of a0" in text and not re.search(r"[ \",](nan|-?inf)[,\" ]", text)


def test_agents_have_their_section_beside_their_arms():
    at = numbers.rounds_of(walk().records)[0]
    section = Section("Agents", ["Agents ran 1 arms."], [["arm", "ended"], ["a1", "agent_watchdog"]])
    found = arms.part(at, Section("Scores of the arms", [], [["arm"], ["a0"]]), section, None, walk().records)
    assert [(each.title, each.lines, each.rows[0].table) for each in found.parts] == [
        ("Agents", section.lines, section.table)
    ]


def test_a_campaign_without_a_gathered_round_has_no_page_yet(tmp_path, capsys):
    campaign = frozen_campaign(tmp_path)
    assert main(["report", str(campaign.folder), "--campaign"]) == 0
    assert "r0001 is not decided yet: 0 of 8 arms have a score" in capsys.readouterr().out
    assert not campaign.report.exists()
    with pytest.raises(NotFound, match="no meta stage has gathered a round yet"):
        write.campaign_page(Log(campaign.log).records(), campaign)


def test_report_writes_the_page_of_a_round_and_of_the_campaign(tmp_path, capsys):
    campaign = decided.decided_campaign(tmp_path)
    words = ["report", str(campaign.folder)]
    assert main([*words, "--html", str(tmp_path / "one.html")]) == 0
    assert (tmp_path / "one.html").read_text() == write.round_page(Log(campaign.log).records(), campaign.round("r0001"))
    assert main([*words, "--campaign"]) == 0
    assert f"next: open {campaign.report} in a browser" in capsys.readouterr().out
    assert main([*words, "--campaign", "--html", str(tmp_path / "all.html")]) == 0
    assert (tmp_path / "all.html").read_text() == campaign.report.read_text()
    for wrong in (
        ["--campaign", "--json"],
        ["--campaign", "--round", "r0001"],
        ["--html", str(campaign.folder / "log.jsonl")],
    ):
        assert main([*words, *wrong]) == 2
    assert json.loads(campaign.log.read_text().splitlines()[0])["event"] == "init"


def test_the_meta_job_writes_pages_once_the_next_round_is_submitted(tmp_path, monkeypatch):
    """The stage that decides leaves them out, and what follows an undecided round or a failed submission has them too."""
    campaign, order = decided.decided_campaign(tmp_path), []
    folder = campaign.round("r0001")

    def started(command: list[str], **given: object) -> object:
        order.append("meta without pages" if "--no-pages" in command else "meta with pages")
        return SimpleNamespace(wait=lambda: 0)

    def submitted(*given: object) -> str:
        order.append(f"next round, pages: {folder.report.exists() or campaign.report.exists()}")
        raise ConfigError("nothing more is submitted")

    monkeypatch.setattr(job_stages.subprocess, "Popen", started)
    monkeypatch.setattr(chain, "chain", submitted)
    monkeypatch.setattr(chain, "preload_next_round", lambda *given: None)
    arguments = argparse.Namespace(campaign=campaign.folder, round="r0001", meta=True, asked=[])
    with pytest.raises(ConfigError, match="nothing more"):
        job_stages.chain_verb(arguments)
    assert order == ["meta without pages", "next round, pages: False"]
    assert folder.report.exists() and campaign.report.exists()


def test_a_campaign_s_frozen_code_carries_the_templates(tmp_path):
    code = tmp_path / freeze_code(tmp_path)[:16] / "pipeline" / "pages" / "templates"
    assert {path.name for path in code.iterdir()} >= {"page.html", "macros.html", "style.css"}


def test_axes_ticks_and_labels():
    for low, high in ((0.0, 1.0), (-0.031, 0.052), (0.6, 0.85), (0.3, 2.2), (1e-9, 2e-9), (-5.0, 1000.0), (0.7, 0.703)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 6 and low - 1e-9 <= min(found) <= max(found) <= high + 1e-9
        assert len({numbered(found, 100)(value) for value in found}) == len(found), "no two ticks have one word"
    assert [numbered([0.7, 0.75])(value) for value in (0.7, 0.75)] == ["0.70", "0.75"]
    assert [numbered([-0.02, 0.0], 100, "+")(value) for value in (-0.02, 0.0)] == ["-2", "0"]
    assert ticks(0.5, 0.5) == [0.5] and scale(2, 2, 0, 10)(2) == 5
    places = spread([5.0, 5.0, 5.0, 90.0], 10, 0, 100)
    assert places == [5.0, 15.0, 25.0, 90.0]
    assert spread([99.0, 99.0], 10, 0, 100) == [90.0, 100]
    assert figures.families({"roman": (0.0, 0.0)}, "r0001") and not figures.families({}, "r0001")
    parts = [Part("One", rows=[Rows("x", [["a"]])]), Part("One", rows=[Rows("x", [["a"]])])]
    with_anchors(parts)
    assert [each.anchor for each in parts] == ["one", "one-2"] and parts[1].rows[0].anchor == "table-x-2"
    assert Rows("x", [["a", "b"], ["q", "1.5"], ["r", "-"]]).numeric == [False, True]


def test_a_campaign_without_a_board_is_not_told_how_to_read_its_scores():
    alone = logs.LogCampaign(logs.walk, logs.Design(rounds=4, board_rows=0, submissions=0))
    alone.play()
    part = overview.board(numbers.rounds_of(alone.records)[0])
    assert not part.how and part.missing == [
        "There is no chart of board scores, because the campaign has no external target."
    ]
    assert overview.board(numbers.rounds_of(walk().records)[0]).how


def test_the_name_of_an_upright_axis_stands_above_its_numbers():
    """A highest tick at the very top, as where nothing differs, was printed over the name."""
    at = numbers.rounds_of(walk().records)[1]
    for chart in (figures.families({"roman": (0.0, 0.0)}, "r0001"), figures.predicted(at.predicted())):
        texts = [mark for mark in chart.marks if mark.mark == "text"]
        name = next(mark for mark in texts if mark.text in ("lift on fresh, points", "printed board score"))
        assert min(mark.y for mark in texts if mark.anchor == "end") - name.y >= 14, chart.title


def test_the_picture_of_the_readme_is_small():
    content = pictures.PICTURE.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) <= pictures.MOST_BYTES
