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


def findings(records: list[dict[str, Any]]) -> list[str]:
    report = Report()
    check_outcomes(records, report)
    return [finding.what for finding in report.findings]


def test_an_arm_that_was_trained_late_has_dev_marks_alone() -> None:
    assert findings(moved_to_the_end("attempt", "outcome")) == []


def test_an_arm_that_ended_in_time_may_not_leave_out_its_fresh_marks() -> None:
    assert findings(moved_to_the_end("outcome")) == ["a completed arm has no marks on fresh"]
