"""Measure how often each test alarms, by round in every simulated world, beside what the design's table expects: `evidence simulate`.

The second half measures what several campaigns say together: E of the board test, and its product over campaigns (`evidence e-values`).

Campaigns follow the policy that always takes the arm ahead on dev, because no other policy pushes the proxy harder. Each round submits
the arm ahead on dev and then D-optimal ones (the design's table has the same or max-min ones, which differ by a point).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Any

import numpy as np

from pipeline.audit.combine import ALPHA
from pipeline.stats.design import CriticalValues, Design
from studies import worlds
from studies.narrow_dev import sliced
from studies.narrow_dev.sliced import Slice
from studies.probits import arm_lifts
from studies.rule_twin import looks
from studies.simulated import Flags, Floats, Ints, RoundSeen, World, batches, play

SEED = 52  # not that of the critical values: what is calibrated on some campaigns is measured on others
RULES = ("gap", "board", "rule", "suspect", "leak", "sign")
"""gap: the gap test C1, by family or arm. board: the board test C2. rule: either of them. suspect: a family is suspect. leak: the leak test
C3. sign: dev made a record and the board did not follow."""
POWER_SLACK, DESIGN_SE = 0.04, 0.018
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
"""Cumulative by round 2, 3, 4: design/statistics.md 5.2, for the tests as they were designed there."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Alarms:
    """Which campaigns of a world alarmed, by test and round."""

    fired: dict[str, Flags]  # by rule, (C, R): has it alarmed by this round?
    names_weakest: (
        float | None
    )  # of the board test's alarms the share that name the weakest family, None without an alarm

    def rate(self, rule: str) -> float:
        """Return the share of campaigns in which a rule alarmed by the last round."""
        return float(self.fired[rule][:, -1].mean())

    def as_json(self) -> dict[str, Any]:
        """Return rates by round of each rule, with standard error and upper bound of the last one."""
        found: dict[str, dict[str, Any]] = {}
        for rule, fired in self.fired.items():
            rates, n = [float(value) for value in fired.mean(0)], len(fired)
            found[rule] = {
                "false_alarm_or_power_by_round": [round(rate, 4) for rate in rates],
                "n": n,
                "se": round(standard_error(rates[-1], n), 4),
                "upper_95": round(upper_95(int(fired[:, -1].sum()), n), 4),
            }
        found["board"]["names_weakest"] = self.names_weakest
        return found


def alarms(world: World | Slice, design: Design, critical: CriticalValues, number: int, num: int) -> Alarms:
    """Simulate `num` campaigns of a world. `number` tells the random streams of the worlds apart."""
    runs: dict[str, list[Flags]] = {rule: [] for rule in RULES}
    names_weakest: list[Flags] = []
    seed = (SEED, number)
    played = sliced.batches(world, design, seed, num) if isinstance(world, Slice) else batches(world, design, seed, num)
    for rounds in played:
        by_round: dict[str, list[Flags]] = {rule: [] for rule in RULES}
        printed, stopped = Printed(), np.zeros(len(rounds[0].board), bool)
        for seen, ahead, look in looks(rounds, design):
            gaps = look.gap(float(critical.gap_level)) | look.arm(float(critical.arm_level))
            gap, board = np.asarray(gaps.any(1)), look.board(critical.board_alarm)
            suspect = gap | look.gap(float(critical.gap_suspect_level)).any(1) | look.board(critical.board_suspect)
            leak, sign = look.leak(float(critical.leak_level)), printed.sign(seen, ahead)
            for rule, flag in zip(RULES, (gap, board, gap | board, suspect, leak, sign), strict=True):
                by_round[rule].append(np.asarray(flag))
            names_weakest.append(look.named()[board & ~stopped] == design.families - 1)
            stopped |= board
        for rule, flags in by_round.items():
            runs[rule].append(np.logical_or.accumulate(np.stack(flags, 1), 1))
    named = np.concatenate(names_weakest)
    return Alarms(
        {rule: np.concatenate(flags) for rule, flags in runs.items()}, float(named.mean()) if len(named) else None
    )


