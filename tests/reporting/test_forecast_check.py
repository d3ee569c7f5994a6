"""Test the frozen forecast of a round: logged before the plan, never made again, named by the audit, and shown beside what the round took."""

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.audit import check_files, log_schema
from pipeline.audit.findings import Report
from pipeline.campaign import canonical
from pipeline.campaign.files import file_digest
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.reporting import forecast_check
from pipeline.rounds import freeze, meta
from tests.support.campaigns import OVERRIDES, fresh_campaign, publish, publish_reference

SITE = ["cluster=slurm", "cluster.gpus_per_node=2", "cluster.capacity.start_seconds=30"]


@pytest.fixture
def folder(tmp_path: Path) -> Round:
    """The first round of a site that knows rates."""
    return freeze.freeze(fresh_campaign(tmp_path), "r0001", [*OVERRIDES, *SITE])


def work(folder: Round, arm: str, *lasting: tuple[str, float], at: float = 0.0) -> None:
    """An attempt whose phases last so long, from a time on."""
    lines = []
    for phase, seconds in (*lasting, ("completed", 0.0)):
        lines.append(json.dumps({"phase": phase, "at": at, "detail": ""}) + "\n")
        at += seconds
    folder.claim_attempt(arm).phases.write_text("".join(lines))


def test_a_forecast_stands_before_the_plan_and_is_never_made_again(folder: Round) -> None:
    campaign = folder.campaign
    events = [(record["event"], record.get("round")) for record in Log(campaign.log).records()]
    assert events.index(("forecast", "r0001")) < events.index(("plan", "r0001"))
    before = folder.forecast.read_bytes()
    freeze.freeze(campaign, "r0001", [*OVERRIDES, *SITE, "cluster.partition=long"])
    work(folder, "a1", ("train", 7.0), ("generate", 5.0))
    freeze.freeze(campaign, "r0001", OVERRIDES)
    assert folder.forecast.read_bytes() == before
    assert [record["event"] for record in Log(campaign.log).records()].count("forecast") == 1


@pytest.mark.parametrize("edited", ['{"arm":', "{}", None])
def test_the_page_has_the_sealed_forecast_whatever_its_file_says_later(folder: Round, edited: str | None) -> None:
    chosen = settings.load(folder.config)
    expected = forecast_check.compare(folder, chosen)
    assert expected["phases"]["training"]["forecast"]
    if edited is None:
        content = json.loads(folder.forecast.read_text())
        edited = json.dumps(content | {"arm": {name: 1 for name in content["arm"]}})
    folder.forecast.chmod(0o644)
    folder.forecast.write_text(edited)
    assert forecast_check.compare(folder, chosen) == expected
    report = Report()
    log = Log(folder.campaign.log).records()
    check_files.check_files(log, [""] * len(log), folder.campaign.folder, report)
    assert [finding for finding in report.findings if "forecast.json" in str(finding)]


def test_an_audit_compares_the_file_and_refuses_a_forecast_after_the_plan(folder: Round) -> None:
    log = Log(folder.campaign.log)
    named = check_files.files_named(log.records(), [""] * 99)
    assert named["rounds/r0001/forecast.json"][0] == file_digest(folder.forecast)
    report = Report()
    assert log_schema.check_records(log.records(), report) and not report.findings
    log.append("forecast", round="r0001", forecast={"arm": {}})
    log_schema.check_records(log.records(), report)
    assert "forecast stands where it cannot: the round is planned already" in str(report.findings)


