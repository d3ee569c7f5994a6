"""The report of `evidence simulate`: alarms by round in every world, regret of every policy, each beside what the design's tables expect.

Detection is measured on the path of whoever always takes the best dev score, the policy that pushes hardest. Four arms a round are
submitted: the one ahead on dev, then three D-optimal ones (the design's table has the same or max-min, which differ by a point).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.stats.design import CriticalValues, Design
from studies import policies, worlds
from studies.rule_twin import Twin, arm_lifts
from studies.simulated import Flags, Floats, RoundSeen, World, batches, max_dev

SEED = 52  # never that of the nulls: what is calibrated on some campaigns is measured on others
RULES = ("gap", "board", "rule", "suspect", "leak", "sign")
"""gap: C1, by family or arm; board: C2; rule: either; leak: C3; sign: a dev record that the board does not follow."""
POWER_SLACK, DESIGN_SE, DESIGN_REGRET_SE = 0.04, 0.018, 0.07
DESIGN_POWER: dict[str, dict[str, tuple[float, float, float]]] = {
    "healthy": {"gap": (0.011, 0.017, 0.018), "board": (0, 0, 0), "rule": (0.011, 0.017, 0.018)},
    "noise": {"gap": (0.010, 0.014, 0.017), "board": (0, 0, 0), "rule": (0.010, 0.014, 0.017)},
    "het": {"gap": (0.011, 0.017, 0.018), "board": (0.001, 0.009, 0.025), "rule": (0.013, 0.025, 0.043)},
    "G_flat": {"gap": (0.14, 0.58, 0.75), "board": (0.02, 0.27, 0.50), "rule": (0.16, 0.62, 0.80)},
    "G_rev": {"gap": (0.14, 0.54, 0.68), "board": (0.01, 0.28, 0.49), "rule": (0.15, 0.58, 0.74)},
    "S_rev": {"gap": (0.01, 0.50, 0.65), "board": (0, 0.27, 0.50), "rule": (0.01, 0.55, 0.71)},
    "X_flat": {"gap": (0.01, 0.02, 0.02), "board": (0.02, 0.27, 0.50), "rule": (0.04, 0.28, 0.51)},
    "X_rev": {"gap": (0.01, 0.01, 0.01), "board": (0.01, 0.28, 0.49), "rule": (0.02, 0.29, 0.49)},
    "leaky": {"gap": (0.14, 0.58, 0.75), "board": (0, 0, 0.003), "rule": (0.14, 0.58, 0.75)},
}
"""Cumulative by round 2, 3, 4: design/statistics.md 5.2 of the brief, written in beside its rule of that time."""
DESIGN_REGRET: dict[str, dict[str, float]] = {
    "max dev": {"healthy": 0.15, "noise": 0.26, "G_flat": 0.60, "G_rev": 0.74, "S_rev": 0.75, "X_flat": 0.60, "X_rev": 0.74, "leaky": 0.60},
    "max external": {"healthy": 0.20, "noise": 0.33, "G_flat": 0.39, "G_rev": 0.40, "S_rev": 0.40, "X_flat": 0.39, "X_rev": 0.40, "leaky": 0.64},
    "informal": {"healthy": 0.19, "noise": 0.31, "G_flat": 0.44, "G_rev": 0.43, "S_rev": 0.42, "X_flat": 0.44, "X_rev": 0.43, "leaky": 0.61},
    "max fresh": {"healthy": 0.16, "noise": 0.28, "G_flat": 0.16, "G_rev": 0.17, "S_rev": 0.16, "X_flat": 0.62, "X_rev": 0.80, "leaky": 0.16},
    "rule": {"healthy": 0.09, "noise": 0.19, "G_flat": 0.14, "G_rev": 0.15, "S_rev": 0.15, "X_flat": 0.25, "X_rev": 0.35, "leaky": 0.20},
    "rule, no external": {"healthy": 0.08, "noise": 0.20, "G_flat": 0.11, "G_rev": 0.13, "S_rev": 0.13, "X_flat": 0.65, "X_rev": 0.74, "leaky": 0.13},
}  # fmt: skip
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Alarms:
    """(C, R) booleans by rule: has it fired by this round?; and of the campaigns in which the board test fired, who was named."""

    fired: dict[str, Flags]
    named_weakest: (
        float  # of those alarms of the board test, the share that names the weakest family; nan where it never fired
    )

    def rate(self, rule: str, by_round: int = -1) -> float:
        return float(self.fired[rule][:, by_round].mean())

    def as_json(self) -> dict[str, Any]:
        found = {}
        for rule, fired in self.fired.items():
            rates, n = [float(value) for value in fired.mean(0)], len(fired)
            found[rule] = {
                "false_alarm_or_power_by_round": [round(rate, 4) for rate in rates],
                "n": n,
                "se": round(standard_error(rates[-1], n), 4),
                "upper_95": round(upper_95(int(fired[:, -1].sum()), n), 4),
            }
        return found


def alarms(world: World, design: Design, critical: CriticalValues, number: int, num: int) -> Alarms:
    """`num` campaigns of a world on the max-dev path. `number` tells the worlds' random streams apart."""
    runs: dict[str, list[Flags]] = {rule: [] for rule in RULES}
    named, fired = 0, 0
    for rounds in batches(world, design, max_dev, (SEED, number), num):
        looks: dict[str, list[Flags]] = {rule: [] for rule in RULES}
        rule_twin, printed = Twin(design, design.families), Printed()
        stopped = np.zeros(len(rounds[0].truth), bool)
        for seen in rounds:
            rule_twin.take(seen)
            ahead = max_dev([seen])
            scored = rule_twin.choose(ahead, design.submissions if design.board_rows else 0)
            look = rule_twin.look(scored, ahead)
            gap: Flags = np.logical_or(
                look.gap(float(critical.gap_level)).any(1), look.arm(float(critical.arm_level)).any(1)
            )
            board = look.board(critical.board_alarm)
            suspect: Flags = (
                gap | look.gap(float(critical.gap_suspect_level)).any(1) | look.board(critical.board_suspect)
            )
            leak, sign = look.leak(float(critical.leak_level)), printed.sign(seen, ahead)
            flags: tuple[Flags, ...] = (gap, board, np.logical_or(gap, board), suspect, leak, sign)
            for rule, flag in zip(RULES, flags, strict=True):
                looks[rule].append(flag)
            first = board & ~stopped
            named, fired = named + int((look.named()[first] == design.families - 1).sum()), fired + int(first.sum())
            stopped |= board
        for rule, each in looks.items():
            runs[rule].append(np.logical_or.accumulate(np.stack(each, 1), 1))
    return Alarms({rule: np.concatenate(each) for rule, each in runs.items()}, named / fired if fired else float("nan"))


