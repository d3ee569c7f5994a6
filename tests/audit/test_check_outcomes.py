"""Test what an audit says of outcomes that were logged after their round's fresh items were public."""

import copy
import json
from typing import Any

from pipeline.audit.check_outcomes import check_outcomes
from pipeline.audit.findings import Report
from tests.support.sealed import played


def moved_to_the_end(*events: str) -> list[dict[str, Any]]:
    """The log of an honest campaign, in which these records of r0001/a3 come last and its outcome has dev marks alone."""
    records = [copy.deepcopy(record) for record in map(json.loads, played().lines)]
    late = [
        record
        for record in records
        if record["event"] in events and (record.get("round"), record.get("arm")) == ("r0001", "a3")
    ]
    assert len(late) == len(events)
    for record in late:
        if record["event"] == "outcome":
            del record["outcome"]["outcomes"]["fresh"]
    return [record for record in records if record not in late] + late


def said(records: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    report = Report()
    check_outcomes(records, report)
    return [finding.what for finding in report.findings], report.not_verifiable


MISSING = ["a completed arm has no marks on fresh"]


def test_an_arm_that_was_trained_late_has_dev_marks_alone_and_is_named() -> None:
    records = moved_to_the_end("attempt", "outcome")
    records[-2]["files"] = {path: value for path, value in records[-2]["files"].items() if "fresh" not in path}
    findings, doubts = said(records)
    assert findings == []
    assert any("a3 of r0001 was scored on dev alone" in line for line in doubts)


def test_an_arm_that_ended_in_time_may_not_leave_out_its_fresh_marks() -> None:
    assert said(moved_to_the_end("outcome"))[0] == MISSING


def test_an_attempt_with_fresh_completions_is_not_late() -> None:
    records = moved_to_the_end("attempt", "outcome")
    records[-2]["files"]["rounds/r0001/a3/attempt_00/completions/fresh.jsonl"] = "0" * 64
    assert said(records)[0] == MISSING


def test_an_arm_that_had_a_score_cannot_be_made_late() -> None:
    """Its attempt is called failed at first, so that a bad fresh score can be taken back once the round is decided."""
    records = [copy.deepcopy(record) for record in map(json.loads, played().lines)]
    (attempt,) = (
        each for each in records if each["event"] == "attempt" and (each["round"], each["arm"]) == ("r0001", "a3")
    )
    (outcome,) = (
        each for each in records if each["event"] == "outcome" and (each["round"], each["arm"]) == ("r0001", "a3")
    )
    again = copy.deepcopy([attempt, outcome])
    attempt["status"] = "failed"
    again[0]["files"] = {path: value for path, value in again[0]["files"].items() if "fresh" not in path}
    del again[1]["outcome"]["outcomes"]["fresh"]
    assert said(records + again)[0] == ["no attempt with this adapter and result file was logged before it", *MISSING]


def test_the_reference_is_never_late() -> None:
    records = [copy.deepcopy(record) for record in map(json.loads, played().lines)]
    own = [each for each in records if each["event"] in ("attempt", "outcome") and each.get("arm") == "reference"]
    last = [each for each in own if each["round"] == own[-1]["round"]]
    del last[-1]["outcome"]["outcomes"]["fresh"]
    assert said([each for each in records if each not in last] + last)[0] == MISSING
