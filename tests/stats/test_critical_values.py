"""Critical values that ship: whole, of this code, reproducible; and a refusal that names the nearest for any other design."""

import hashlib
import json
from decimal import Decimal

import pytest

from pipeline.campaign.errors import IntegrityError, NotFound
from pipeline.stats import critical_values
from pipeline.stats.design import CriticalValues, Design
from studies import calibrate, worlds

FAST = (critical_values.GRID[0], Design(families=3, dev_items=100, fresh_items=100, board_rows=0, submissions=0))


@pytest.mark.parametrize("design", critical_values.GRID, ids=critical_values.file_name)
def test_a_shipped_file_is_whole_and_of_this_code(design):
    content = critical_values.read_critical_values(design)
    stated = content.pop("result_digest")
    assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == stated
    assert content["code_digest"] == calibrate.code_digest(design), "what simulates has changed: `make nulls`"
    assert content["campaigns_per_null"] == 20_000
    assert set(content["false_alarms"]) == set(worlds.NULLS)
    assert max(float(rates["rule"]) for rates in content["false_alarms"].values()) <= 0.045
    assert max(float(rates["leak"]) for rates in content["false_alarms"].values()) <= 0.0251


@pytest.mark.parametrize("design", FAST, ids=critical_values.file_name)
def test_the_first_batch_comes_out_the_same(design):
    stated = critical_values.read_critical_values(design)["first_batch"]
    for name, number in calibrate.NULL_NUMBERS.items():
        runs = calibrate.maxima(worlds.NULLS[name], design, (calibrate.SEED, number), calibrate.BATCH)
        assert calibrate.first_batch(runs[:, -1]) == stated[name]


def test_bounds_are_no_less_strict_than_what_is_simulated():
    for design in critical_values.GRID:
        safe, simulated = (
            CriticalValues.from_json(critical_values.bounds(design)),
            critical_values.critical_values(design),
        )
        assert safe.gap_level <= simulated.gap_level
        assert safe.board_alarm >= simulated.board_alarm
        assert safe.arm_level <= simulated.arm_level * 10  # the arms' tests are not least squares but single looks


def test_a_design_off_the_grid_is_refused_with_the_nearest():
    with pytest.raises(
        NotFound, match=r"The nearest of \d+ designs is Design\(rounds=4, arms=8, families=6, dev_items=100"
    ):
        critical_values.critical_values(Design(dev_items=90, fresh_items=110, submissions=2))


@pytest.mark.parametrize("damage", ["", "{}", '{"schema": 2}', "[]", '{"schema": 1, "design": {"rounds": 3}}'])
def test_a_damaged_file_is_an_integrity_error(tmp_path, damage):
    (tmp_path / critical_values.file_name(Design())).write_text(damage)
    with pytest.raises(IntegrityError, match="holds no critical values"):
        critical_values.critical_values(Design(), tmp_path)


def test_quantiles_are_cut_to_the_safe_side():
    assert calibrate._text(0.0023456, calibrate.ROUND_FLOOR) == "0.002345"
    assert calibrate._text(4.10551, calibrate.ROUND_CEILING) == "4.106"


def test_a_small_calibration_is_the_same_again_and_spends_what_it_may():
    design = Design(rounds=2, arms=4, families=2, dev_items=30, fresh_items=30, board_rows=200, submissions=2)
    result = calibrate.calibrate(design, 200)
    assert result == calibrate.calibrate(design, 200)
    for rates in result["false_alarms"].values():
        assert Decimal(rates["gap"]) <= Decimal("0.018") and Decimal(rates["board"]) <= Decimal("0.0225")


def test_what_does_not_compute_is_not_in_the_code_digest():
    assert calibrate._tokens('"""One."""\nx = (1,\n  2,)  # two\n') == calibrate._tokens("x = (1, 2)\n")
    assert calibrate._tokens("x = (1, 2)") != calibrate._tokens("x = (1, 3)")