class Printed:
    """What one would say without a model, from the scores of the arm ahead on dev."""

    def __init__(self) -> None:
        self.before: tuple[Floats, Floats] | None = None  # (C,) the dev record and the newest printed score

    def sign(self, seen: RoundSeen, ahead: Ints) -> Flags:
        """(C,) in this round dev makes a record and the printed score does not rise."""
        at = np.arange(len(ahead))
        best, printed = arm_lifts(seen.dev).mean(1)[at, ahead], seen.board[at, ahead]
        record, last = self.before or (np.full(len(at), np.inf), printed)
        self.before = (best if self.before is None else np.maximum(record, best), printed)
        return np.asarray((best > record) & (printed <= last))


def measure(design: Design, critical: CriticalValues, num: int, tell: Progress) -> dict[str, Alarms]:
    """Simulate `num` campaigns of each null and designed world, half as many of each world beyond those."""
    known: dict[str, World | Slice] = {**worlds.NULLS, **worlds.DESIGNED}
    rest: dict[str, World | Slice] = {**worlds.UNEQUAL, **worlds.BEYOND_NULLS, **worlds.BEYOND, **sliced.SLICES}
    found = {}
    for number, (name, world) in enumerate({**known, **rest}.items()):
        campaigns = num if name in known else max(1, num // 2)
        tell(f"{name}: {campaigns} campaigns")
        found[name] = alarms(world, design, critical, number, campaigns)
    return found


def power_met(name: str, found: Alarms) -> bool | None:
    """Is the power within four points and two combined standard errors of the design's table, or better? None for worlds that it has not."""
    if name not in worlds.DESIGNED:
        return None
    expected = DESIGN_POWER[name]["rule"][-1]
    se = (standard_error(found.rate("rule"), len(found.fired["rule"])) ** 2 + DESIGN_SE**2) ** 0.5
    return found.rate("rule") >= expected - POWER_SLACK - 2 * se


def standard_error(rate: float, n: int) -> float:
    """Return the standard error of a rate that was measured in n campaigns."""
    return (rate * (1 - rate) / n) ** 0.5


def upper_95(alarms_seen: int, n: int) -> float:
    """Return the one-sided exact (Clopper-Pearson) 95 % bound of a rate."""
    from scipy.stats import beta

    return 1.0 if alarms_seen == n else float(beta.ppf(0.95, alarms_seen + 1, n - alarms_seen))


def alarm_table(found: Mapping[str, Alarms]) -> Iterable[list[str]]:
    """Yield a header, then for each world: n, cumulative rates from round 2 on by rule, what the design has, and whether that is met."""
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
        if met is None and name in {**worlds.NULLS, **worlds.UNEQUAL, **worlds.BEYOND_NULLS, **sliced.SLICES}:
            row.append(f"at most {bound:.3f}")
        else:
            row.append("" if met is None else "met" if met else "NOT MET")
        yield row


TOGETHER = (1, 2, 5, 10)
"""How many campaigns are combined."""


def e_values(world: World, design: Design, number: int, num: int) -> Floats:
    """(C, R) E of the board test after each round, in `num` campaigns of a world."""
    return np.concatenate([_e_values(rounds, design) for rounds in batches(world, design, (SEED, 100 + number), num)])


def e_values_of_one_target(world: World, design: Design, number: int, num: int) -> Floats:
    """(C, R) as `e_values`, where each ten campaigns that follow one another have one target: its slopes are drawn once for all ten."""
    found = []
    for target in range(num // TOGETHER[-1]):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((SEED, 200 + number, target))))
        slopes: Any = np.clip(rng.normal(1, world.slope_sd, (design.families, 1)), *world.slope_range)
        shared = replace(world, slope_sd=0.0, slope_range=(slopes, slopes))  # `play` clips a slope to this range
        found.append(_e_values(play(shared, design, rng, TOGETHER[-1]), design))
    return np.concatenate(found)


def _e_values(rounds: list[RoundSeen], design: Design) -> Floats:
    return np.stack([look.e_value for _, _, look in looks(rounds, design)], 1)


@dataclass(frozen=True)
class Combined:
    """What combinations of K campaigns come to. `product` and `mean` are (C // K,) flags: has it been above 1/alpha after some round?"""

    product: Flags
    mean: Flags

    @classmethod
    def of(cls, values: Floats, together: int) -> Combined:
        """Combine each `together` campaigns that follow one another. values: (C, R), E of each campaign after each round."""
        groups = values[: len(values) // together * together].reshape(-1, together, values.shape[1])
        threshold = float(1 / ALPHA)
        return cls((groups.prod(1) > threshold).any(1), (groups.mean(1) > threshold).any(1))


def measure_nulls(design: Design, num: int, tell: Progress) -> dict[str, Floats]:
    """World -> (C, R) E of `num` campaigns, in each world in which nothing is wrong."""
    found = {}
    for number, (name, world) in enumerate(worlds.NULLS.items()):
        tell(f"{name}: {num} campaigns")
        found[name] = e_values(world, design, number, num)
    return found


def largest_mean(values: Floats) -> float:
    """The largest mean of E over the rounds, two standard errors added. values: (C, R)."""
    return float((values.mean(0) + 2 * values.std(0) / len(values) ** 0.5).max())


def divisor(nulls: Mapping[str, Floats]) -> Decimal:
    """What E is divided by where campaigns are combined: its largest mean in the nulls, at least 1, rounded up to four digits."""
    largest = Decimal(max([1.0, *map(largest_mean, nulls.values())]))
    return largest.quantize(Decimal("0.001"), rounding=ROUND_CEILING)


def measure_e_values(design: Design, num: int, tell: Progress) -> tuple[Decimal, dict[str, Floats]]:
    """(the divisor, world -> (C, R) E over it) of `num` campaigns: the nulls, one with one target for each ten campaigns, two worlds of decay."""
    found = measure_nulls(design, num, tell)
    by = divisor(found)
    for number, name in enumerate(("X_flat", "G_flat"), start=len(found)):
        tell(f"{name}: {num} campaigns")
        found[name] = e_values(worlds.DESIGNED[name], design, number, num)
    tell(f"het, one target: {num} campaigns")
    found["het, one target"] = e_values_of_one_target(worlds.NULLS["het"], design, 0, num)
    return by, {name: values / float(by) for name, values in found.items()}


def e_values_as_json(found: Mapping[str, Floats]) -> dict[str, Any]:
    """By world: the mean after each round with its standard error, and how often combinations were ever above 1/alpha.

    found: world -> (C, R) E, divided as `combine` divides it.
    """
    rows = {}
    for name, values in found.items():
        rows[name] = {
            "n": len(values),
            "mean_by_round": [round(float(value), 4) for value in values.mean(0)],
            "se_by_round": [round(float(value), 4) for value in values.std(0) / len(values) ** 0.5],
            "together": {
                str(together): {
                    "product": round(float(both.product.mean()), 4),
                    "product_upper_95": round(upper_95(int(both.product.sum()), len(both.product)), 4),
                    "mean": round(float(both.mean.mean()), 4),
                }
                for together in TOGETHER
                for both in [Combined.of(values, together)]
            },
        }
    return rows


def e_value_table(found: Mapping[str, Floats]) -> Iterable[list[str]]:
    """Yield a header, then for each world: n, the mean of E by round, and the rates of `e_values_as_json`."""
    yield ["world", "n", "mean of E by round", *(f"product of {n} (95 %)" for n in TOGETHER), f"mean of {TOGETHER[-1]}"]
    for name, row in e_values_as_json(found).items():
        rates = [f"{each['product']:.4f} (at most {each['product_upper_95']:.4f})" for each in row["together"].values()]
        means = " ".join(f"{value:.3f}" for value in row["mean_by_round"])
        yield [name, str(row["n"]), means, *rates, f"{row['together'][str(TOGETHER[-1])]['mean']:.4f}"]
