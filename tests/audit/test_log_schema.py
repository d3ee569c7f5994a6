"""Test form and order of records: for each rule a log that breaks it and nothing else."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.audit import log_schema
from pipeline.audit.findings import Report
from tests.support.sealed import played

Records = list[dict[str, Any]]


def renumbered(records: Records) -> Records:
    return [{**record, "seq": number} for number, record in enumerate(records)]


def at(records: Records, event: str, round_name: str = "r0002") -> int:
    return next(n for n, r in enumerate(records) if r["event"] == event and r.get("round", round_name) == round_name)


def moved(records: Records, event: str, before: str) -> Records:
    """The first such record of r0002 put before the first of another kind of its round."""
    record = records.pop(at(records, event))
    records.insert(at(records, before), record)
    return records


def without(records: Records, event: str) -> Records:
    return [record for record in records if (record["event"], record.get("round")) != (event, "r0002")]


def changed(records: Records, event: str, **fields: Any) -> Records:
    records[at(records, event)] |= fields
    return records


BROKEN: dict[str, tuple[Callable[[Records], Records], str]] = {
    "plan without basis": (lambda r: without(r, "basis"), "plan stands where it cannot: its basis is not logged before it"),
    "submission before the plan": (lambda r: moved(r, "slurm_submission", "plan"), "slurm_submission stands where it cannot: r0002 has no plan"),
    "outcome before the plan": (lambda r: moved(r, "outcome", "plan"), "outcome stands where it cannot: r0002 has no plan"),
    "evidence before outcomes": (lambda r: moved(r, "evidence", "attempt"), "evidence stands where it cannot: the round has no outcome"),
    "decision before evidence": (lambda r: moved(r, "decision", "evidence"), "decision stands where it cannot: its evidence is not logged"),
    "reveal before the decision": (lambda r: moved(r, "reveal", "decision"), "reveal stands where it cannot: r0002 has no decision"),
    "close before the reveal": (lambda r: moved(r, "close", "reveal"), "close stands where it cannot: the seed of its fresh items"),
    "no decision at all": (lambda r: without(r, "decision"), "plan stands where it cannot: r0002 has no decision"),
    "another number": (lambda r: changed(r, "decision", number=1), "decision stands where it cannot: decision 0 of r0002 is the next"),
    "dev revealed": (lambda r: changed(r, "reveal", name="dev"), "reveal stands where it cannot: dev stays secret until the campaign ends"),
    "another plan submitted": (lambda r: changed(r, "slurm_submission", plan_digest="0" * 64), "r0002 has no plan of that digest"),
    "a second init": (lambda r: [*r, r[0]], "init stands where it cannot: a log begins with its init record and has no other"),
    "a field too many": (lambda r: changed(r, "outcome", host="n1"), "outcome has the field host, which it should not have"),
    "a field of another type": (lambda r: changed(r, "decision", number=True), "decision has no valid number"),
    "no hash": (lambda r: changed(r, "evidence", sha256="zz"), "evidence has no valid sha256"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_out_of_its_place_is_named(name: str) -> None:
    breaks, what = BROKEN[name]
    report = Report()
    log_schema.check_records(renumbered(breaks([json.loads(line) for line in played().lines])), report)
    assert any(what in finding.what and finding.record is not None for finding in report.findings), report.findings


def test_records_of_a_later_version_are_told_and_left_alone() -> None:
    records = [json.loads(line) for line in played().lines]
    report = Report()
    assert log_schema.check_records(renumbered([*records, {"event": "weather", "round": "r0004"}]), report)
    assert report.ok and "records of kind 'weather' are not known to this version" in report.not_verifiable


JUNK = (
    [],
    [[]],
    {},
    {"a": [{}]},
    "",
    "r0001",
    "r9999",
    "submission 1",
    ["submission 1"],
    [None],
    None,
    True,
    -1,
    0,
    99999,
    "x" * 64,
)


@pytest.mark.parametrize("seed", range(200))
def test_a_log_with_any_value_in_any_place_gives_findings_and_no_traceback(seed: int) -> None:
    """Some values of some records are replaced, and records that a judge job brings are put anywhere."""
    draw, records = random.Random(seed), [json.loads(line) for line in played().lines]
    for _ in range(draw.randint(1, 3)):
        record = draw.choice(records)
        names = [name for name in record if name not in ("seq", "previous", "event")]
        record[draw.choice(names)] = draw.choice(JUNK)
        event = draw.choice(["judge_request", "unjudged", "by_hand", "board_score", "outcome"])
        form = {
            "what": draw.choice(JUNK),
            "number": draw.choice(JUNK),
            "score": draw.choice(JUNK),
            "arm": "reference",
            "outcome": {},
        }
        fields = {*log_schema.FIELDS[event], *log_schema.MAY_HAVE.get(event, ())} & set(form)
        made = {"event": event, "previous": "", **({"round": "r0001"} if event != "board_score" else {})}
        records.insert(draw.randint(1, len(records)), made | {name: form[name] for name in fields})
    wrong = {"event": draw.choice(["judge_request", "unjudged"]), "previous": "", "round": "r0001"}
    records.insert(draw.randint(1, len(records)), wrong | {"what": draw.choice([[], [[]], [{}], [None], ["weather"]])})
    report = Report()
    log_schema.check_records(renumbered(records), report)
    assert any(wrong["event"] in finding.what for finding in report.findings)
