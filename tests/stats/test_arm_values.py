"""Who is best: the exact choice against the simulated policy's, and what it must never do."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Outcome
from pipeline.stats import alarms, arm_values
from pipeline.stats.critical_values import bounds
from pipeline.stats.design import CriticalValues
from pipeline.stats.overfit_test import ALL
from studies import policies
from studies.rule_twin import Twin
from studies.simulated import RoundSeen, counts_of
from tests.support.ledgers import exact_rounds, ledger


def simulated(rounds: list[dict[str, Any]]) -> list[RoundSeen]:
    return [
        RoundSeen(
            *(counts_of(each[item_set], each[f"{item_set}_reference"]) for item_set in ("dev", "fresh")),
            each["board"][None], np.array([each["board_reference"]]), np.zeros((1, len(each["board"]))),
        )
        for each in rounds
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_values_are_those_of_the_simulated_policy(seed):
    rng = np.random.default_rng([55, seed])
    design, rounds = ledger(rng)
    critical, suspect = CriticalValues.from_json(bounds(design)), rng.random(design.families) < 0.4
    seen, arrays = exact_rounds(rounds), simulated(rounds)
    policy = policies.Rule(
        design,
        critical,
        suspects=suspect[None],
        leaks=np.array([False]),
        twin=Twin(design, design.families),
        seen=arrays,
    )
    for number, each in enumerate(rounds):
        policy.twin.take(arrays[number])
        policy.scored.append(each["scored"][None])
        policy.look = policy.twin.look(each["scored"][None], np.array([each["ahead"]]))
    permitted = {f"family{i}": not flag for i, flag in enumerate(suspect)}
    values = arm_values.arm_values(
        seen, alarms.verdict(seen, design, critical), permitted, design, use_board=design.submissions > 0
    )
    for number, found in enumerate(values):
        assert [float(found[arm]) for arm in sorted(found)] == pytest.approx(
            list(policy._value(number)[0]), rel=1e-8, abs=1e-12
        )


def test_slots_are_those_of_the_twin_in_the_first_round():
    compared = 0
    for seed in range(12):
        design, rounds = ledger(np.random.default_rng([56, seed]))
        if design.submissions < 2:
            continue
        twin, seen, first = Twin(design, design.families), exact_rounds(rounds)[:1], rounds[0]["ahead"]
        twin.take(simulated(rounds)[0])
        chosen = arm_values.submissions(seen, design, [first], design.submissions)
        assert chosen == list(twin.choose(np.array([first]), design.submissions)[0])
        assert chosen[0] == first and sorted(chosen) == sorted(set(chosen))
        compared += 1
    assert compared > 3


def test_ties_go_to_the_earlier_round_and_the_lower_arm():
    values = [{0: Decimal(1), 1: Decimal(2)}, {0: Decimal(2), 1: Decimal(2)}]
    assert arm_values.best(values, [("a0", "a1"), ("a2", "a3")]) == (0, "a1")


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
