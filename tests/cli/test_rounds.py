"""Test commands on rounds: --round names one everywhere, `campaign` keeps within the budget, and `end` ends a campaign."""

import json
import subprocess
import sys

import pytest

from pipeline.__main__ import declared, main, parse
from pipeline.campaign import facts
from pipeline.campaign.log import Log
from pipeline.cli import round_display
from pipeline.rounds import freeze, meta
from pipeline.stats.design import Design
from tests.support.campaigns import OVERRIDES, frozen_campaign, publish, tree
from tests.support.paths import ROOT

TAKE_A_ROUND = {
    "status": [], "logs": ["a1"], "report": [], "cancel": [], "rerun": [], "close": [], "worker": ["a1"], "reference": [], "judge": [], "meta": [],
    "chain": [],
    "forward": [],
    "serve": [], "export": ["--to", "exports/x", "--as", "csv"],
}  # fmt: skip
NEED_IT = ("worker", "reference", "forward", "judge", "chain")


@pytest.fixture
def campaign(tmp_path):
    return frozen_campaign(tmp_path)


def closed(campaign):
    for number in range(8):
        publish(campaign.round("r0001"), f"a{number}")
    meta.close(campaign, campaign.round("r0001"))
    return campaign


def test_every_command_of_a_round_takes_it_by_the_same_option():
    parsers = {name: sub for group in declared()[1].groups.values() for name, sub in group.items()}
    assert {name for name, sub in parsers.items() if any(a.dest == "round" for a in sub._actions)} == set(TAKE_A_ROUND)
    for name, more in TAKE_A_ROUND.items():
        assert parse([name, "runs/x", "--round", "r0002", *more]).round == "r0002"
        assert parse([name, "runs/x", *more, "--round", "r0002"]).round == "r0002"


@pytest.mark.parametrize("name", NEED_IT)
def test_a_job_is_told_its_round(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([name, "runs/x", *TAKE_A_ROUND[name]])
    assert stop.value.code == 2 and "--round" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["status", "report", "cancel", "rerun", "close"])
