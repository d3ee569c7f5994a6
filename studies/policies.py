"""Who wins a round and who goes out at the end, under several policies, and what that costs (statistics.md 5.6).

Regret is to the best of the 32 arms that the policy's own path came to. A policy sees what a referee sees; `truth` is read at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.stats.arm_values import STOPPED_PRIOR
from pipeline.stats.design import CriticalValues, Design
from studies.rule_twin import HEALTHY_VARIANCE, LEAST_SPREAD, PRINT_VARIANCE, LookSeen, Twin, arm_lifts
from studies.simulated import Flags, Floats, Ints, RoundSeen, World, batches, max_dev


@dataclass
class Policy:
    """`choose` is called once a round; `values` then holds each round's (C, A) scores by which the last choice is made."""

    design: Design
    critical: CriticalValues
    values: list[Floats] = field(default_factory=list)

    def choose(self, rounds: list[RoundSeen]) -> Ints:
        self.values.append(self.score(rounds))
        return np.asarray(self.values[-1].argmax(1))

    def score(self, rounds: list[RoundSeen]) -> Floats:
        raise NotImplementedError

    def final(self) -> Ints:
        """(C,) the arm that goes out, counted over all rounds."""
        return np.asarray(np.concatenate(self.values, 1).argmax(1))


class MaxDev(Policy):
    def score(self, rounds: list[RoundSeen]) -> Floats:
        return np.asarray(arm_lifts(rounds[-1].dev).mean(1))


class MaxFresh(Policy):
    def score(self, rounds: list[RoundSeen]) -> Floats:
        return np.asarray(arm_lifts(rounds[-1].fresh).mean(1))


@dataclass
class MaxBoard(Policy):
    """The largest printed score among those submitted (ahead on dev, then D-optimal); dev breaks ties."""

    twin: Twin | None = None

    def score(self, rounds: list[RoundSeen]) -> Floats:
        self.twin = self.twin or Twin(self.design, self.design.families)
        self.twin.take(rounds[-1])
        scored = self.twin.choose(max_dev(rounds), self.design.submissions)
        at = np.arange(len(scored))[:, None]
        values = np.full(rounds[-1].board.shape, -9.0)
        lifts = rounds[-1].board[at, scored] - rounds[-1].board_reference[:, None]
        values[at, scored] = lifts + 1e-3 * arm_lifts(rounds[-1].dev).mean(1)[at, scored]
        return values


@dataclass
class Informal(MaxBoard):
    """Dev, until dev sets a record and the board does not follow; from then on the board."""

    by_board: list[Floats] = field(default_factory=list)
    switched: Flags | None = None

    def score(self, rounds: list[RoundSeen]) -> Floats:
        board, dev = super().score(rounds), np.asarray(arm_lifts(rounds[-1].dev).mean(1))
        at, ahead = np.arange(len(dev)), max_dev(rounds)
        printed = board[at, ahead] - 1e-3 * dev[at, ahead]
        if self.switched is None:
            self.switched = np.zeros(len(dev), bool)
            self.record, self.last_printed = dev.max(1), printed
        else:
            self.switched |= (dev.max(1) > self.record) & (printed <= self.last_printed)
            self.record, self.last_printed = np.maximum(self.record, dev.max(1)), printed
        self.by_board.append(board)
        return np.where(self.switched[:, None], board, dev)

    def final(self) -> Ints:
        assert self.switched is not None
        dev = np.concatenate(self.values, 1)
        board = np.concatenate(self.by_board, 1)
        return np.asarray(np.where(self.switched, board.argmax(1), dev.argmax(1)))


