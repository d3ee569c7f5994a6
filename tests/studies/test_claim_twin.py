"""Test that the numpy rules of claims and canaries say what the exact ones say, on random runs and random answers."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.campaign import facts
from pipeline.campaign.records import Outcome
from pipeline.stats import canaries
from pipeline.stats.alarms import round_counts
from pipeline.stats.lifts import paired_lift
from studies.claims import canary_twin, claim_twin
from studies.claims.claim_twin import AXIS, NONE, REFERENCE, STANDING, Runs
from tests.support import claim_ledgers

CONSTITUTION = facts.load_constitution()


def test_twin_and_exact_rules_say_the_same_on_random_campaigns():
    said = claim_ledgers.compare_many(60, seed=1)
    assert said["looks"] > 250 and 0.3 < said["not evaluated"] / said["looks"] < 0.9
    assert min(said["claimed"], said["worse standing"], said["worse arm"]) > 8


@pytest.mark.long
def test_twin_and_exact_rules_say_the_same_on_thousands_of_campaigns():
    assert (
        claim_ledgers.compare_many(1000, seed=2)["looks"] > 4000
    )  # 10,000: python -m tests.support.claim_ledgers 10000


def runs_of(kinds: list[list[int]], lifts: list[list[float]], variance: float = 0.0002) -> Runs:
    kind, lift = np.array([kinds]), np.array([lifts], float)
    return Runs(kind, lift, np.full(lift.shape, variance))


ROUND_1 = [REFERENCE, REFERENCE, AXIS, AXIS, AXIS, AXIS]
ROUND_2 = [REFERENCE, STANDING, AXIS, AXIS, AXIS, AXIS]
LIFTS = [[0.0, 0.02, 0.01, -0.01, 0.02, 0.0], [0.01, 0.21, 0.19, 0.2, 0.22, 0.21]]


def test_the_contrast_is_the_one_of_the_formula():
    found = claim_twin.standing_over_reference(runs_of([ROUND_1, ROUND_2], LIFTS))
    repeats, arms, own = np.array([0.0, 0.02, 0.01]), np.array([0.19, 0.2, 0.22, 0.21]), 0.0001
    one_arm, one_repeat = arms.var(ddof=1), max(repeats.var(ddof=1), own)
    shared = ((0 - 2 / 3) ** 2 + (1 - 1 / 3) ** 2) * own
    assert found.difference[0] == pytest.approx(0.21 - 0.01)
    assert found.variance[0] == pytest.approx(one_arm + one_repeat / 3 + shared)
    assert found.degrees[0] == np.floor(found.variance[0] ** 2 / (one_arm**2 / 3 + (one_repeat / 3) ** 2 / 2))


@pytest.mark.parametrize("kind", [REFERENCE, STANDING, AXIS])
def test_without_runs_of_a_kind_nothing_is_evaluated(kind):
    kinds = np.array([ROUND_1, ROUND_2])
    runs = runs_of(np.where(kinds == kind, NONE, kinds).tolist(), LIFTS)
    assert np.isnan(claim_twin.standing_over_reference(runs).difference[0])
    assert not claim_twin.every_round(runs, "running", CONSTITUTION).claimed.any()


def test_an_arm_that_is_shown_to_be_worse_hides_no_improvement():
    lifts = [LIFTS[0], [*LIFTS[1][:2], -0.5, *LIFTS[1][3:]]]
    kinds = [ROUND_1, ROUND_2]
    found = claim_twin.every_round(runs_of(kinds, lifts), "running", CONSTITUTION)
    assert found.worse_arms[0].tolist() == [[False] * 6, [False, False, True, False, False, False]]
    assert found.claimed[0].tolist() == [False, True]


def answers(rng: np.random.Generator, families: int, items: int, wrong: float) -> dict[str, str]:
    chances = [1 - wrong, wrong * 0.7, wrong * 0.3]
    return {f"f{number}": "".join(rng.choice(["1", "0", "T"], items, p=chances)) for number in range(families)}


def test_canaries_fire_as_the_exact_ones_do():
    fired = evaluated = 0
    for seed in range(60):
        rng = np.random.default_rng([9, seed])
        families, items, rounds, arms = 3, int(rng.integers(8, 60)), int(rng.integers(1, 6)), 5
        kind = rng.choice([REFERENCE, AXIS, STANDING, NONE], (rounds, arms), p=[0.4, 0.3, 0.2, 0.1])
        kind[-1, 0] = AXIS
        worse = rng.choice([0.0, 0.5])
        played = []
        for number in range(rounds):
            difficulty = 0.3 + 0.4 * (rng.random() < 0.3) * (number == rounds - 1)
            reference = outcome("reference", answers(rng, families, items, difficulty))
            of_round = [
                outcome(f"a{arm}", answers(rng, families, items, min(0.9, 0.3 + worse * (kind[number, arm] == AXIS))))
                for arm in range(arms)
            ]
            for run in of_round[: arms // 2]:  # equal runs, as in a quiet campaign
                run.outcomes["fresh"]["f1"] = of_round[0].outcomes["fresh"]["f1"]
            played.append((reference, of_round))
        exact, twin = exact_canaries(kind, played), twin_canaries(kind, played, items)
        assert exact == twin, seed
        fired, evaluated = fired + sum(map(len, exact)), evaluated + 1
    assert 20 < fired < 400 and evaluated == 60


def outcome(arm: str, fresh: dict[str, str]) -> Outcome:
    return Outcome(arm, "axis", "completed", "completed", outcomes={"dev": dict(fresh), "fresh": dict(fresh)})


def exact_canaries(kind, played) -> list[set[str]]:
    counted = [round_counts(reference, runs, {}, 0) for reference, runs in played]
    repeats = [
        (runs[arm], reference)
        for row, (reference, runs) in zip(kind, played, strict=True)
        for arm in np.flatnonzero(row == REFERENCE)
    ]
    others = [played[-1][1][arm] for arm in np.flatnonzero((kind[-1] != REFERENCE) & (kind[-1] != NONE))]
    families = sorted(played[0][0].outcomes["fresh"])
    return [set(canaries.fired(family, others, repeats, counted, played[-1][0])) for family in families]


def twin_canaries(kind, played, items: int) -> list[set[str]]:
    families = sorted(played[0][0].outcomes["fresh"])

    def counted(mark: str):
        return np.array(
            [[[run.outcomes["fresh"][f].count(mark) for f in families] for run in runs] for _, runs in played]
        )

    reference = np.array([[ref.outcomes["fresh"][f].count("1") for f in families] for ref, _ in played])
    variance = np.array(
        [
            [[float(paired_lift(run, ref, "fresh", families=[f]).variance) for f in families] for run in runs]
            for ref, runs in played
        ]
    )
    runs = Runs(kind[None], np.zeros((1, *kind.shape)), np.zeros((1, *kind.shape)))
    fired = canary_twin.canaries(runs, counted("1")[None], counted("T")[None], reference[None], variance[None], items)
    names = ("generator_drift", "truncation", "worst_family")
    return [{name for name, flag in zip(names, row, strict=True) if flag} for row in fired[0]]


def test_a_round_spends_its_part_of_the_level():
    """At the edge: a difference that is exactly the quantile's reach is no claim, and one that is just above it is."""
    runs = runs_of([ROUND_1, ROUND_2], LIFTS)
    found = claim_twin.standing_over_reference(runs)
    level = CONSTITUTION.claim_level(2)
    reach = claim_twin.quantile(level, found.degrees) * found.variance**0.5
    for shift, expected in ((-1e-9, False), (1e-9, True)):
        assert replace(found, difference=reach + shift).exceeds(level)[0] == expected
