"""Compute the critical values of a design: quantiles of what each test comes to in a whole campaign, under the worst null.

A campaign may raise a false alarm with 5 %. The gap test gets 1.8 of them, the arm test 0.4 and the board test 2.2; the rest is left for the
error of the simulation. The nulls are worlds.CALIBRATION, with sets of unequal difficulty among them. Without a board the gap test gets 3.4:
with other families than the nulls' (equal ones, or all but two strong) false alarms rise by up to a sixth, and must still stay below 5.
Suspicion may be raised with 5 % for gap and for board. The leak test has 4 % of its own.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.stats import alarms, arm_values, difficulty, overfit_test, shift_test
from pipeline.stats.design import Design
from studies import look_scores, probits, rule_twin, simulated, worlds
from studies.simulated import BATCH, Floats, World, batches

SEED = 20261124
STATISTICS = ("gap", "arm", "board", "leak")
SPENT = {"gap": 0.018, "arm": 0.004, "board": 0.022, "leak": 0.04}
SPENT_WITHOUT_BOARD = {"gap": 0.034, "arm": 0.004}
SUSPECTED = {"gap": 0.05, "board": 0.05}
NULL_NUMBERS = {name: number for number, name in enumerate(worlds.CALIBRATION)}
OURS = ("pipeline.", "studies.")
Progress = Callable[[str], None]


def least_levels(world: World, design: Design, seed: tuple[int, ...], num: int) -> Floats:
    """(C, R, 4) in the order of STATISTICS: the level at which a campaign would have alarmed by each round; for the board the least 1 / E."""
    runs = []
    for rounds in batches(world, design, seed, num):
        levels = [
            np.stack([look.gap_level(), look.arm_level(), 1 / look.e_value, look.leak_level()], 1)
            for _, _, look in rule_twin.looks(rounds, design)
        ]
        runs.append(np.minimum.accumulate(np.stack(levels, 1), 1))
    return np.concatenate(runs)


def calibrate(design: Design, num: int, tell: Progress = lambda line: None) -> dict[str, Any]:
    """Return the content of one file of constitution/nulls, from `num` campaigns of each null. The same code gives the same content."""
    seen: dict[str, Floats] = {}
    for name, world in nulls_of(design).items():
        tell(f"{name}: {num} campaigns")
        seen[name] = least_levels(world, design, (SEED, NULL_NUMBERS[name]), num)
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
    result["result_digest"] = result_digest(result)
    return result


def result_digest(result: Mapping[str, Any]) -> str:
    """sha256 over the content of a file, without its own `result_digest`."""
    content = {name: value for name, value in result.items() if name != "result_digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def first_batch(last: Floats) -> list[str]:
    """Means over the first batch, to four digits. A rerun of 50 campaigns a null must give the same."""
    return [f"{value:.4g}" for value in last[:BATCH].mean(0)]


def shares_spent(design: Design) -> dict[str, float]:
    """The share of campaigns in which each test of a design may raise a false alarm."""
    return SPENT if design.board_rows and design.submissions else SPENT_WITHOUT_BOARD


def nulls_of(design: Design) -> dict[str, World]:
    """The nulls of a design: those that differ on the board alone belong to designs with a board."""
    has_board = bool(design.board_rows and design.submissions)
    return {name: world for name, world in worlds.CALIBRATION.items() if has_board or not world.is_of_the_board}


def code_digest(design: Design) -> str:
    """sha256 over what computes in the modules that simulate, and over the constants of the exact tests."""
    digest = hashlib.sha256()
    for module in (simulated, probits, look_scores, rule_twin):
        digest.update(what_computes(Path(str(module.__file__)).read_text()).encode())
    constants = (
        difficulty.HEALTHY_SD, shift_test.STOPPED_SD, difficulty.PRINT_VARIANCE, shift_test.SLACK_VARIANCE,
        shift_test.LEAST_SPREAD, shift_test.GUARD, difficulty.DOUBT, overfit_test.LEAST_GAP, overfit_test.LEAST_MEAN_GAP, overfit_test.MEAN_SHARE,
        arm_values.SLOPE_VARIANCE, arm_values.SCORE_VARIANCE, alarms.NAMED,
        list(nulls_of(design).items()), shares_spent(design), SUSPECTED, SEED,
    )  # fmt: skip
    digest.update(repr(constants).encode())
    return digest.hexdigest()


def what_computes(source: str) -> str:
    """What of a module's source computes: the same text for the same computation, wherever its modules lie and whatever they are called.

    Comments, layout and docstrings do not compute. Neither do import statements and the names of our own modules: `shift_test.GUARD` and
    `GUARD` read the same, so that moving or renaming a module changes nothing. What comes from outside is named in full, so that `np.exp`
    and `math.exp` differ. Empty fields of the syntax tree are left out, because it depends on the version of Python which of them exist.
    Raises SyntaxError for what is not Python.
    """
    tree = ast.parse(source)
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {each.asname or each.name: each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            origins |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return _source(tree, origins)


def _quantile(values: Floats, share: float) -> tuple[float, float, float]:
    """The value that `share` of the campaigns stay below, and its 95 % interval (binomial, normal approximation)."""
    ordered, n = np.sort(values), len(values)
    spread = 1.96 * (n * share * (1 - share)) ** 0.5
    ranks = (n * share, n * share - spread, n * share + spread)
    point, low, high = (float(ordered[min(n - 1, max(0, int(rank)))]) for rank in ranks)
    return point, low, high


def _alarms(last: Floats, critical: dict[str, str]) -> dict[str, str]:
    """Rates of false alarms under these critical values, by test and for gap, arm or board together (`rule`)."""
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


def _source(node: object, origins: Mapping[str, str]) -> str:
    """origins: where each imported name comes from, such as np -> numpy and Design -> pipeline.stats.design.Design."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant(str())):
            return ""
        case ast.Attribute(ast.Name(head), name) if head.islower() and head in origins:  # by convention it is a module
            return name if origins[head].startswith(OURS) else f"{origins[head]}.{name}"
        case ast.Name(name):
            origin = origins.get(name, name)
            return origin.rpartition(".")[2] if origin.startswith(OURS) else origin
        case ast.AST():
            fields = [
                f"{name}={_source(value, origins)}" for name, value in ast.iter_fields(node) if value not in (None, [])
            ]
            return f"{type(node).__name__}({' '.join(fields)})"
        case list():
            return f"[{' '.join(filter(None, (_source(each, origins) for each in node)))}]"
    return repr(node)