@dataclass
class Rule(Policy):
    """Shrunk lifts (dev and fresh pooled; fresh alone where dev is suspect) times each family's expected slope, and what the board adds."""

    use_board: bool = True
    fresh_first: bool = False  # fresh alone from round 1, as the design has it
    twin: Twin | None = None
    suspects: Flags | None = None  # (C, F)
    leaks: Flags | None = None  # (C,)
    scored: list[Ints] = field(default_factory=list)
    seen: list[RoundSeen] = field(default_factory=list)
    look: LookSeen | None = None

    def choose(self, rounds: list[RoundSeen]) -> Ints:
        self.score(rounds)
        return np.asarray(self.values[-1].argmax(1))

    def score(self, rounds: list[RoundSeen]) -> Floats:
        if self.twin is None:
            self.twin = Twin(self.design, self.design.families)
            self.suspects = np.zeros(rounds[0].dev.reference.shape, bool)
            self.leaks = np.zeros(len(self.suspects), bool)
        self.seen = rounds
        self.twin.take(rounds[-1])
        assert self.suspects is not None and self.leaks is not None
        before = self._predicted(len(rounds) - 1)[0].sum(2) / self.design.families
        num = self.design.submissions if self.use_board else 0
        self.scored.append(self.twin.choose(np.asarray(before.argmax(1)), num))
        look = self.look = self.twin.look(self.scored[-1], max_dev(rounds))
        level = float(self.critical.gap_suspect_level)
        alone = replace(look, mean_scores=np.full(len(look.mean_scores), -np.inf)).gap(level)
        self.suspects |= alone | look.arm(float(self.critical.arm_level))
        mean: Flags = np.logical_and(look.gap(level).all(1), ~self.suspects.any(1))
        self.suspects |= mean[:, None]  # where none is suspect alone, all are
        self.leaks |= look.leak(float(self.critical.leak_level))
        self.values = [self._value(number) for number in range(len(rounds))]
        return self.values[-1]

    def _predicted(self, number: int) -> tuple[Floats, Floats]:
        """(C, A, F) shrunk lifts of a round and (C, F) the variance left in each."""
        assert self.twin is not None and self.suspects is not None
        seen, own = self.seen[number], self.twin.item_noise()[0]
        m, n = self.design.dev_items, self.design.fresh_items
        dev, fresh = arm_lifts(seen.dev).swapaxes(1, 2), arm_lifts(seen.fresh).swapaxes(1, 2)
        alone = np.ones_like(self.suspects) if self.fresh_first else self.suspects
        raw = np.where(alone[:, None], fresh, (m * dev + n * fresh) / (m + n))
        error = own / np.where(alone, n, m + n)
        mean = raw.mean(1, keepdims=True)
        spread = np.maximum(LEAST_SPREAD, raw.var(1, ddof=1) - error)
        kept = spread / (spread + error)
        level = np.where(alone[:, None], mean, dev.mean(1, keepdims=True))
        return level + kept[:, None] * (raw - mean), kept * error

    def _value(self, number: int) -> Floats:
        assert self.look is not None and self.twin is not None and self.leaks is not None
        weight = 1 / self.design.families
        lifts, left = self._predicted(number)
        odds = float(STOPPED_PRIOR) * self.look.carried
        slopes = 1 - odds / (1 - float(STOPPED_PRIOR) + odds.sum(1, keepdims=True))
        effects = weight * slopes[:, None] * lifts
        value = effects.sum(2)
        scored = self.scored[number]
        if scored.shape[1] < 2:
            return np.asarray(value)
        at, seen = np.arange(len(value))[:, None], self.seen[number]
        residual = seen.board[at, scored] - value[at, scored]
        around = effects - effects.mean(1, keepdims=True)
        doubt = (weight**2 * left).sum(1)[:, None] + (HEALTHY_VARIANCE * (around**2).sum(2))[at, scored]
        hidden = weight * self.design.board_rows
        noise = PRINT_VARIANCE + (weight**2 * self.twin.item_noise()[0] / hidden).sum(1)[:, None]
        told = doubt / (doubt + noise) * (residual - residual.mean(1, keepdims=True))
        value = value.copy()
        value[at, scored] += np.where(self.leaks[:, None], 0, told)
        return np.asarray(value)


POLICIES: dict[str, Callable[[Design, CriticalValues], Policy]] = {
    "max dev": MaxDev,
    "max external": MaxBoard,
    "informal": Informal,
    "max fresh": MaxFresh,
    "rule": Rule,
    "rule, fresh first": lambda design, critical: Rule(design, critical, fresh_first=True),
    "rule, no external": lambda design, critical: Rule(design, critical, use_board=False),
}


def regret(
    world: World, policy: str, design: Design, critical: CriticalValues, seed: tuple[int, ...], num: int
) -> tuple[Floats, Floats]:
    """(C,) final true gain and (C,) regret, in points."""
    gains, regrets = [], []
    player: list[Policy] = []

    def choose(rounds: list[RoundSeen]) -> Ints:
        if len(rounds) == 1:
            player.append(POLICIES[policy](design, critical))
        return player[-1].choose(rounds)

    for rounds in batches(world, design, choose, seed, num):
        truth = np.concatenate([seen.truth for seen in rounds], 1)
        gain = truth[np.arange(len(truth)), player.pop().final()]
        gains.append(100 * gain)
        regrets.append(100 * (truth.max(1) - gain))
    return np.concatenate(gains), np.concatenate(regrets)