class Printed:
    """What one would say without a model, from the scores of whoever is ahead on dev."""

    def __init__(self) -> None:
        self.before: tuple[Floats, Floats] | None = None  # (C,) the dev record and the newest printed score

    def sign(self, seen: RoundSeen, ahead: Any) -> Flags:
        at = np.arange(len(ahead))
        best, printed = arm_lifts(seen.dev).mean(1)[at, ahead], seen.board[at, ahead]
        record, last = self.before or (np.full(len(at), np.inf), printed)
        self.before = (best if self.before is None else np.maximum(record, best), printed)
        return np.asarray((best > record) & (printed <= last))


def regrets(
    critical: CriticalValues, design: Design, num: int, tell: Progress
) -> dict[str, dict[str, dict[str, float]]]:
    """{world: {policy: {gain, regret, se, n}}} in points, over the nulls and the designed worlds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number, (name, world) in enumerate({**worlds.NULLS, **worlds.DESIGNED}.items()):
        tell(f"regret in {name}")
        found[name] = {}
        for policy in policies.POLICIES:
            gain, regret = policies.regret(world, policy, design, critical, (SEED, 1000 + number), num)
            se = float(regret.std(ddof=1)) / num**0.5
            found[name][policy] = {
                "gain": round(float(gain.mean()), 3),
                "regret": round(float(regret.mean()), 3),
                "se": round(se, 3),
                "n": num,
            }
    return found


def measure(design: Design, critical: CriticalValues, num: int, tell: Progress) -> dict[str, Alarms]:
    """Every world; `num` campaigns of the nulls and designed ones, half as many of the rest."""
    known = {**worlds.NULLS, **worlds.DESIGNED}
    rest = {**worlds.BEYOND_NULLS, **worlds.BEYOND}
    found = {}
    for number, (name, world) in enumerate({**known, **rest}.items()):
        campaigns = num if name in known else max(1, num // 2)
        tell(f"{name}: {campaigns} campaigns")
        found[name] = alarms(world, design, critical, number, campaigns)
    return found


def power_met(name: str, found: Alarms) -> bool | None:
    """Is the rule within four points and two combined standard errors of the design's table, or better? None for a null or an unknown world."""
    if name not in worlds.DESIGNED:
        return None
    expected = DESIGN_POWER[name]["rule"][-1]
    se = (standard_error(found.rate("rule"), len(found.fired["rule"])) ** 2 + DESIGN_SE**2) ** 0.5
    return found.rate("rule") >= expected - POWER_SLACK - 2 * se


def standard_error(rate: float, n: int) -> float:
    return (rate * (1 - rate) / n) ** 0.5


def upper_95(alarms_seen: int, n: int) -> float:
    """One-sided exact (Clopper-Pearson) bound of a rate."""
    from scipy.stats import beta

    return 1.0 if alarms_seen == n else float(beta.ppf(0.95, alarms_seen + 1, n - alarms_seen))


def alarm_table(found: Mapping[str, Alarms]) -> Iterable[list[str]]:
    """A header, then: world, n, cumulative rates by round 2, 3, 4 of each rule, what the design has, and the verdict."""
    yield ["world", "n", *RULES, "design: rule", ""]
    for name, seen in found.items():
        row = [name, str(len(seen.fired["rule"]))]
        for rule in RULES:
            row.append(" ".join(f"{rate:.3f}".lstrip("0") for rate in seen.fired[rule].mean(0)[1:]))
        known = DESIGN_POWER.get(name)
        row.append(" ".join(f"{rate:.2f}".lstrip("0") if rate else "0" for rate in known["rule"]) if known else "")
        met = power_met(name, seen)
        n = len(seen.fired["rule"])
        bound = upper_95(int(seen.fired["rule"][:, -1].sum()), n)
        if met is None and (name in worlds.NULLS or name in worlds.BEYOND_NULLS):
            row.append(f"at most {bound:.3f}")
        else:
            row.append("" if met is None else "met" if met else "NOT MET")
        yield row


def regret_table(costs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterable[list[str]]:
    """A header, then a row a policy: regret (standard error; the design's) in each world."""
    yield ["policy", *costs]
    for policy in policies.POLICIES:
        row = [policy]
        for world, by_policy in costs.items():
            cost, known = by_policy[policy], DESIGN_REGRET.get(policy, {}).get(world)
            row.append(f"{cost['regret']:.2f} ({cost['se']:.2f}" + (f"; {known:.2f})" if known is not None else ")"))
        yield row
