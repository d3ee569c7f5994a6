"""Test the critical values that ship and the bounds for any design. tests/studies/test_calibrate.py computes the values again."""

import pytest

from pipeline.campaign.errors import IntegrityError, NotFound
from pipeline.stats import critical_values
from pipeline.stats.design import CriticalValues, Design


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


def test_what_e_is_divided_by_is_known_for_every_design_with_a_board():
    for design in critical_values.GRID:
        if design.board_rows:
            assert 1 <= critical_values.e_divisor(design) < 3
    with pytest.raises(NotFound, match="No simulation says how large E is for Design"):
        critical_values.e_divisor(Design(dev_items=90, fresh_items=110, submissions=2))


@pytest.mark.parametrize(
    "damage", ["", "{}", "[]", '{"designs": {"NAME": {}}}', '{"designs": {"NAME": {"divisor": "0.9"}}}']
)
def test_damaged_divisors_are_an_integrity_error(tmp_path, damage):
    (tmp_path / critical_values.E_VALUES).write_text(damage.replace("NAME", critical_values.file_name(Design())))
    with pytest.raises(IntegrityError, match="holds no divisors of E"):
        critical_values.e_divisor(Design(), tmp_path)
    with pytest.raises(IntegrityError, match="holds no divisors of E"):
        critical_values.e_divisor(Design(), tmp_path / "nowhere")
