"""Test the exact values of arms against a plain computation, what they must never do, and how verdicts are written."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Outcome
from pipeline.stats import alarms, arm_values, shift_test
from pipeline.stats.critical_values import bounds
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.overfit_test import ALL
from tests.support.ledgers import exact_rounds, ledger
from tests.support.paths import ROOT
from tests.support.verdicts import digest


def plain_values(
    design: Design, rounds: list[dict[str, Any]], carried: np.ndarray, suspect: np.ndarray
) -> Iterator[np.ndarray]:
    """(A,) values of each round, in floats from the answers themselves. carried, suspect: (F,)."""
    weight, m, n = 1 / design.families, design.dev_items, design.fresh_items
    own = np.mean([each[name][0].var(1, ddof=1).mean(1) for each in rounds for name in ("dev", "fresh")], 0)
    odds = float(arm_values.STOPPED_PRIOR) * carried
    slopes = 1 - odds / (1 - float(arm_values.STOPPED_PRIOR) + odds.sum())
    for each in rounds:
        dev, fresh = (
            (each[name][0].mean(2) - each[f"{name}_reference"][0].mean(1, keepdims=True)).T for name in ("dev", "fresh")
        )
        raw = np.where(suspect, fresh, (m * dev + n * fresh) / (m + n))
        error = own / np.where(suspect, n, m + n)
        spread = np.maximum(float(shift_test.LEAST_SPREAD), raw.var(0, ddof=1) - error)
        kept = spread / (spread + error)
        level = np.where(suspect, raw.mean(0), dev.mean(0))
        effects = weight * slopes * (level + kept * (raw - raw.mean(0)))
        value, scored = effects.sum(1), each["scored"]
        if len(scored) > 1:
            residual = each["board"][scored] - value[scored]
            around = (effects - effects.mean(0))[scored]
            doubt = weight**2 * (kept * error).sum() + float(shift_test.HEALTHY_SD) ** 2 * (around**2).sum(1)
            noise = float(shift_test.PRINT_VARIANCE) + weight**2 * own.sum() / (weight * design.board_rows)
            value[scored] += doubt / (doubt + noise) * (residual - residual.mean())
        yield value


@pytest.mark.parametrize("seed", range(8))
def test_values_are_those_of_a_plain_computation(seed):
    rng = np.random.default_rng([55, seed])
    design, rounds = ledger(rng)
    critical, suspect = CriticalValues.from_json(bounds(design)), rng.random(design.families) < 0.4
    seen = exact_rounds(rounds)
    verdict = alarms.verdict(seen, design, critical)
    permitted = {f"family{i}": not flag for i, flag in enumerate(suspect)}
    values = arm_values.arm_values(seen, verdict, permitted, design, use_board=design.submissions > 0)
    carried = np.array([float(verdict.board.carried[family]) for family in sorted(permitted)])
    for found, expected in zip(values, plain_values(design, rounds, carried, suspect), strict=True):
        assert [float(found[arm]) for arm in sorted(found)] == pytest.approx(list(expected), rel=1e-8, abs=1e-12)


def outcome(name: str, dev: str, fresh: str) -> Outcome:
    return Outcome(
        name, "axis", "completed", "", outcomes={"dev": {"roman": dev}, "fresh": {"roman": fresh} if fresh else {}}
    )


def test_a_round_is_counted_from_its_outcomes():
    reference = outcome("reference", "1000", "0100")
    arms = [
        outcome("a1", "1100", "0101"),
        Outcome("a2", "axis", "failed", "diverged"),
        outcome("a3", "1111", ""),
        outcome("a4", "1110", "01T1"),
    ]
    found = alarms.round_counts(reference, arms, {"a4": Decimal("0.84"), "a3": Decimal("0.9")}, Decimal("0.8"))
    assert (found.names, found.ahead, found.scores) == (("a1", "a4"), 1, {1: Decimal("0.04")})
    assert found.dev["roman"].right == (2, 3) and found.fresh["roman"].right == (2, 2)
    with pytest.raises(IntegrityError, match="cannot be paired"):
        alarms.round_counts(reference, [outcome("a1", "11", "01")], {}, Decimal(0))


def test_a_suspect_board_has_no_word():
    design, rounds = ledger(np.random.default_rng([57, 2]))
    seen = exact_rounds(rounds)
    verdict = alarms.verdict(seen, design, CriticalValues.from_json(bounds(design)))
    permitted = dict.fromkeys(seen[0].dev, True)
    silent = [replace(each, scores={}) for each in seen]
    assert arm_values.arm_values(seen, verdict, permitted, design, use_board=False) == arm_values.arm_values(
        silent, verdict, permitted, design
    )


def test_a_repaired_family_begins_anew_at_half_the_level():
    design, rounds = ledger(np.random.default_rng([58, 1]))
    seen, critical = exact_rounds(rounds), CriticalValues.from_json(bounds(design))
    wide = replace(critical, gap_level=Fraction(1, 2), gap_suspect_level=Fraction(1, 2))
    family, last = sorted(seen[0].dev)[0], len(seen) - 1
    whole = alarms.verdict(seen, design, wide)
    anew = alarms.verdict(seen, design, wide, {family: alarms.Terms(last, Fraction(1, 2))})
    assert {test.since for test in anew.gap_suspects if test.family in (family, ALL)} <= {last}
    assert [test for test in anew.gap_suspects if test.family not in (family, ALL)] == [
        test for test in whole.gap_suspects if test.family not in (family, ALL)
    ]
    assert (anew.board, anew.leak) == (whole.board, whole.leak)


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
    assert ran.stdout.strip() == digest()
