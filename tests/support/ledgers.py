"""Random campaigns that compare the exact rule with its numpy twin: any sizes and accuracies, often an exploit or a lost target."""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import Any

import numpy as np

from pipeline.stats.alarms import RoundCounts, Verdict, verdict
from pipeline.stats.counts import count
from pipeline.stats.design import CriticalValues, Design
from pipeline.stats.overfit_test import ALL
from studies.look_scores import LookScores
from studies.rule_twin import Twin
from studies.simulated import RoundSeen, Sampler, counts_of


def critical_at_random(rng: np.random.Generator) -> CriticalValues:
    """Levels and values that about half of the ledgers are beyond."""
    levels = {
        name: str(round(10 ** rng.uniform(-3, -0.5), 6))
        for name in ("gap_level", "gap_suspect_level", "arm_level", "leak_level")
    }
    return CriticalValues.from_json(
        {
            **levels,
            "board_alarm": str(round(rng.uniform(1, 3), 6)),
            "board_suspect": str(round(rng.uniform(1, 2), 6)),
        }
    )


def ledger(rng: np.random.Generator) -> tuple[Design, list[dict[str, Any]]]:
    """A design, and per round: arrays of answers, printed scores, the scored arms and the arm ahead on dev."""
    families, arms = int(rng.integers(1, 5)), int(rng.integers(3, 9))
    dev_items, fresh_items = (int(n) for n in rng.integers(20, 80, 2))
    design = Design(
        int(rng.integers(2, 5)),
        arms,
        families,
        dev_items,
        fresh_items,
        int(rng.integers(100, 2000)),
        int(rng.integers(0, arms + 1)),
    )
    levels = rng.uniform(0.1, 0.97, (1, families, 1))
    dev = Sampler.new(rng, (1, families, dev_items), levels[0])
    exploit = rng.uniform(0, 0.3) * (rng.random(families) < 0.3)[:, None]
    fooled, reference = rng.random() < 0.5, float(np.round(rng.uniform(0.3, 0.8), 3))
    rounds = []
    for number in range(design.rounds):
        lifts = rng.normal(0.02 * number, 0.04, (1, families, arms))
        gain = exploit * (number > 0)
        fresh = Sampler.new(rng, (1, families, fresh_items), levels[0])
        on_fresh = lifts + (gain if fooled else 0)
        board = np.round(reference + lifts.mean((0, 1)) + rng.normal(0, 0.02, arms), 2)
        dev_answers, fresh_answers = dev.answers(_clip(levels + lifts + gain)), fresh.answers(_clip(levels + on_fresh))
        ahead = int(dev_answers.sum((0, 1, 3)).argmax())
        order = [ahead, *(arm for arm in rng.permutation(arms) if arm != ahead)][: design.submissions]
        rounds.append({
            "dev": dev_answers, "dev_reference": dev.reference, "fresh": fresh_answers, "fresh_reference": fresh.reference,
            "board": board, "board_reference": reference, "scored": np.sort(np.array(order, int)), "ahead": ahead,
        })  # fmt: skip
    return design, rounds


def exact_rounds(rounds: list[dict[str, Any]]) -> list[RoundCounts]:
    """As the pipeline would hand them over: outcome strings and printed scores."""
    seen = []
    for each in rounds:
        counted = {
            item_set: {
                f"family{number}": count([_text(arm) for arm in family], _text(each[f"{item_set}_reference"][0, number]))
                for number, family in enumerate(each[item_set][0])
            }
            for item_set in ("dev", "fresh")
        }  # fmt: skip
        scores = {
            int(arm): Decimal(f"{each['board'][arm]:.2f}") - Decimal(f"{each['board_reference']:.3f}")
            for arm in each["scored"]
        }
        printed = Decimal(f"{each['board_reference']:.3f}")
        seen.append(RoundCounts(counted["dev"], counted["fresh"], scores, each["ahead"], reference_score=printed))
    return seen


def twin_looks(design: Design, rounds: list[dict[str, Any]]) -> list[LookScores]:
    twin, looks = Twin(design), []
    for each in rounds:
        counted = [counts_of(each[item_set], each[f"{item_set}_reference"]) for item_set in ("dev", "fresh")]
        twin.take(RoundSeen(counted[0], counted[1], each["board"][None], np.array([each["board_reference"]])))
        looks.append(twin.look(each["scored"][None], np.array([each["ahead"]])))
    return looks


def decisions(exact: Verdict, look: LookScores, critical: CriticalValues) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both paths decide, in the same words."""
    families = sorted(exact.upper_bounds)

    def named(tests: Any) -> set[str]:
        found = {test.family for test in tests}
        return set(families) if ALL in found else found

    def marked(flags: Any) -> set[str]:
        return {family for family, flag in zip(families, flags[0], strict=True) if flag}

    accused = look.board(critical.board_alarm)[0] or look.board(critical.board_suspect)[0]
    number = int(look.named()[0]) if accused else -1
    ours = {
        "gap": named(exact.gap_alarms), "suspect": named(exact.gap_suspects), "arm": named(exact.arm_alarms),
        "board": exact.board_alarm, "board suspect": exact.board_suspect, "named": exact.named_family, "leak": exact.leak_alarm,
    }  # fmt: skip
    theirs = {
        "gap": marked(look.gap(float(critical.gap_level))), "suspect": marked(look.gap(float(critical.gap_suspect_level))),
        "arm": marked(look.arm(float(critical.arm_level))), "board": bool(look.board(critical.board_alarm)[0]),
        "board suspect": bool(look.board(critical.board_suspect)[0]), "named": families[number] if number >= 0 else None,
        "leak": bool(look.leak(float(critical.leak_level))[0]),
    }  # fmt: skip
    return ours | {"alarm": exact.alarm}, theirs | {"alarm": any(theirs[test] for test in ("gap", "arm", "board"))}


def compare(num: int, seed: int) -> tuple[int, int]:
    """(looks compared, alarms among them). Raises AssertionError at the first ledger that is decided differently."""
    looks = alarms = 0
    for number in range(num):
        rng = np.random.default_rng([seed, number])
        design, rounds = ledger(rng)
        critical, seen = critical_at_random(rng), exact_rounds(rounds)
        for upto, look in enumerate(twin_looks(design, rounds), start=1):
            exact = verdict(seen[:upto], design, critical)
            ours, theirs = decisions(exact, look, critical)
            assert ours == theirs, f"ledger {number} of seed {seed}, look {upto}: {ours} and {theirs}"
            assert abs(float(exact.board.e_value) / float(look.e_value[0]) - 1) < 1e-9
            looks, alarms = looks + 1, alarms + exact.alarm
    return looks, alarms


def _text(answers: Any) -> str:
    return "".join("1" if right else "0" for right in answers)


def _clip(accuracy: Any) -> Any:
    return np.clip(accuracy, 0.01, 0.99)


if __name__ == "__main__":
    print("looks, alarms: {}, {}".format(*compare(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
