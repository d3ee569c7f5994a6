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
from scipy.optimize import brentq
from scipy.stats import norm

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Outcome
from pipeline.stats import alarms, arm_values, difficulty, shift_test
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
    fresh_shares = np.array([each["fresh_reference"][0].sum(1) for each in rounds]).sum(0) + 0.5
    levels = norm.ppf(fresh_shares / (n * len(rounds) + 1))
    if any(len(each["scored"]) for each in rounds):
        total = (rounds[0]["board_reference"] * design.board_rows + 0.5) / (design.board_rows + 1)
        levels = levels + brentq(lambda offset: norm.cdf(levels + offset).mean() - total, -9, 9, xtol=1e-14)
    sets = [(each[name][0], each[f"{name}_reference"][0]) for each in rounds for name in ("dev", "fresh")]
    shares = [(reference.sum(1) + 0.5) / (reference.shape[1] + 1) for _, reference in sets]
    noise = sum(answers.var(1, ddof=1).mean(1) for answers, _ in sets) / sum(share * (1 - share) for share in shares)
    own = noise * norm.pdf(levels) ** 2
    odds = float(arm_values.STOPPED_PRIOR) * carried
    slopes = 1 - odds / (1 - float(arm_values.STOPPED_PRIOR) + odds.sum())

    def lift(effects: np.ndarray) -> np.ndarray:
        return np.asarray(norm.cdf(levels + effects) - norm.cdf(levels))

    for each in rounds:
        effects, known = {}, {}
        for name, items in (("dev", m), ("fresh", n)):
            reference = (each[f"{name}_reference"][0].sum(1) + 0.5) / (items + 1)
            arms = (each[name][0].sum(2) + 0.5) / (items + 1)
            effects[name] = (norm.ppf(arms) - norm.ppf(reference)[:, None]).T
            known[name] = items * norm.pdf(norm.ppf(reference)) ** 2 / (reference * (1 - reference))
        from_dev = np.where(suspect, 0, known["dev"])
        items = from_dev + known["fresh"]
        raw = lift((from_dev * effects["dev"] + known["fresh"] * effects["fresh"]) / items)
        error = own / items
        spread = np.maximum(float(shift_test.LEAST_SPREAD), raw.var(0, ddof=1) - error)
        kept = spread / (spread + error)
        level = np.where(suspect, raw.mean(0), lift(effects["dev"]).mean(0))
        effect = weight * slopes * (level + kept * (raw - raw.mean(0)))
        value, scored = effect.sum(1), each["scored"]
        if len(scored) > 1:
            residual = each["board"][scored] - each["board_reference"] - value[scored]
            around = (effect - effect.mean(0))[scored]
            doubt = weight**2 * (kept * error).sum() + float(difficulty.HEALTHY_SD) ** 2 * (around**2).sum(1)
            hidden = weight**2 * (noise * norm.cdf(levels) * norm.cdf(-levels)).sum() / (weight * design.board_rows)
            printing = float(difficulty.PRINT_VARIANCE) + hidden
            value[scored] += doubt / (doubt + printing) * (residual - residual.mean())
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
    assert found.reference_score == Decimal("0.8")
    assert alarms.round_counts(reference, arms, {"a4": Decimal("0.84")}, None).scores == {}
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
    [
        {},
        {"PYTHONHASHSEED": "1"},
        {"PYTHONHASHSEED": "77", "LC_ALL": "de_DE.UTF-8"},
        {"LC_ALL": "tr_TR.UTF-8"},
        {"DIGITS_OF_THE_CALLER": "6"},
        {"DIGITS_OF_THE_CALLER": "60"},
    ],
)
def test_exact_verdicts_have_the_same_digits_in_any_environment(environment):
    code = (
        "import decimal, locale, os\n"
        "decimal.getcontext().prec = int(os.environ.get('DIGITS_OF_THE_CALLER', '28'))\n"
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
