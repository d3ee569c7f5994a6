"""Test slices of a family's puzzles: dev items are just those within the limits, and training rows say whether they are."""

import json

import pytest

from substrate.data.slices import is_within, read_slices
from substrate.interface.errors import DataError, UsageError
from substrate.items import draw_items
from substrate.payload import write_payload
from substrate.tasks import FAMILIES

SLICES = read_slices({"unit_conversion": {"factor": {"low": 2, "high": 3}}}, FAMILIES)
LIMITS = SLICES["unit_conversion"]


def test_a_slice_has_the_whole_family_s_items_that_lie_within():
    seed, family = b"s" * 32, "unit_conversion"
    whole = draw_items(seed, family, "small", 120)
    inside = [item for item in whole if is_within(LIMITS, family, item.puzzle)]
    assert 20 < len(inside) < 100
    narrow = draw_items(seed, family, "small", len(inside), limits=LIMITS)
    assert narrow == inside
    assert {FAMILIES[family].features(item.puzzle)["factor"][0] for item in narrow} == {2.0, 3.0}


def test_a_slice_that_hardly_any_puzzle_is_in_is_refused():
    with pytest.raises(DataError, match="or widen its slice"):
        draw_items(b"s" * 32, "unit_conversion", "small", 2, limits={"factor": (2.4, 2.6)})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([], r"slices is \[\]"),
        ({"sudoku": {"size": {"low": 1, "high": 2}}}, "slices is .*sudoku"),
        ({"gravity": {}}, "slices.gravity is {}"),
        ({"gravity": {"g": [1, 2]}}, r"slices.gravity.g is \[1, 2\]; valid: two finite numbers"),
        ({"gravity": {"g": {"low": 1}}}, "slices.gravity.g"),
        ({"gravity": {"g": {"low": True, "high": 2}}}, "slices.gravity.g"),
        ({"gravity": {"g": {"low": float("nan"), "high": 2}}}, "slices.gravity.g"),
        ({"gravity": {"g": {"low": 3, "high": 2}}}, "slices.gravity.g"),
        ({"gravity": {"g": {"low": 3, "high": 10**400}}}, "slices.gravity.g is .*two finite numbers"),
        ({"gravity": {"g": {"low": float("-inf"), "high": 2}}}, "slices.gravity.g"),
    ],
)
def test_what_is_no_slice_is_refused_by_name(value, named):
    with pytest.raises(UsageError, match=named):
        read_slices(value, FAMILIES)


@pytest.mark.parametrize("feature", ["colour", "sentence lengths"])
def test_a_feature_that_is_missing_or_no_number_is_refused_with_those_that_are(feature):
    item = draw_items(b"s" * 32, "text_cipher", "small", 1)[0]
    with pytest.raises(UsageError, match=f"limits {feature} of text_cipher; valid: unknown letters"):
        is_within({feature: (0.0, 9.0)}, "text_cipher", item.puzzle)


def test_training_rows_within_a_slice_are_marked_and_nothing_else_changes(tmp_path):
    families = ["roman", "unit_conversion"]
    for name, slices in (("whole", {}), ("marked", SLICES)):
        write_payload(tmp_path / name, 1, "small", 60, families, slices=slices)
    whole, marked = (
        [json.loads(line) for line in (tmp_path / name / "data/train.jsonl").read_text().splitlines()]
        for name in ("whole", "marked")
    )
    assert [{**row, "source": "generated"} for row in marked] == whole
    for row in marked:
        puzzle = FAMILIES[row["family"]].parse(row["prompt"])
        inside = row["family"] == "unit_conversion" and is_within(LIMITS, row["family"], puzzle)
        assert row["source"] == ("slice" if inside else "generated")
    counts = json.loads((tmp_path / "marked/data/card.json").read_text())["rows"]
    assert 0 < counts["slice"]["unit_conversion"] < 60 and "roman" not in counts["slice"]
    assert counts["slice"]["unit_conversion"] + counts["generated"]["unit_conversion"] == 60


def test_a_slice_without_a_training_row_is_refused(tmp_path):
    slices = read_slices({"unit_conversion": {"factor": {"low": 2.4, "high": 2.6}}}, FAMILIES)
    with pytest.raises(DataError, match="none of the 20 puzzles of unit_conversion lies in its declared slice"):
        write_payload(tmp_path, 1, "small", 20, ["unit_conversion"], slices=slices)


def test_a_slice_with_too_few_puzzles_for_dev_is_refused_when_the_image_is_made(tmp_path):
    """Its training rows hide nothing: each of them is kept out of dev, and a narrow slice has few others."""
    slices = read_slices({"gravity": {"g": {"low": 10, "high": 10}, "times": {"low": 0, "high": 3}}}, FAMILIES)
    with pytest.raises(DataError, match="family gravity .* or widen its slice"):
        write_payload(tmp_path / "many", 1, "small", 100, ["gravity"], slices=slices, num_dev=100)
    write_payload(tmp_path / "few", 1, "small", 100, ["gravity"], slices=slices, num_dev=4)