@pytest.mark.parametrize("word", ["r1", "1", "r00001", "R0001", "../r0001"])
def test_a_misspelled_round_is_told_what_is_valid(campaign, name, word, capsys):
    before = tree(campaign.folder)
    assert main([name, str(campaign.folder), "--round", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ConfigError: --round {word} names no round. Valid: r and four digits, such as r0001")
    assert "frozen are r0000, r0001" in said
    assert tree(campaign.folder) == before


@pytest.mark.parametrize("name", ["worker", "reference", "meta"])
def test_a_job_of_a_misspelled_round_ends_with_the_same_sentence(campaign, name):
    command = [sys.executable, "-m", "pipeline", name, str(campaign.folder), "--round", "r1", *TAKE_A_ROUND[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "ConfigError: --round r1 names no round. Valid: r and four digits" in done.stderr


def test_a_round_that_is_not_frozen_is_told_which_are(campaign, capsys):
    assert main(["status", str(campaign.folder), "--round", "r0007"]) == 2
    assert "NotFound: round r0007 is not frozen. Frozen: r0000, r0001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (0, 2, "ConfigError: --rounds 0 runs no round. Valid: 1 to 8"),
        (-1, 2, "ConfigError: --rounds -1 runs no round. Valid: 1 to 8"),
        (9, 3, "Refused: article 4 (rounds_spent): --rounds 9 is more than the campaign's 8 rounds. Valid: 1 to 8"),
    ],
)
def test_a_campaign_runs_at_least_one_round_and_no_more_than_its_budget(tmp_path, number, code, said, capsys):
    assert main(["campaign", str(tmp_path / "new"), "--rounds", str(number), "experiment=smoke"]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_help_says_the_budget_of_the_constitution(capsys):
    with pytest.raises(SystemExit):
        main(["campaign", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"article 4, which is {facts.load_constitution().num_rounds} rounds" in said


def test_without_a_number_a_campaign_goes_on_to_its_budget(campaign, monkeypatch):
    monkeypatch.setattr("pipeline.cli.run_rounds.round_verb", lambda arguments: seen.append(arguments.overrides) or 7)
    seen: list[list[str]] = []
    assert main(["campaign", str(campaign.folder)]) == 7
    assert main(["campaign", str(campaign.folder), "--rounds", "2"]) == 7
    assert [words[-1] for words in seen] == ["campaign.rounds=0", "campaign.rounds=2"]


def test_an_open_campaign_cannot_end(campaign, capsys):
    assert main(["end", str(campaign.folder), "--dry-run"]) == 2
    assert "r0001 of smoke is not closed" in capsys.readouterr().err


def test_a_campaign_ends_by_a_command_of_its_own(campaign, capsys):
    before = tree(closed(campaign).folder)
    assert main(["end", str(campaign.folder), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "`end` would reveal the seeds of dev, board; no round follows" in said
    assert f"next: python -m pipeline audit {campaign.folder} --rescore" in said
    assert tree(campaign.folder) == before
    command = [sys.executable, "-m", "pipeline", "end", str(campaign.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "has ended and revealed the seeds of dev, board" in done.stdout
    records = Log(campaign.log).records()
    seeds = json.loads(campaign.seeds.read_text())
    assert [record["round"] for record in records if record["event"] == "end"] == ["r0001"]
    revealed = {record["name"]: record["seed"] for record in records if record["event"] == "reveal"}
    assert revealed["dev"] == seeds["dev"] and revealed["board"] == seeds["board"]


def test_closing_ends_no_campaign(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["close", "runs/x", "--end"])
    assert stop.value.code == 2


def test_a_new_campaign_of_so_many_rounds_has_error_rates_for_them_where_values_ship(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.cli.run_rounds.round_verb", lambda arguments: seen.append(arguments.overrides) or 7)
    seen: list[list[str]] = []
    for words in (["--rounds", "4"], ["--rounds", "8"], ["--rounds", "3"], ["--rounds", "4", "policy.rounds=8"]):
        assert main(["campaign", str(tmp_path / "new"), "experiment=demo", *words]) == 7
    assert [[word for word in words if word.startswith("policy.rounds")] for words in seen] == [
        ["policy.rounds=4"], [], [], ["policy.rounds=8"],
    ]  # fmt: skip
    assert capsys.readouterr().out.count("error rates are for the 4 rounds that this campaign runs") == 1


def test_what_was_frozen_is_said_with_its_price(campaign, capsys):
    frozen = facts.facts_of(campaign)
    assert frozen["confirmation"] == "running"
    lines = "\n".join(round_display.frozen_choices(frozen))
    assert "error rates are for a campaign of 8 rounds (policy.rounds)" in lines and "confirmed by running: " in lines
    assert "critical values: bounds" in lines and "bounds cost power" in lines and "ends after" not in lines
    demo = {
        **frozen,
        "design": Design(8, 8, 3, 100, 100, 0, 0).to_json(),
        "critical_source": "constitution/nulls/x: 5000",
    }
    (*others, last) = round_display.frozen_choices(demo, 4)
    assert "ship for 4 and 8 rounds of this design" in others[1] and others[2].endswith("x: 5000")
    assert "ends after round 4, and its error rates are for 8 rounds, so it will have spent 21 % of its level" in last
    final = {**demo, "confirmation": "final_round"}
    assert "its one test for claims, in the last round, never comes" in round_display.frozen_choices(final, 4)[-1]
    assert round_display.early_end(demo, 8) == round_display.early_end(demo, 0) == []
    assert set(frozen["settled"]) == {"tasks.engine", "parallelism.judge_tp"} and frozen["overrides"] == OVERRIDES
    assert freeze.frozen_words(frozen) == [*OVERRIDES, "parallelism.judge_tp=1", "tasks.engine=native"]
    one = {**demo, "design": {**demo["design"], "rounds": 1}}
    assert "no improvement can be claimed: that takes two rounds" in round_display.frozen_choices(one)
    assert main(["round", str(campaign.folder), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "of 8, plan " in said and lines in said
    assert "engine: native, because the site has no GPUs" in said and "a replica that decodes: 1 core, because" in said
    assert main(["round", str(campaign.folder), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frozen"]["confirmation"] == "running"
