"""The generative model has the properties that it states; the numpy rule decides as the exact one; numbers of a small report."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline.stats.critical_values import critical_values
from pipeline.stats.design import Design
from studies import alarm_table, policies, worlds
from studies.simulated import Sampler, World, batches, max_dev
from tests.support import ledgers
from tests.support.paths import ROOT

DESIGN = Design()


def test_numpy_and_exact_rule_decide_alike_on_random_ledgers():
    looks, alarms = ledgers.compare(60, seed=1)
    assert looks > 150 and 0.2 < alarms / looks < 0.8


@pytest.mark.slow
def test_numpy_and_exact_rule_decide_alike_on_thousands_of_ledgers():
    assert ledgers.compare(1000, seed=2)[0] > 2500  # 10,000: python -m tests.support.ledgers 10000


@pytest.mark.parametrize(
    "environment",
    [{}, {"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "77", "LC_ALL": "de_DE.UTF-8"}, {"LC_ALL": "tr_TR.UTF-8"}],
)
def test_exact_verdicts_have_the_same_digits_in_any_environment(environment):
    code = (
        "import locale\n"
        "try: locale.setlocale(locale.LC_ALL, '')\n"
        "except locale.Error: pass\n"
        "from tests.support.verdicts import digest; print(digest())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    from tests.support.verdicts import digest

    assert ran.stdout.strip() == digest()


def test_two_equal_models_disagree_on_13_of_100_items():
    rng = np.random.default_rng(2)
    levels = np.array([float(level) for level in DESIGN.accuracies])[:, None]
    answers = Sampler.new(rng, (20, 6, 2000), levels).answers(np.broadcast_to(levels, (20, 6, 2)))
    assert (answers[:, :, 0] ^ answers[:, :, 1]).mean() == pytest.approx(0.13, abs=0.004)
    assert answers.mean((0, 2, 3)) == pytest.approx(levels[:, 0], abs=0.01)


def test_the_same_seed_is_the_same_campaign_whatever_the_number():
    short, long = (next(iter(batches(World(), DESIGN, max_dev, (4,), num))) for num in (50, 120))
    assert np.array_equal(short[-1].board, long[-1].board) and np.array_equal(short[2].dev.right, long[2].dev.right)


def test_an_exploit_is_where_its_world_puts_it():
    def gaps(world: World) -> tuple[float, float]:
        """Weakest family, last round: dev over fresh, and (all families) board over truth."""
        rounds = [last for runs in batches(world, DESIGN, max_dev, (5,), 200) for last in [runs[-1]]]
        dev = np.mean([(each.dev.right[:, -1].mean() - each.fresh.right[:, -1].mean()) / 300 for each in rounds])
        reference = np.mean([(each.dev.reference[:, -1] - each.fresh.reference[:, -1]).mean() / 300 for each in rounds])
        board = np.mean([(each.board - each.board_reference[:, None] - each.truth).mean() for each in rounds])
        return float(dev - reference), float(board)

    assert gaps(worlds.DESIGNED["G_flat"])[0] == pytest.approx(0.135, abs=0.02)  # 13.7 points in statistics.md 5.1
    assert gaps(worlds.DESIGNED["X_flat"]) == pytest.approx((0, 0), abs=0.01)
    assert gaps(worlds.DESIGNED["leaky"])[1] == pytest.approx(0.135 / 6, abs=0.006)
    assert gaps(worlds.NULLS["healthy"]) == pytest.approx((0, 0), abs=0.01)


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


def test_the_rule_chooses_better_than_dev_where_dev_lies():
    critical = critical_values(DESIGN)
    cost = {
        policy: policies.regret(worlds.DESIGNED["G_rev"], policy, DESIGN, critical, (9,), 100)[1].mean()
        for policy in ("max dev", "rule")
    }
    assert cost["rule"] < cost["max dev"] - 0.3


def test_an_upper_bound_is_exact():
    assert alarm_table.upper_95(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert alarm_table.upper_95(100, 100) == 1
