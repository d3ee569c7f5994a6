"""Test the commands of `board`: what they print, what they write, and which command they name next."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign import facts
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.decision import board_submissions, submission_caps
from pipeline.decision.submission_caps import Caps
from pipeline.execution import adapter
from pipeline.external import board_log, outbox
from pipeline.rounds import freeze
from pipeline.rounds.init import init
from tests.support.campaigns import tree
from tests.support.paths import ROOT

CAPS = Caps(per_day=4, per_campaign=10, held_back=2, reference=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose meta job leaves what a login node sends, with one reservation and its files."""
    campaign = Campaign.at(tmp_path_factory.mktemp("verbs") / "made")
    overrides = ["experiment=smoke", "external=kaggle", "external.push=login", "external.competition=some-competition"]
    init(campaign, overrides)
    attempt = freeze.freeze(campaign, "r0001", overrides).claim_attempt("a1")
    write_file(attempt.adapter_dir / adapter.WEIGHTS, "weights")
    write_file(attempt.adapter_dir / adapter.CONFIG, "{}")
    digest = adapter.kept_digest(attempt.adapter_dir)
    write_file(attempt.sealed, json.dumps({"adapter_digest": digest}))
    board_log.reserve(campaign, "r0001", "a1", "slot", digest, board_log.utc_day(), caps=CAPS, target="kaggle")
    [one] = board_submissions.submissions_in(Log(campaign.log).records())
    outbox.add(campaign, {"campaign": "made-0a1b2c3d"}, one, lambda kept, archive: archive.write_bytes(b"PK"))
    return campaign.folder


@pytest.fixture
def campaign(made, tmp_path, monkeypatch) -> Campaign:
    monkeypatch.setattr(submission_caps, "caps_of", lambda article, target: CAPS)
    return Campaign.at(shutil.copytree(made, tmp_path / "mine"))


def board_of(campaign: Campaign, act: str, *words: str) -> int:
    return main(["board", act, str(campaign.folder), *words])


def test_status_shows_the_ledger_what_is_left_and_what_comes_next(campaign, capsys):
    assert board_of(campaign, "status") == 0
    said = capsys.readouterr().out
    assert f"submissions left: 3 on {board_log.utc_day()}, 7 in the campaign, and 2 for finalists" in said
    assert "   1  r0001  a1         slot" in said and "reserved" in said
    assert said.splitlines()[-1] == f"next: python -m pipeline board push {campaign.folder}"
    assert board_of(campaign, "score", "1", "0.84") == 0
    capsys.readouterr()
    assert board_of(campaign, "status", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "kaggle" and found["left"] == {"day": 3, "campaign": 7, "finalists": 2}
    assert [(one["number"], one["state"], one["score"]) for one in found["submissions"]] == [(1, "scored", "0.84")]


def test_looking_writes_nothing(campaign, capsys):
    before = tree(campaign.folder)
    for words in (("status",), ("status", "--json"), ("push", "--dry-run"), ("score", "1", "0.5", "--dry-run")):
        assert board_of(campaign, *words) == 0
    assert tree(campaign.folder) == before
    assert "would: send number 1 (r0001/a1, slot)" in capsys.readouterr().out


def test_push_sends_once_and_takes_the_score(campaign, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setenv("PATH", f"{ROOT / 'tests' / 'standins'}:{os.environ['PATH']}")
    for _ in range(2):
        assert board_of(campaign, "push") == 0
    [row] = json.loads((tmp_path / "list.json").read_text())
    assert row["description"].split()[1] == "0001"
    (tmp_path / "list.json").write_text(json.dumps([row | {"status": "complete", "publicScore": "0.84"}]))
    assert board_of(campaign, "push") == 0
    assert "number 1 (r0001/a1, slot) scored 0.84" in capsys.readouterr().out
    assert board_of(campaign, "push") == 0
    assert capsys.readouterr().out.splitlines()[0] == "no submission waits to be sent or scored"


def test_a_score_is_typed_revised_and_withdrawn(campaign, capsys):
    for words in (("1", "0.84"), ("1", "0.85"), ("1", "--withdraw")):
        assert board_of(campaign, "score", *words) == 0
    records = [record for record in Log(campaign.log).records() if record["event"] == "board_score"]
    assert [(one["score"], one.get("withdrawn", False), one["by"]) for one in records] == [
        ("0.84", False, "person"), ("0.85", False, "person"), (None, True, "person")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("score", "1"), "either a score or --withdraw is needed"),
        (("score", "1", "0.5", "--withdraw"), "either a score or --withdraw is needed"),
        (("score", "1", "84"), "Valid: a decimal from 0 to 1"),
        (("score", "1", "84", "--dry-run"), "Valid: a decimal from 0 to 1"),
        (("score", "2", "0.84"), "number 2 is not reserved"),
        (("score", "2", "0.84", "--dry-run"), "number 2 is not reserved"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(campaign, capfd, words, said):
    before = tree(campaign.folder)
    assert board_of(campaign, *words) == 2
    assert said in capfd.readouterr().err
    assert tree(campaign.folder) == before


def test_a_constitution_without_caps_allows_nothing():
    assert submission_caps.caps_of({}, "local") == Caps(0, 0, 0, 0)
    article = facts.load_constitution().articles["4"]
    assert submission_caps.caps_of(article, "kaggle") == Caps(5, 40, 2, 2)
    assert submission_caps.caps_of(article, "local") == Caps(40, 40, 2, 2)
    assert submission_caps.caps_of(article, "another").per_day == 0


def test_case_11_status_shows_the_boards_words_and_the_cure(campaign, capsys):
    log = Log(campaign.log)
    log.append("board_attempt", number=1, day=board_log.utc_day())
    board_log.record(
        log, {"number": 1, "score": None, "why": "rules: kaggle ended with exit code 1: phone not verified"}
    )
    assert main(["status", str(campaign.folder)]) == 0
    said = capsys.readouterr().out
    assert (
        "board: number 1 (r0001/a1) has no score: rules: kaggle ended with exit code 1: phone not verified. Accept the"
        in said
    )
    assert main(["status", str(campaign.folder), "--json"]) == 0
    [trouble] = json.loads(capsys.readouterr().out)["troubles"]
    assert (trouble["who"], trouble["kind"]) == ("board", "rules") and "phone or identity" in trouble["cure"]
    board_log.set_score(campaign, 1, "0.84")
    assert main(["status", str(campaign.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["troubles"] == []
