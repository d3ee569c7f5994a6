"""Test that the critical values that ship are complete and come from this code, which computes them again."""

import json
from decimal import Decimal

import pytest

from pipeline.stats import critical_values
from pipeline.stats.design import Design
from studies import calibrate, worlds

FAST = (critical_values.GRID[0], Design(families=3, dev_items=100, fresh_items=100, board_rows=0, submissions=0))


@pytest.mark.parametrize("design", critical_values.GRID, ids=critical_values.file_name)
def test_a_shipped_file_is_whole_and_of_this_code(design):
    content = critical_values.read_critical_values(design)
    assert content["result_digest"] == calibrate.result_digest(content)
    assert content["code_digest"] == calibrate.code_digest(design), "what simulates has changed: `make nulls`"
    assert content["campaigns_per_null"] >= 3000
    assert set(content["false_alarms"]) == set(calibrate.nulls_of(design))
    assert max(float(rates["rule"]) for rates in content["false_alarms"].values()) <= 0.045
    assert max(float(rates["leak"]) for rates in content["false_alarms"].values()) <= 0.0401


@pytest.mark.parametrize("design", FAST, ids=critical_values.file_name)
def test_the_first_batch_comes_out_the_same(design):
    stated = critical_values.read_critical_values(design)["first_batch"]
    for name, world in calibrate.nulls_of(design).items():
        seed = (calibrate.SEED, calibrate.NULL_NUMBERS[name])
        runs = calibrate.least_levels(world, design, seed, calibrate.BATCH)
        assert calibrate.first_batch(runs[:, -1]) == stated[name]


def test_nulls_of_the_board_belong_to_designs_with_one():
    names = set(calibrate.nulls_of(Design(board_rows=0, submissions=0)))
    assert set(calibrate.nulls_of(Design())) == set(worlds.CALIBRATION)
    assert names == {"healthy", "noise", "dev easier by 1.0 in all", "dev harder by 1.0 in all"}


def test_quantiles_are_cut_to_the_safe_side():
    assert calibrate._text(0.0023456, calibrate.ROUND_FLOOR) == "0.002345"
    assert calibrate._text(4.10551, calibrate.ROUND_CEILING) == "4.106"


def test_a_small_calibration_is_the_same_again_and_spends_what_it_may():
    design = Design(rounds=2, arms=4, families=2, dev_items=30, fresh_items=30, board_rows=200, submissions=2)
    result = calibrate.calibrate(design, 200)
    assert result == calibrate.calibrate(design, 200)
    for rates in result["false_alarms"].values():
        assert Decimal(rates["gap"]) <= Decimal("0.018") and Decimal(rates["board"]) <= Decimal("0.0225")


def test_what_combine_divides_e_by_comes_from_this_code():
    content = json.loads((critical_values.HERE / critical_values.E_VALUES).read_text())["designs"]
    for design in (design for design in critical_values.GRID if design.board_rows):
        stated = content[critical_values.file_name(design)]
        assert stated["code_digest"] == calibrate.code_digest(design), (
            "what simulates has changed: `evidence e-values --write`"
        )
        assert set(stated["largest_mean"]) == set(worlds.NULLS) and stated["campaigns_per_null"] >= 2000
        assert Decimal(stated["divisor"]) >= max(map(Decimal, stated["largest_mean"].values())) - Decimal("0.0001")
