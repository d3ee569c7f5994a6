"""Test the spot check without a model: which items are drawn, and when accuracies differ by more than the tolerance."""

import json
import random
from pathlib import Path

import pytest

from pipeline.audit.findings import Report
from pipeline.rounds import reinfer

OUTCOME = {"seq": 31, "arm": "a3", "round": "r0001"}


def told(changed: int, size: int = 100) -> Report:
    """As many marks as said went from right to wrong."""
    report = Report()
    before = {f"roman-{n:06d}": n % 2 == 0 for n in range(size)}
    wrong = [item for item, right in before.items() if right][:changed]
    reinfer.compare(OUTCOME, before, {**before, **dict.fromkeys(wrong, False)}, report)
    return report


@pytest.mark.parametrize(("changed", "ok"), [(0, True), (3, True), (4, False), (50, False)])
def test_rates_may_differ_by_two_points_and_one_item(changed: int, ok: bool) -> None:
    report = told(changed)
    assert report.ok is ok
    said = report.verified[0] if ok else report.findings[0].what
    assert (
        f"a3 of r0001: 50 of 100 items right in the log, {50 - changed} decoded again, {changed} marks differ" in said
    )
    assert ok or report.findings[0].record == 31


def test_items_are_drawn_of_each_family_with_their_marks(tmp_path: Path) -> None:
    items = tmp_path / "items"
    items.mkdir()
    marks = {"gravity": "".join(random.Random(1).choice("01T") for _ in range(30)), "roman": "10T01"}
    rows = [(family, n) for family, text in marks.items() for n in range(len(text))]
    for name in ("prompts", "answers"):
        lines = [json.dumps({"item_id": f"{family}-{n:06d}", "family": family}) + "\n" for family, n in rows]
        (items / f"{name}.jsonl").write_text("".join(lines))
    logged = reinfer.drawn_items(items, marks, 10, tmp_path / "drawn")
    assert (
        sum(item.startswith("gravity") for item in logged) == 10
        and sum(item.startswith("roman") for item in logged) == 5
    )
    assert all(right == (marks[item.split("-")[0]][int(item.split("-")[1])] == "1") for item, right in logged.items())
    for name in ("prompts", "answers"):
        drawn = [
            json.loads(line)["item_id"] for line in (tmp_path / "drawn" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert drawn == sorted(logged)


def test_one_scored_arm_is_drawn_of_each_closed_round() -> None:
    def outcome(name: str, arm: str, fresh: dict[str, str]) -> dict:
        return {"event": "outcome", "round": name, "arm": arm, "outcome": {"outcomes": {"fresh": fresh}}}

    records = [
        outcome("r0001", "a1", {"roman": "1"}), outcome("r0001", "a2", {}), outcome("r0001", "reference", {"roman": "1"}),
        {"event": "close", "round": "r0001"}, outcome("r0002", "a1", {"roman": "1"}),
    ]  # fmt: skip
    assert [(each["round"], each["arm"]) for each in reinfer.draw_outcomes(records)] == [("r0001", "a1")]
