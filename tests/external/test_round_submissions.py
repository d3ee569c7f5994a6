"""Test the external target throughout a campaign: real meta stages on published arms, with a shell script as the site's scorer."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from pipeline.campaign import canonical
from pipeline.campaign.errors import ConfigError, IntegrityError, Refused
from pipeline.campaign.facts import facts_of, load_constitution
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.decision import board_submissions, derive, history, submission_caps
from pipeline.decision.submission_caps import Caps
from pipeline.execution import adapter
from pipeline.external import board_log
from pipeline.external.round_submissions import RoundSubmissions
from pipeline.pages import write
from pipeline.reporting import document, page
from pipeline.rounds import freeze, meta
from pipeline.rounds.init import init
from pipeline.stats.design import Design
from tests.support.campaigns import publish, publish_reference, tree
from tests.support.told import Read

RULES = load_constitution()
SCORER = """#!/bin/sh
# A scorer of a site: what it says of a number lies in a folder; without a word there it says what lies in `all`.
test -f "$SCORES/down" && exit 1
echo "$1" >> "$SCORES/asked"
cat "$SCORES/$1" 2>/dev/null || cat "$SCORES/all"
"""
_KEEP: list[TemporaryDirectory[str]] = []


@cache
def template(*more: str) -> Path:
    """A campaign with external=command, and other overrides, whose r0001 is frozen; made once."""
    _KEEP.append(TemporaryDirectory(prefix="turns-"))
    place = Path(_KEEP[-1].name)
    (place / "score.sh").write_text(SCORER)
    overrides = [
        "experiment=smoke", "external=command", "external.rows=30", "external.wait_seconds=0",
        f"external.command=[sh,{place}/score.sh,'{{number}}']",
        *more,
    ]  # fmt: skip
    campaign = Campaign.at(place / "smoke")
    init(campaign, overrides)
    freeze.freeze(campaign, "r0001", overrides)
    return campaign.folder


def seal_adapter(campaign: Campaign, round_name: str, arm: str) -> str:
    """An adapter as a worker leaves it; its digest."""
    attempt = campaign.round(round_name).claim_attempt(arm)
    write_file(attempt.adapter_dir / adapter.WEIGHTS, f"weights of {round_name}/{arm}")
    write_file(attempt.adapter_dir / adapter.CONFIG, "{}")
    digest = adapter.kept_digest(attempt.adapter_dir)
    write_file(attempt.sealed, json.dumps({"adapter_digest": digest}))
    return digest


def publish_round(campaign: Campaign, name: str, best: str = "a2") -> Round:
    """Eight arms with adapters, of which one is far above the reference."""
    folder = freeze.freeze(campaign, name, [])
    publish_reference(campaign, folder)
    digest = adapter.kept_digest(campaign.round("r0000").attempts("a0")[0].adapter_dir)
    for path in (campaign.round("r0000").published("a0"), folder.folder / "reference.h5"):
        rewrite_digest(path, digest)
    for number in range(8):
        arm = f"a{number}"
        publish(folder, arm, 30 if arm == best else 20, adapter_digest=seal_adapter(campaign, name, arm))
    return folder


def rewrite_digest(path: Path, digest: str) -> None:
    """The same result file, of another adapter."""
    from pipeline.execution import results
    from tests.support.campaigns import scored

    attributes = results.read_attributes(path)
    item_set = "fresh" if path.name == "reference.h5" else "dev"
    path.unlink()
    results.write_result(path, {**attributes, "adapter_digest": digest}, {item_set: scored(20)}, [], {})


@pytest.fixture
def scores(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "scores"
    folder.mkdir()
    (folder / "all").write_text("0.50\n")
    monkeypatch.setenv("SCORES", str(folder))
    return folder


@pytest.fixture
def campaign(tmp_path, scores) -> Campaign:
    campaign = Campaign.at(shutil.copytree(template(), tmp_path / "smoke"))
    seal_adapter(campaign, "r0000", "a0")
    return campaign


def log_of(campaign: Campaign) -> list[dict]:
    return Log(campaign.log).records()


def events(campaign: Campaign, *names: str) -> list[dict]:
    return [record for record in log_of(campaign) if record["event"] in names and "number" in record]


def printed(folder: Round) -> dict[str, dict[str, str]]:
    return read_json(folder.evidence)["board"]


def caps(monkeypatch, per_day: int, per_campaign: int = 40) -> Caps:
    given = Caps(per_day, per_campaign, 2, 2)
    monkeypatch.setattr(submission_caps, "caps_of", lambda article, target: given)
    return given


def test_a_round_is_submitted_before_it_is_decided_and_an_audit_finds_the_same(campaign, scores):
    (scores / "1").write_text("0.47\n")
    (scores / "3").write_text("loading\n0.61\n")
    told: list[str] = []
    folder = publish_round(campaign, "r0001")
    decision = meta.close(campaign, folder, report_line=told.append)
    records = log_of(campaign)
    names = [record["event"] for record in records]
    first = names.index("submissions_chosen")
    assert names[first + 1 : first + 5] == ["submission"] * 4 and names[first + 5] == "board_attempt"
    assert names.index("decision") > max(n for n, name in enumerate(names) if name == "board_score")
    chosen = records[first]["arms"]
    assert len(chosen) == 2 and chosen[0] == "a2"  # the arm that is ahead on dev
    assert printed(folder) == {
        "r0001": {"reference-1": "0.47", "reference-2": "0.50", chosen[0]: "0.61", chosen[1]: "0.50"}
    }
    assert decision.kept == "a2" and not decision.claimed and decision.ladder == "0.61"
    assert len(told) == 4 and told[2] == "number 3 (r0001/a2, slot) scored 0.61"
    assert derive.check_submissions(records) == 4
    assert submission_caps.verify(records, submission_caps.caps_of(RULES.articles["4"], "command")) == 4


def test_running_again_changes_no_byte(campaign, scores):
    folder = publish_round(campaign, "r0001")
    meta.close(campaign, folder)
    before = tree(campaign.folder)
    meta.close(campaign, folder)
    assert tree(campaign.folder) == before


def test_below_the_quorum_nothing_is_chosen_and_nothing_sent(campaign, scores):
    folder = publish_round(campaign, "r0001")
    for arm in ("a3", "a4", "a5", "a6"):
        folder.published(arm).unlink()
    assert meta.close(campaign, folder).state == "undecided"
    assert not events(campaign, "submission") and not (scores / "asked").exists()


def test_a_board_that_is_down_stops_no_round_and_the_next_one_takes_its_scores_up(campaign, scores):
    (scores / "down").touch()
    told: list[str] = []
    folder = publish_round(campaign, "r0001")
    assert meta.close(campaign, folder, report_line=told.append).state == "decided"
    assert folder.closed.exists() and printed(folder) == {}
    assert len(told) == 4 and all("has no score" in line for line in told)
    assert "failed" in document.as_text(page.of_log(log_of(campaign), "r0001", "tiny"))
    first = (folder.decisions_dir / "00.json").read_bytes()
    (scores / "down").unlink()
    second = publish_round(campaign, "r0002", best="a5")
    meta.close(campaign, second)
    assert (folder.decisions_dir / "00.json").read_bytes() == first
    assert len(printed(second)["r0001"]) == 4 and len(printed(second)["r0002"]) == 2
    assert derive.check_submissions(log_of(campaign)) == 6
    at = next(n for n, r in enumerate(log_of(campaign)) if r["event"] == "decision")
    assert (
        canonical.plain(asdict(derive.derive(log_of(campaign)[:at], "r0001").decision))
        == log_of(campaign)[at]["decision"]
    )


def test_late_revised_repeated_and_withdrawn_scores_count_from_the_next_decision_on(campaign, scores):
    (scores / "all").write_text("pending\n")
    folder = publish_round(campaign, "r0001")
    meta.close(campaign, folder)
    assert [one.state for one in board_submissions.submissions_in(log_of(campaign))] == ["sent"] * 4 and printed(
        folder
    ) == {}
    for number, score in ((1, "0.40"), (2, "0.42"), (3, "0.55"), (4, "0.50"), (3, "0.56"), (3, "0.56"), (4, None)):
        board_log.set_score(campaign, number, score)
    assert len(events(campaign, "board_score")) == 6  # the same word twice is one
    for number, score in ((1, "0.40"), (2, "0.42"), (3, "0.56"), (4, "0.99")):
        (scores / str(number)).write_text(
            f"{score}\n"
        )  # asked again the scorer says the same, and more of what was withdrawn
    (scores / "all").write_text("0.44\n")
    second = publish_round(campaign, "r0002", best="a5")
    meta.close(campaign, second)
    chosen = history.read_history(log_of(campaign)).chosen["r0001"]
    assert printed(second)["r0001"] == {"reference-1": "0.40", "reference-2": "0.42", chosen[0]: "0.56"}
    assert read_json(folder.decisions_dir / "00.json")["ladder"] == ""
    assert "withdrawn" in document.as_text(page.of_log(log_of(campaign), "r0001", "tiny"))


def test_a_refused_reservation_is_told_and_logged_and_made_on_a_day_that_has_room(campaign, scores, monkeypatch):
    given = caps(monkeypatch, per_day=3)
    monkeypatch.setattr(board_log, "utc_day", lambda: "2026-11-24")
    told: list[str] = []
    folder = publish_round(campaign, "r0001")
    assert meta.close(campaign, folder, report_line=told.append).state == "decided"
    assert len(events(campaign, "submission")) == 3
    assert sum("is not submitted: article 4 (daily_cap)" in line for line in told) == 1
    [refusal] = [record for record in log_of(campaign) if record["event"] == "submission_refused"]
    assert (refusal["round"], refusal["purpose"], refusal["article"], refusal["code"]) == (
        "r0001",
        "slot",
        "4",
        "daily_cap",
    )
    assert write.write_pages(folder) == []
    assert "article 4 (daily_cap): 3 submissions count on 2026-11-24 UTC" in Read(folder.report.read_text()).text
    meta.close(campaign, folder)
    assert len([record for record in log_of(campaign) if record["event"] == "submission_refused"]) == 1  # told once
    monkeypatch.setattr(board_log, "utc_day", lambda: "2026-11-25")
    second = publish_round(campaign, "r0002", best="a5")
    meta.close(campaign, second)
    rounds = [one.round for one in board_submissions.submissions_in(log_of(campaign))]
    assert rounds == ["r0001", "r0001", "r0001", "r0002", "r0002", "r0001"]  # its own first, then what was left over
    records = log_of(campaign)
    assert (derive.check_submissions(records), submission_caps.verify(records, given)) == (6, 6)


def test_a_clock_that_is_set_back_gains_nothing(campaign, scores, monkeypatch):
    caps(monkeypatch, per_day=4)
    monkeypatch.setattr(board_log, "utc_day", lambda: "2026-11-24")
    meta.close(campaign, publish_round(campaign, "r0001"))
    monkeypatch.setattr(board_log, "utc_day", lambda: "2026-11-20")
    assert meta.close(campaign, publish_round(campaign, "r0002", best="a5")).state == "decided"
    assert len(events(campaign, "submission")) == 4
    assert {one.day for one in board_submissions.submissions_in(log_of(campaign))} == {"2026-11-24"}


def test_two_meta_stages_at_once_reserve_and_send_once(campaign, scores):
    folder = publish_round(campaign, "r0001")

    def close(number: int) -> None:
        with suppress(ConfigError):  # one of them is told that another runs
            meta.close(campaign, folder)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(close, range(3)))
    assert [record["number"] for record in events(campaign, "submission")] == [1, 2, 3, 4]
    assert len(events(campaign, "board_score")) == len(events(campaign, "board_attempt")) == 4


class Killed(BaseException):
    """Ends a stage where nothing can be caught, as SIGKILL does."""


@pytest.mark.parametrize("event", ["submissions_chosen", "submission", "board_attempt", "board_score"])
def test_killed_before_any_record_the_next_meta_stage_goes_on(campaign, scores, monkeypatch, event):
    folder = publish_round(campaign, "r0001")
    write = Log._write

    def killed(self, file, name, payload):
        if name == event:
            raise Killed
        return write(self, file, name, payload)

    with monkeypatch.context() as dying:
        dying.setattr(Log, "_write", killed)
        with pytest.raises(Killed):
            meta.close(campaign, folder)
    assert meta.close(campaign, folder).state == "decided"
    assert [one.state for one in board_submissions.submissions_in(log_of(campaign))] == ["scored"] * 4
    assert derive.check_submissions(log_of(campaign)) == 4


def test_a_choice_that_does_not_follow_from_the_log_is_found(campaign, scores):
    meta.close(campaign, publish_round(campaign, "r0001"))
    records = log_of(campaign)
    at = next(n for n, record in enumerate(records) if record["event"] == "submissions_chosen")
    slot = next(
        n for n, record in enumerate(records) if record["event"] == "submission" and record["purpose"] == "slot"
    )
    for position, change, said in (
        (at, {"arms": ["a6", "a5"]}, "The arms to submit of r0001, .* do not follow"),
        (slot, {"arm": "a7"}, r"r0001/a7, slot\) was not chosen"),
        (slot, {"adapter_digest": "0" * 64}, "was not chosen"),
    ):
        changed = [*records[:position], {**records[position], **change}, *records[position + 1 :]]
        with pytest.raises(IntegrityError, match=said):
            derive.check_submissions(changed)


def test_finalists_are_scored_once_more_by_what_was_held_back(campaign, scores):
    meta.close(campaign, publish_round(campaign, "r0001"))
    facts, chosen = facts_of(campaign), settings.load(campaign.round("r0001").config)
    assert (
        RoundSubmissions.of(campaign, "r0001", facts, chosen, RULES).finish(dry_run=True)[0]
        == "send r0001/a2 again, as a finalist"
    )
    assert len(events(campaign, "submission")) == 4
    for number in (5, 6):
        (scores / str(number)).write_text("0.58\n")
    said = RoundSubmissions.of(campaign, "r0001", facts, chosen, RULES).finish()
    known = board_submissions.submissions_in(log_of(campaign))
    assert [(one.arm, one.purpose, one.printed) for one in known[4:]][0] == ("a2", "finalist", "0.58") and len(
        known
    ) == 6
    assert (
        known[4].adapter_digest == next(one for one in known if (one.arm, one.purpose) == ("a2", "slot")).adapter_digest
    )
    assert len(said) == 2 and RoundSubmissions.of(campaign, "r0001", facts, chosen, RULES).finish() == []
    assert derive.check_submissions(log_of(campaign)) == 6
    shown = document.as_text(page.of_log(log_of(campaign), "r0001", "tiny"))
    assert "Finalists, which are submitted once more: a2 of r0001" in shown
    assert history.read_history(log_of(campaign)).scores["r0001"]["a2"] == Decimal("0.50")  # repeats enter no test


def test_what_is_held_back_is_there_for_finalists_when_all_else_is_spent(campaign, scores, monkeypatch):
    caps(monkeypatch, per_day=9, per_campaign=5)
    folder = publish_round(campaign, "r0001")
    meta.close(campaign, folder)
    assert [record["code"] for record in log_of(campaign) if record["event"] == "submission_refused"] == ["held_back"]
    RoundSubmissions.of(campaign, "r0001", facts_of(campaign), settings.load(folder.config), RULES).finish()
    assert [one.purpose for one in board_submissions.submissions_in(log_of(campaign))] == ["reference"] * 2 + [
        "slot"
    ] + ["finalist"] * 2


def test_what_a_campaign_froze_no_rounds_file_may_change(campaign, scores):
    meta.close(campaign, publish_round(campaign, "r0001"))
    path = campaign.overrides("r0002")
    before = path.read_text()
    for key, changed in (("external", {"external": {"submissions": 8}}), ("recipe", {"recipe": {"num_steps": 9}})):
        content = yaml.safe_load(before) | changed
        path.write_text("# @package _global_\n" + yaml.safe_dump(content))
        with pytest.raises(Refused, match=f"another {key} than the campaign froze") as refused:
            freeze.freeze(campaign, "r0002", [])
        assert (refused.value.article, refused.value.code) == ("8", "settings_changed")
    frozen = settings.load(campaign.round("r0000").config).parallelism.recompute
    path.write_text(
        "# @package _global_\n" + yaml.safe_dump(yaml.safe_load(before) | {"parallelism": {"recompute": "selective"}})
    )
    assert frozen == "none" and freeze.freeze(campaign, "r0002", []).plan.exists(), (
        "what is recomputed changes no number"
    )
    assert settings.load(campaign.round("r0002").config).parallelism.recompute == "selective"


def test_the_design_has_the_board_and_its_critical_values(campaign):
    facts = facts_of(campaign)
    assert (facts["design"]["board_rows"], facts["design"]["submissions"], facts["external"]) == (30, 2, "command")
    assert facts["critical_source"].startswith("bounds")
    from pipeline.rounds.init import design_of
    from pipeline.stats.critical_values import of_design, read_critical_values

    for overrides, known in (
        (["external=local"], "r8_a8_f3_d100_s100_b300_k2"),
        (["experiment=nano_30b", "external=kaggle"], "r8_a8_f6_d300_s300_b1000_k2"),
        ([], "r8_a8_f3_d100_s100_b0_k0"),
    ):
        design = design_of(settings.compose(overrides), RULES)
        source, num = of_design(design)[1], read_critical_values(design)["campaigns_per_null"]
        assert source == f"constitution/nulls/{known}.json: {num} campaigns of each null" and num >= 3000


def test_a_page_that_cannot_be_written_is_a_line_and_no_failure(campaign, scores, monkeypatch):
    def broken(*given: object) -> None:
        raise ArithmeticError("no figure")

    monkeypatch.setattr(page, "of_log", broken)
    folder = publish_round(campaign, "r0001")
    assert meta.close(campaign, folder).state == "decided"
    assert write.write_pages(folder) == [
        f"{name} could not be written: ArithmeticError('no figure')"
        for name in ("rounds/r0001/report.html", "report.html")
    ]
    assert folder.closed.exists() and not folder.report.exists()


def test_first_come_the_reference_and_a_day_s_room_is_that_of_the_kind():
    for kind, per_day in (("kaggle", 5), ("manual", 5), ("command", 40), ("local", 40)):
        given = submission_caps.caps_of(RULES.articles["4"], kind)
        assert given == Caps(per_day, 40, 2, 2)
        design = replace(Design(), rounds=RULES.num_rounds, submissions=2)
        assert given.reference + design.submissions <= given.per_day  # the first round fits a day
        assert given.reference + design.rounds * design.submissions + given.held_back <= given.per_campaign


@pytest.mark.parametrize("kind", ["llm", "optuna"])
def test_who_proposes_and_who_scores_work_together(tmp_path, scores, kind):
    """An endpoint that nobody answers at, and an Optuna that does: either way the plan in the log is what is played, scored and decided."""
    if kind == "optuna":
        pytest.importorskip("optuna")
    asked = ["policy.proposals.url=http://127.0.0.1:9/v1/chat/completions", "policy.proposals.model=any"] * (
        kind == "llm"
    )
    made = template(f"policy={kind}", "policy.proposals.mode=active", *asked)
    campaign = Campaign.at(shutil.copytree(made, tmp_path / "asked"))
    seal_adapter(campaign, "r0000", "a0")
    for name in ("r0001", "r0002"):
        folder = publish_round(campaign, name)
        assert meta.close(campaign, folder).state == "decided"
        shown = document.as_text(page.of_log(log_of(campaign), name, "tiny"))
        assert f"The proposer {kind} was asked (mode active)." in shown
        assert ("article 14 (endpoint_unreachable)" in shown) == (kind == "llm")
    records = log_of(campaign)
    assert derive.check_submissions(records) == 6
    if kind == "optuna":
        [first, *_] = [record for record in records if record["event"] == "proposal"]
        accepted = [(each["key"], each["value"]) for each in first["verdicts"] if each["accepted"]]
        arms = campaign.round("r0001").frozen_plan().arms
        assert accepted and set(accepted) <= {arm.overrides[-1] for arm in arms if arm.overrides}
