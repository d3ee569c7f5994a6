"""Critical values of a design: quantiles of each test's campaign maximum under the worst null.

Of a campaign's 5 % the gap test gets 1.8, the arm test 0.4 and the board test 2.2; the rest is left for the error of the simulation.
Without a board the gap test gets 3.4: with other families than the nulls' (equal ones, or all but two strong) that becomes up to a sixth
more, which must still be below 5. Suspicion: 5 % for gap and for board. The leak test has 2.5 % of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import tokenize
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from pipeline.stats import alarms, overfit_test, shift_test, slot_choice
from pipeline.stats.design import Design
from studies import rule_twin as rule_twin_module
from studies import simulated, worlds
from studies.rule_twin import LookSeen, Twin, gap_tail, tail_per_share
from studies.simulated import BATCH, Floats, World, batches, max_dev

SEED = 20261124
STATISTICS = ("gap", "arm", "board", "leak")
SPENT = {"gap": 0.018, "arm": 0.004, "board": 0.022, "leak": 0.025}
SPENT_WITHOUT_BOARD = {"gap": 0.034, "arm": 0.004}
SUSPECTED = {"gap": 0.05, "board": 0.05}
NULL_NUMBERS = {name: number for number, name in enumerate(worlds.NULLS)}
Progress = Callable[[str], None]


def maxima(world: World, design: Design, seed: tuple[int, ...], num: int) -> Floats:
    """(C, R, 4): gap, arm and leak as the level at which the campaign would have alarmed by this round, board as 1 / E. Small is alarming."""
    runs = []
    for rounds in batches(world, design, max_dev, seed, num):
        rule_twin, looks = Twin(design, design.families), []
        for seen in rounds:
            rule_twin.take(seen)
            ahead = max_dev([seen])
            scored = rule_twin.choose(ahead, design.submissions if design.board_rows else 0)
            looks.append(statistics(rule_twin.look(scored, ahead)))
        runs.append(np.minimum.accumulate(np.stack(looks, 1), 1))
    return np.concatenate(runs)


def statistics(look: LookSeen) -> Floats:
    """(C, 4) of one look."""
    gap = gap_tail(look)
    arm = tail_per_share(look.arm_scores, look.shares)
    return np.stack([gap, arm, 1 / look.e_value, ndtr(-look.leak_scores)], 1)


def calibrate(design: Design, num: int, tell: Progress = lambda line: None) -> dict[str, Any]:
    """The content of one file of constitution/nulls. `num` campaigns of each null; the same for the same code and seed."""
    seen: dict[str, Floats] = {}
    for name, world in worlds.NULLS.items():
        tell(f"{name}: {num} campaigns")
        seen[name] = maxima(world, design, (SEED, NULL_NUMBERS[name]), num)
    last = {name: runs[:, -1] for name, runs in seen.items()}
    spent = shares_spent(design)
    critical, errors, worst = {}, {}, {}
    for label, statistic, shares in (
        ("gap_level", "gap", spent), ("gap_suspect_level", "gap", SUSPECTED), ("arm_level", "arm", spent),
        ("leak_level", "leak", spent), ("board_alarm", "board", spent), ("board_suspect", "board", SUSPECTED),
    ):  # fmt: skip
        if statistic not in spent:  # no board: E is 1 for ever and the leak test has nothing to see
            critical[label] = {"leak_level": "0.0025", "board_alarm": "45.46", "board_suspect": "20"}[label]
            continue
        column = STATISTICS.index(statistic)
        points = {name: _quantile(runs[:, column], shares[statistic]) for name, runs in last.items()}
        worst[label] = min(points, key=lambda name: points[name][0])
        point, low, high = points[worst[label]]
        if statistic == "board":
            point, low, high = 1 / point, 1 / high, 1 / low
        critical[label] = _text(point, ROUND_CEILING if statistic == "board" else ROUND_FLOOR)
        errors[label] = f"{_text(low, ROUND_FLOOR)} to {_text(high, ROUND_CEILING)}"
    rates = {name: _alarms(runs, critical) for name, runs in last.items()}
    result = {
        "schema": 1,
        "design": design.to_json(),
        "critical": critical,
        "monte_carlo_95": errors,
        "worst_null": worst,
        "false_alarms": rates,
        "campaigns_per_null": num,
        "seed": SEED,
        "code_digest": code_digest(design),
        "first_batch": {name: first_batch(runs) for name, runs in last.items()},
    }
    result["result_digest"] = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
    return result


def first_batch(last: Floats) -> list[str]:
    """Means over the first batch, to four digits: what a rerun of 50 campaigns a null must reproduce."""
    return [f"{value:.4g}" for value in last[:BATCH].mean(0)]


def shares_spent(design: Design) -> dict[str, float]:
    """Of a campaign, by test; the tests that a design has."""
    return SPENT if design.board_rows and design.submissions else SPENT_WITHOUT_BOARD


def code_digest(design: Design) -> str:
    """sha256 over the tokens of what simulates (not comments, docstrings or layout) and over the constants of the exact rule."""
    digest = hashlib.sha256()
    for module in (simulated, rule_twin_module):
        digest.update(_tokens(Path(str(module.__file__)).read_text()).encode())
    constants = (
        shift_test.HEALTHY_SD, shift_test.STOPPED_SD, shift_test.PRINT_VARIANCE, shift_test.SLACK_VARIANCE,
        shift_test.LEAST_SPREAD, shift_test.GUARD, overfit_test.LEAST_GAP, overfit_test.LEAST_MEAN_GAP, overfit_test.MEAN_SHARE,
        slot_choice.SLOPE_VARIANCE, slot_choice.SCORE_VARIANCE, alarms.NAMED, alarms.BOUND_LEVEL,
        list(worlds.NULLS.items()), shares_spent(design), SUSPECTED, SEED,
    )  # fmt: skip
    digest.update(repr(constants).encode())
    return digest.hexdigest()


def _tokens(source: str) -> str:
    """What of a module computes: its tokens without comments, layout and texts that stand alone, and without trailing commas."""
    kept: list[str] = []
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        alone = token.type == tokenize.STRING and previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type
        if token.type in skipped or alone:
            continue
        if token.string in ")]}" and kept and kept[-1] == ",":
            kept.pop()
        kept.append(token.string)
    return "\n".join(kept)


def _quantile(values: Floats, share: float) -> tuple[float, float, float]:
    """The order statistic that `share` of the campaigns stay below, and its 95 % interval (binomial, normal approximation)."""
    ordered, n = np.sort(values), len(values)
    spread = 1.96 * (n * share * (1 - share)) ** 0.5
    ranks = (n * share, n * share - spread, n * share + spread)
    point, low, high = (float(ordered[min(n - 1, max(0, int(rank)))]) for rank in ranks)
    return point, low, high


def _alarms(last: Floats, critical: dict[str, str]) -> dict[str, str]:
    flags = {
        "gap": last[:, 0] < float(critical["gap_level"]),
        "arm": last[:, 1] < float(critical["arm_level"]),
        "board": last[:, 2] * float(critical["board_alarm"]) < 1,
        "leak": last[:, 3] < float(critical["leak_level"]),
    }
    flags["rule"] = flags["gap"] | flags["arm"] | flags["board"]
    return {name: f"{flag.mean():.4f}" for name, flag in flags.items()}


def _text(value: float, rounding: str) -> str:
    """Four digits, to the safe side."""
    number = Decimal(value)
    return format(number.quantize(Decimal(1).scaleb(number.adjusted() - 3), rounding=rounding), "f")
