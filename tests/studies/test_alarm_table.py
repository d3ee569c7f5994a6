"""Test the table of alarms: rates of a small report agree with the design, and bounds are exact."""

import pytest

from pipeline.stats.critical_values import critical_values
from pipeline.stats.design import Design
from studies import alarm_table, worlds

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
