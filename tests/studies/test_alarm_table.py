"""Test the table of alarms: rates of a small report agree with the design, and bounds are exact."""

import numpy as np
import pytest

from pipeline.stats.critical_values import critical_values
from pipeline.stats.design import Design
from studies import alarm_table, simulated, worlds

DESIGN = Design()


def test_a_small_report_is_in_line_with_the_design():
    critical = critical_values(DESIGN)
    for number, (name, least, most) in enumerate(
        (("healthy", 0, 0.06), ("het", 0, 0.09), ("G_rev", 0.88, 1), ("X_rev", 0.4, 0.7))
    ):
        world = {**worlds.NULLS, **worlds.DESIGNED}[name]
        found = alarm_table.alarms(world, DESIGN, critical, 100 + number, 200)
        assert least <= found.rate("rule") <= most, name
        for rates in (each["false_alarm_or_power_by_round"] for each in found.as_json().values()):
            assert len(rates) == 4 and rates == sorted(rates)
        assert alarm_table.power_met(name, found) in (None, True)


def test_an_upper_bound_is_exact():
    assert alarm_table.upper_95(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert alarm_table.upper_95(100, 100) == 1


def test_combinations_are_products_and_means_of_campaigns_that_follow_one_another():
    values = np.array([[1, 4.0], [1, 6.0], [30, 0.1], [1, 0.1], [9, 9.0]])  # five campaigns after each of two rounds
    both = alarm_table.Combined.of(values, 2)  # the fifth has no partner
    assert both.product.tolist() == [True, True]  # 4 x 6 in round 2, 30 x 1 in round 1
    assert both.mean.tolist() == [False, False]  # 5 and 15.5
    alone = alarm_table.Combined.of(values, 1)
    assert alone.product.tolist() == alone.mean.tolist() == [False, False, True, False, False]


def test_ten_campaigns_of_one_target_have_its_slopes(monkeypatch):
    played = []

    def play(world, design, rng, num):
        played.append((world, num))
        return simulated.play(world, design, rng, num)

    monkeypatch.setattr(alarm_table, "play", play)
    design = Design(rounds=2, arms=4, families=3, dev_items=20, fresh_items=20, board_rows=60, submissions=2)
    values = alarm_table.e_values_of_one_target(worlds.NULLS["het"], design, 0, 25)
    assert values.shape == (20, 2) and (values > 0).all()
    (low, high), (other, _) = (world.slope_range for world, _ in played)
    assert [num for _, num in played] == [10, 10]
    assert low.shape == (3, 1) and (low == high).all() and (low != other).all()
    assert ((0.6 <= low) & (low <= 1.4)).all()


def test_e_of_the_board_test_is_an_e_value_where_nothing_is_wrong_and_grows_where_fresh_is_fooled():
    """docs/evidence.md has the rates of 20,000 campaigns."""
    for number, world in enumerate(worlds.NULLS.values()):
        values = alarm_table.e_values(world, Design(), number, 200)
        standard_error = values.std(0) / len(values) ** 0.5
        assert (values.mean(0) <= 1 + 3 * standard_error).all()
        assert alarm_table.Combined.of(values, 5).product.mean() <= 0.05
    decayed = alarm_table.e_values(worlds.DESIGNED["X_flat"], Design(), 3, 200)
    rates = [alarm_table.Combined.of(decayed, together).product.mean() for together in alarm_table.TOGETHER]
    assert rates == sorted(rates) and rates[0] > 0.1 and rates[2] > 0.6
