"""Random campaigns of runs that compare `pipeline/claims` with its numpy twin: often with a crashed arm, one repeat of the reference, or none."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pipeline.campaign import facts
from pipeline.claims import assess_claims, runs
from pipeline.claims.assess_claims import CONFIRMATIONS, FINAL_ROUND, Claims
from pipeline.claims.claim_test import Comparison
from pipeline.claims.runs import Run
from studies.claims import claim_twin
from studies.claims.claim_twin import AXIS, NONE, OVERWRITES, REFERENCE, STANDING, Found, Runs

ARMS = 8
KINDS = {REFERENCE: runs.REFERENCE, AXIS: runs.AXIS, OVERWRITES: runs.AXIS, STANDING: runs.STANDING}


@dataclass(frozen=True)
class Ledger:
    """One campaign: its runs, the same as arrays for the twin, and how it confirms."""

    exact: list[Run]
    arrays: Runs
    confirmation: str

    @property
    def rounds(self) -> int:
        return self.arrays.kind.shape[1]


def ledger(rng: np.random.Generator) -> Ledger:
    """A campaign of 2 to 8 rounds in which about half of the questions have an answer that is not the usual one."""
    rounds, items = int(rng.integers(2, 9)), int(rng.integers(20, 1000))
    confirmation = str(rng.choice(list(CONFIRMATIONS)))
    gain, luck = rng.normal(0, 0.06), rng.choice([0, 0.003, 0.02])
    kind = np.array([_kinds(number, rng) for number in range(1, rounds + 1)])
    kind[rng.random(kind.shape) < rng.choice([0, 0.1, 0.4])] = NONE
    truth = rng.normal(0, luck, kind.shape) + gain * (kind == STANDING)
    truth -= 0.4 * ((kind == AXIS) & (rng.random(kind.shape) < 0.1))
    over = np.rint(truth * items + rng.normal(0, 0.3 * items**0.5 * (luck > 0), kind.shape)).astype(int)
    over = np.clip(over, -items, items)
    split = np.minimum(items, np.abs(over) + rng.integers(0, 1 + items // 8, kind.shape) * bool(luck))
    exact = []
    for q, arm in np.argwhere(kind != NONE):
        lift = Fraction(int(over[q, arm]), items)
        variance = (int(split[q, arm]) - items * lift**2) / (items * (items - 1))
        name = KINDS[int(kind[q, arm])]
        exact.append(Run(int(q) + 1, f"a{arm}", name, lift, variance, bool(kind[q, arm] == OVERWRITES)))
    lift, variance = np.zeros(kind.shape), np.zeros(kind.shape)
    for run in exact:
        lift[run.round - 1, int(run.arm[1:])], variance[run.round - 1, int(run.arm[1:])] = run.lift, run.variance
    return Ledger(exact, Runs(kind[None], lift[None], variance[None]), confirmation)


def _kinds(number: int, rng: np.random.Generator) -> list[int]:
    """The kinds of a round's arms: at times without repeats, from round 2 on often with standing runs."""
    repeats = [REFERENCE] * int(rng.integers(0, 4))
    standing = [STANDING] * int(rng.integers(0, 4) if number > 1 else 0)
    rest = rng.choice([AXIS, AXIS, OVERWRITES, NONE], ARMS - len(repeats) - len(standing))
    return [*repeats, *map(int, rest), *standing]


def compare(found: Ledger, twin: Found, number: int, exact: Claims) -> dict[str, bool]:
    """What was said after round `number`. Raises AssertionError where the two paths say different things."""
    runs_so_far = twin_runs(found, twin, number)
    is_final = found.confirmation == FINAL_ROUND
    if number >= 2 and not (is_final and number < found.rounds):
        for comparison, trimmed in ((exact.improvement, False), (exact.worse_standing, True)):
            _same(comparison, claim_twin.standing_over_reference(runs_so_far, is_final, trimmed))
    said = {
        "claimed": (exact.is_claimed, bool(twin.claimed[0, number - 1])),
        "worse standing": (exact.worse_standing.is_shown, bool(twin.worse_standing[0, number - 1])),
    }
    arms = {f"a{arm}" for arm in np.flatnonzero(twin.worse_arms[0, number - 1])}
    assert set(exact.shown_worse) == arms, f"{exact.shown_worse} and {arms}"
    for question, (ours, theirs) in said.items():
        assert ours == theirs, f"{question}: {ours} and {theirs}"
    return {name: ours for name, (ours, _) in said.items()} | {"worse arm": bool(arms)}


def twin_runs(found: Ledger, twin: Found, number: int) -> Runs:
    """The runs so far without the arms that are shown to be worse."""
    so_far = found.arrays.until(number)
    return Runs(np.where(twin.worse_arms[:, :number], NONE, so_far.kind), so_far.lift, so_far.variance)


def _same(exact: Comparison, twin: claim_twin.Contrast) -> None:
    if exact.not_evaluated:
        assert np.isnan(twin.difference[0]), f"{exact.not_evaluated}, but the twin evaluates it"
        return
    assert math.isclose(exact.difference, twin.difference[0], abs_tol=1e-12)
    assert math.isclose(exact.variance, twin.variance[0], rel_tol=1e-9)
    assert exact.degrees == twin.degrees[0]


def compare_many(num: int, seed: int) -> dict[str, int]:
    """How often each thing was said in `num` campaigns. Raises AssertionError at the first that the two paths judge differently."""
    rules, said = facts.load_constitution(), {"looks": 0, "not evaluated": 0}
    for number in range(num):
        found = ledger(np.random.default_rng([seed, number]))
        twin = claim_twin.every_round(found.arrays, found.confirmation, rules)
        for last in range(1, found.rounds + 1):
            so_far = [run for run in found.exact if run.round <= last]
            exact = assess_claims.claims_after(so_far, last, found.rounds, found.confirmation, rules)
            for name, is_said in compare(found, twin, last, exact).items():
                said[name] = said.get(name, 0) + is_said
            said["looks"] += 1
            said["not evaluated"] += bool(exact.improvement.not_evaluated)
    return said


if __name__ == "__main__":
    print(compare_many(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