def test_what_a_round_took_by_hand(folder: Round) -> None:
    """Two scored arms, one of which was interrupted; an arm without a score counts for the round and the devices alone."""
    first = folder.campaign.round("r0000")
    work(first, "a0", ("train", 50.0), at=100.0)
    work(
        folder,
        "a0",
        ("claim", 2.0),
        ("train", 10.0),
        ("check", 1.0),
        ("generate_start", 4.0),
        ("generate", 20.0),
        ("score", 3.0),
        at=110.0,
    )
    work(folder, "a1", ("claim", 6.0), ("train", 4.0), at=120.0)
    work(folder, "a1", ("claim", 2.0), ("train", 8.0), ("generate", 30.0), at=150.0)
    work(folder, "a2", ("claim", 5.0), at=200.0)
    publish(folder, "a0"), publish(folder, "a1"), publish(folder, "a2", None)
    took = forecast_check.actual(folder, 2)
    assert took == {
        "start-up": 7.0, "agents": 0.0, "training": 11.0, "decoding": 25.0, "rest": 2.0, "an arm": 45.0, "round": 105.0,
        "devices": 2 * (50 + 40 + 50 + 5),
    }  # fmt: skip
    chosen, frozen = settings.load(folder.config), json.loads(folder.forecast.read_text())
    phases = forecast_check.compare(folder, chosen)["phases"]
    assert phases["start-up"] == {"forecast": 60.0, "actual": 7.0, "error": pytest.approx(60 / 7 - 1)}
    assert phases["an arm"]["forecast"] == frozen["arm"]["arm"] / 1000
    assert phases["devices"]["error"] == pytest.approx(frozen["devices"] / 1000 / 290 - 1)
    rows = {row[0]: row[1:] for row in forecast_check.section(folder, chosen).table}
    assert rows["start-up of an arm"] == ["60.0 s", "7.0 s", "+757.1 %"]
    assert rows["GPU-hours of the arms, with the reference and the base"][1] == "0.081 h"
    without, with_agents = (
        forecast_check.section(folder, settings.compose([*OVERRIDES, *each])) for each in ([], ["worker=llm"])
    )
    assert any("rank-hours of the arms" in row[0] for row in without.table)
    (more,) = [line for line in with_agents.lines if line not in without.lines]
    assert "not what the agent does before and beside it" in more


def test_a_round_without_rates_says_so(tmp_path: Path) -> None:
    folder = freeze.freeze(fresh_campaign(tmp_path), "r0001", OVERRIDES)
    assert not folder.forecast.exists()
    found = forecast_check.section(folder, settings.load(folder.config))
    assert found.lines == ["No forecast was made before this round, because no rate was known then (cluster.capacity)."]
    assert found.table[1] == ["start-up of an arm", "-", "-", "-"]


def test_the_page_and_the_json_have_it_and_the_next_round_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole round with made-up clocks on this machine: the next round's forecast is what this one took."""
    campaign = fresh_campaign(tmp_path)
    folder = freeze.freeze(campaign, "r0001", OVERRIDES)
    publish_reference(campaign, folder)
    for number in range(8):
        arm = f"a{number}"
        work(folder, arm, ("claim", 2.0), ("train", 8.0), ("check", 1.0), ("generate", 4.0), at=20.0 * number)
        made = folder.attempts(arm)[0]
        made.progress.write_text(json.dumps({"phase": "train", "step": 2, "tokens": 300, "seconds": 7.0}) + "\n")
        made.result.write_bytes(publish(folder, arm).read_bytes())
    meta.close(campaign, folder)
    following = freeze.freeze(campaign, "r0002", OVERRIDES)
    frozen = json.loads(following.forecast.read_text())
    assert frozen["arm"] == {"start-up": 2000, "training": 8000, "decoding": 4000, "rest": 1000, "arm": 15000}
    assert frozen["source"] == "measured in r0001" and frozen["devices"] == 8 * 2 * 15000
    assert following.forecast.read_bytes() == canonical.encoded(frozen)
    assert main(["report", str(campaign.folder), "--round", "r0001", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["forecast"]["phases"]["training"] == {"forecast": None, "actual": 8.0, "error": None}
    assert told["sections"][-1]["title"] == forecast_check.TITLE
    assert main(["report", str(campaign.folder), "--round", "r0001"]) == 0
    said = capsys.readouterr().out
    assert "the round, first start to last end, with the reference and the base  -         155.0 s" in said
    assert "Engine: native, because the site has no GPUs" in said
    for number in range(8):
        work(following, f"a{number}", ("claim", 3.0), ("train", 16.0), ("check", 1.0), ("generate", 4.0))
        publish(following, f"a{number}")
    error = forecast_check.compare(following, settings.load(following.config))["phases"]["training"]["error"]
    assert error == pytest.approx(-0.5), "the round took twice as long as the one before"


def test_a_damaged_file_of_an_earlier_round_stops_no_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = fresh_campaign(tmp_path)
    first = campaign.round("r0000")
    made = first.claim_attempt("a0")
    made.result.write_bytes(publish(first, "a0").read_bytes())
    made.phases.write_text('{"phase": "generate", "at": "noon"}\n{"phase": "score", "at": 2}\n')
    folder = freeze.freeze(Campaign(campaign.folder), "r0001", OVERRIDES)
    assert folder.plan.exists() and not folder.forecast.exists()
    assert "note: no forecast is made for r0001: " in capsys.readouterr().err
