"""Whole campaigns by runs instead of items, thousands at once, in worlds whose truth we choose: for the error rates of claims.

Eight arms a round as `decision/plan.py` makes them, the choice by the largest shrunk value, settings that are set aside, axes that retire,
replicates that are bought. A run's accuracy in a family is the reference's plus effects of its settings plus the luck of its training. What
is counted on M items is normal, with the variances of studies.simulated's items: a part that all runs share (the items of a round), and a
part of each run alone. Nothing else is approximated. Shapes: C campaigns, R rounds, A arms, F families, X axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from pipeline.campaign.records import NUM_ARMS
from pipeline.stats.design import Design
from pipeline.stats.shift_test import LEAST_SPREAD
from studies.claim_twin import AXIS, NONE, OVERWRITES, REFERENCE, STANDING, Runs
from studies.simulated import EDGE, ITEM_CORRELATION, Flags, Floats, Ints

RUNNING, DOUBLED, FINAL_ROUND = "running", "doubled", "final_round"
CHOICES = (0, 2, 0, 3, 0, 3, 1)
"""Of the seven shipped axes, how many values they have beside the reference's; 0: a range, which never ends."""
NOISY_AXES = (0, 2)  # learning rate and mixture
LEAST_AXES, PLATEAU_LOOKS, MOST_REPLICATES = 4, 3, 2  # article 11
Z = 2.45


@dataclass(frozen=True)
class World:
    """The truth. Lifts and standard deviations are accuracies (0.03 = 3 points), difficulties are probits. The default is a quiet null."""

    seed_sd: float = 0.01  # of a run's luck, in all families alike
    tails: float = 0.0  # degrees of freedom of Student's t for the luck, 0 for normal; its standard deviation stays seed_sd
    noisy: float = 1.0  # factor of the luck where a noisy axis moved or stands
    anchors: float = 1.0  # the same for runs of the reference recipe
    collapse_probability: float = 0.0
    collapse: float = 0.0
    reference_luck: float | None = None  # of the reference adapter; None: drawn like a run's
    recipe_sd: float = 0.0  # of a setting's effect in each family
    common_sd: float = 0.0  # of a setting's effect in all families alike
    kept_share: float = 1.0  # of a setting's effects that stay once it stands
    planted: float = 0.0  # effect of the first axis's setting of round 1
    planted_round: int = 1
    planted_stands: bool = True  # False: only the arm of that round has it
    dev_easier: float = 0.0
    fresh_easier: float = 0.0
    easier_families: int = 99  # the weakest ones
    fresh_harder: float = 0.0  # more in each round: a drifting generator
    truncated: float = 0.0  # share of the wrong answers


@dataclass(frozen=True)
class Seen:
    """What a campaign's fresh items show. `effect` (C, R, A) is each run's true effect without luck, the mean over the families."""

    runs: Runs
    right: Ints  # (C, R, A, F)
    truncated: Ints  # (C, R, A, F)
    reference: Ints  # (C, R, F)
    item_variance: Floats  # (C, R, A, F) of the family's paired lift
    effect: Floats
    set_aside: Flags  # (C, R, A)
    kept: Flags  # (C, R)


@dataclass
class Search:
    """What one round leaves to the next, for each campaign."""

    shape: tuple[int, int]  # (C, F)
    stands: Flags = field(init=False)  # (C, X)
    effects: Floats = field(init=False)  # (C, X, F) of the settings that stand
    choice: Ints = field(init=False)  # (C, X) which value stands, -1 for the reference's
    closed: Flags = field(init=False)  # (C, X, values)
    quiet: Ints = field(init=False)  # (C, X)
    retired: Flags = field(init=False)
    bought: Ints = field(init=False)  # (C,)

    def __post_init__(self) -> None:
        num, axes = self.shape[0], len(CHOICES)
        self.stands, self.retired = np.zeros((num, axes), bool), np.zeros((num, axes), bool)
        self.effects = np.zeros((num, axes, self.shape[1]))
        self.choice = np.full((num, axes), -1)
        self.closed = np.zeros((num, axes, max(CHOICES)), bool)
        self.quiet, self.bought = np.zeros((num, axes), int), np.zeros(num, int)


@dataclass(frozen=True)
class Planned:
    """One round's arms. `axis` (C, A) is the moved axis, -1 for none; `value` (C, A) its value's number."""

    kind: Ints  # (C, A)
    axis: Ints
    value: Ints


@dataclass
class Campaigns:
    """`num` campaigns of a world: `play` them all."""

    world: World
    design: Design
    option: str
    rng: np.random.Generator
    num: int

    def __post_init__(self) -> None:
        self.levels = np.array([float(level) for level in self.design.accuracies])
        easier = np.argsort(self.levels)[: self.world.easier_families]
        self.ease = np.zeros((2, len(self.levels)))
        self.ease[0, easier], self.ease[1, easier] = self.world.dev_easier, self.world.fresh_easier
        luck = self.world.reference_luck
        one = np.full(self.num, luck) if luck is not None else self._luck(np.ones((self.num, 1)))[:, 0]
        self.reference = _clip(self.levels + one[:, None])  # (C, F)
        self.dev_items = self.rng.standard_normal((self.num, len(self.levels)))  # the same in every round
        self.dev_reference = self._count(0, 0, self.reference[:, None], self.dev_items)[:, 0]
        self.table: dict[tuple[int, int], Floats] = {}

    def play(self) -> Seen:
        """Play all rounds."""
        search = Search((self.num, len(self.levels)))
        rounds: list[tuple[Any, ...]] = []
        for number in range(1, self.design.rounds + 1):
            plan = self._plan(search, number)
            effect = self._effects(search, plan, number)
            accuracy = _clip(self.levels + effect + self._run_luck(search, plan)[:, :, None])
            items = self.rng.standard_normal((self.num, len(self.levels)))
            fresh = self._count(1, number, accuracy, items)
            reference = self._count(1, number, self.reference[:, None], items)[:, 0]
            dev = self._count(0, number, accuracy, self.dev_items)
            item_variance = self._item_variance(accuracy, number)
            lift = (fresh - reference[:, None]).mean(2) / self.design.fresh_items
            variance = item_variance.mean(2) / len(self.levels)
            below, gains, noise = self._judge(plan, dev, fresh, reference, lift, variance)
            kept = self._keep(search, plan, gains, below, effect, lift, noise)
            wrong = self.design.fresh_items - fresh
            cut = self.rng.binomial(wrong.astype(int), self.world.truncated)
            rounds.append((plan.kind, lift, variance, fresh, cut, reference, item_variance, effect.mean(2), below, kept))
        kind, lift, variance, *rest = (np.stack(each, 1) for each in zip(*rounds, strict=True))
        return Seen(Runs(kind, lift, variance), *rest)

    def _plan(self, search: Search, number: int) -> Planned:
        """Anchor first, axes in turn, replicates last."""
        num, any_stands = self.num, search.stands.any(1)
        last = self.option == FINAL_ROUND and number == self.design.rounds
        repeats, standing = np.ones(num, int), np.zeros(num, int)
        if last:
            repeats, standing = np.where(any_stands, 4, 8), np.where(any_stands, 4, 0)
        else:
            standing = np.where(any_stands, 1 + search.bought, 0)
            repeats += np.where(any_stands, 0, np.maximum(search.bought, number == 1))
            if self.option == DOUBLED and number > 1:
                standing += any_stands
                repeats += 1
        slots = NUM_ARMS - repeats - standing
        order, value = self._moves(search, number, slots)
        moves = np.minimum((order >= 0).sum(1), slots)
        spare = slots - moves
        standing, repeats = standing + np.where(any_stands, spare, 0), repeats + np.where(any_stands, 0, spare)
        arm = np.arange(NUM_ARMS)
        moved = (arm >= 1) & (arm <= moves[:, None])
        at = np.clip(arm - 1, 0, len(CHOICES) - 1)
        axis = np.where(moved, order[:, at], -1)
        overwrites = np.take_along_axis(search.stands, np.maximum(axis, 0), 1)
        kind = np.where(moved, np.where(overwrites, OVERWRITES, AXIS), NONE)
        is_repeat = (arm == 0) | ((arm > moves[:, None]) & (arm < (moves + repeats)[:, None]))
        kind = np.where(moved, kind, np.where(is_repeat, REFERENCE, STANDING))
        return Planned(kind, axis, np.where(moved, value[:, at], 0))

    def _moves(self, search: Search, number: int, slots: Ints) -> tuple[Ints, Ints]:
        """(C, X) the axes that have a value left, in turn, -1 behind them; and the number of that value."""
        value = np.full((self.num, len(CHOICES)), number)
        open_axes = ~search.retired
        has_value = open_axes.copy()
        for axis, choices in enumerate(CHOICES):
            if choices:
                places = (number - 1 + np.arange(choices)) % choices
                free = ~search.closed[:, axis, places] & (places != search.choice[:, axis, None])
                # The reference's own value is a choice again once another stands, for an axis whose list has it.
                value[:, axis] = places[free.argmax(1)]
                has_value[:, axis] &= free.any(1)
        num_open = open_axes.sum(1)
        place = np.cumsum(open_axes, 1) - 1
        first = (number - 1) * slots % np.maximum(1, num_open)
        turn = (place - first[:, None]) % np.maximum(1, num_open)[:, None]
        key = np.where(has_value, turn, 99)
        order = np.argsort(key, 1, kind="stable")
        ordered = np.take_along_axis(key, order, 1)
        return np.where(ordered < 99, order, -1), np.take_along_axis(value, order, 1)

    def _effects(self, search: Search, plan: Planned, number: int) -> Floats:
        """(C, A, F) the true effect of each arm's settings."""
        world, moved, at = self.world, plan.axis >= 0, np.arange(self.num)[:, None]
        others = search.effects.sum(1)[:, None] - search.effects[at, np.maximum(plan.axis, 0)]
        whole = search.effects.sum(1)[:, None] * (plan.kind == STANDING)[:, :, None]
        effect = np.where(moved[:, :, None], others, whole)
        if world.recipe_sd or world.common_sd:
            effect = effect + np.where(moved[:, :, None], self._drawn(plan), 0)
        if world.planted and number == world.planted_round:
            effect = effect + world.planted * (plan.axis == 0)[:, :, None]
        return effect

    def _drawn(self, plan: Planned) -> Floats:
        """(C, A, F) the effects of the moved settings; a setting that is tried again has the same ones."""
        found = np.zeros((*plan.axis.shape, len(self.levels)))
        for axis in range(len(CHOICES)):
            for value in np.unique(plan.value[plan.axis == axis]):
                key = (axis, int(value))
                if key not in self.table:
                    own = self.rng.normal(0, self.world.recipe_sd, (self.num, len(self.levels)))
                    self.table[key] = own + self.rng.normal(0, self.world.common_sd, (self.num, 1))
                found += np.where(
                    ((plan.axis == axis) & (plan.value == value))[:, :, None], self.table[key][:, None], 0
                )
        return found

    def _run_luck(self, search: Search, plan: Planned) -> Floats:
        """(C, A) the luck of training."""
        noisy_stands = search.stands[:, NOISY_AXES].any(1)[:, None] & (plan.kind != REFERENCE)
        factor = np.where(noisy_stands | np.isin(plan.axis, NOISY_AXES), self.world.noisy, 1.0)
        return self._luck(np.where(plan.kind == REFERENCE, self.world.anchors, factor))

    def _luck(self, factor: Floats) -> Floats:
        world = self.world
        if world.tails:
            drawn = self.rng.standard_t(world.tails, factor.shape) * ((world.tails - 2) / world.tails) ** 0.5
        else:
            drawn = self.rng.standard_normal(factor.shape)
        return world.seed_sd * factor * drawn - world.collapse * (self.rng.random(factor.shape) < world.collapse_probability)

    def _on_set(self, which: int, number: int, accuracy: Floats) -> Floats:
        """Accuracies on dev (0) or on round `number`'s fresh items (1), which may be easier or harder."""
        shift = self.ease[which] - (self.world.fresh_harder * number if which else 0)
        return accuracy if not shift.any() else np.asarray(ndtr(ndtri(accuracy) + shift))

    def _count(self, which: int, number: int, accuracy: Floats, items: Floats) -> Floats:
        """(C, A, F) right answers. items: (C, F) the luck of the items that all runs share, standard normal."""
        size = self.design.fresh_items if which else self.design.dev_items
        there = self._on_set(which, number, accuracy)
        own, shared = item_parts(there)
        mean = there + np.sqrt(shared / size) * items[:, None]
        mean = mean + np.sqrt(own / size) * self.rng.standard_normal(there.shape)
        return np.asarray(np.clip(np.rint(mean * size), 0, size))

    def _item_variance(self, accuracy: Floats, number: int) -> Floats:
        """(C, A, F) the item variance of a family's paired lift over the reference, as it is estimated from the items."""
        own, _ = item_parts(self._on_set(1, number, accuracy))
        theirs, _ = item_parts(self._on_set(1, number, self.reference))
        size = self.design.fresh_items
        true = (own + theirs[:, None]) / size
        pairs = np.maximum(true * size * size, 1e-9)  # expected number of items on which the two differ
        return np.asarray(np.maximum(0, np.rint(pairs + np.sqrt(pairs) * self.rng.standard_normal(true.shape)))) / size**2

    def _judge(
        self, plan: Planned, dev: Floats, fresh: Floats, reference: Floats, lift: Floats, variance: Floats
    ) -> tuple[Flags, Floats, Floats]:
        """(C, A) what is set aside, (C, A) gains in value over the baseline (-inf: none), (C,) the variance of retraining."""
        values = self._values(dev, fresh, reference)
        stands, repeats = plan.kind == STANDING, plan.kind == REFERENCE
        any_stands = stands.any(1)
        base_runs = np.where(any_stands[:, None], stands, repeats)
        total = np.where(base_runs, values, 0).sum(1)
        base_value = total / (base_runs.sum(1) + ~any_stands)  # the reference adapter's own run counts with 0
        first = stands.argmax(1)
        at = np.arange(self.num)
        over = lift - np.where(any_stands, lift[at, first], 0)[:, None]
        seeds = seed_variance(lift, variance, repeats, stands)
        noise = variance + 2 * seeds[:, None]
        moved = plan.axis >= 0
        below = moved & (over < 0) & (over**2 > Z**2 * noise)
        gain = np.where(moved & ~below, values - base_value[:, None], -np.inf)
        largest = np.where(moved, over, -np.inf).max(1)
        return below, np.where(gain > 0, gain, -np.inf), np.where((largest > 0) & (2 * seeds >= largest**2), 1, 0)

    def _values(self, dev: Floats, fresh: Floats, reference: Floats) -> Floats:
        """(C, A) the shrunk values of `stats.arm_values`, where dev counts in every family and there is no board."""
        m, n = self.design.dev_items, self.design.fresh_items
        raw = (dev - self.dev_reference[:, None] + fresh - reference[:, None]) / (m + n)
        own = item_parts(np.clip(dev.mean(1) / m, EDGE, 1 - EDGE))[0] / (m + n)
        mean = raw.mean(1)
        spread = np.maximum(float(LEAST_SPREAD), raw.var(1, ddof=1) - own)
        factor = spread / (spread + own)
        level = (dev.mean(1) - self.dev_reference) / m
        return np.asarray((level[:, None] + factor[:, None] * (raw - mean[:, None])).mean(2))

    def _keep(
        self, search: Search, plan: Planned, gains: Floats, below: Flags, effect: Floats, lift: Floats, buys: Floats
    ) -> Flags:
        """Change the search by a round's result. Returns (C,) whether something was kept."""
        at, best = np.arange(self.num), gains.argmax(1)
        kept = gains[at, best] > -np.inf
        moved = plan.axis >= 0
        axes = np.maximum(plan.axis, 0)
        gained, tried = (np.zeros((self.num, len(CHOICES)), bool) for _ in range(2))
        rows = np.repeat(at[:, None], NUM_ARMS, 1)
        tried[rows[moved], axes[moved]] = True
        with_gain = moved & (gains > -np.inf)
        gained[rows[with_gain], axes[with_gain]] = True
        search.quiet = np.where(tried, np.where(gained, 0, search.quiet + 1), search.quiet)
        for axis in range(len(CHOICES)):
            quiet = (search.quiet[:, axis] >= PLATEAU_LOOKS) & ((~search.retired).sum(1) > LEAST_AXES)
            search.retired[:, axis] |= quiet
        closing = below & (np.array(CHOICES)[axes] > 0)
        search.closed[rows[closing], axes[closing], plan.value[closing]] = True
        rows, axis = at[kept], plan.axis[at, best][kept]
        own = effect[at, best][kept] - (search.effects[rows].sum(1) - search.effects[rows, axis])
        is_plant = self.world.planted and not self.world.planted_stands
        search.effects *= 1.0
        search.effects[rows, axis] = 0 if is_plant else self.world.kept_share * own
        search.stands[rows, axis] = True
        is_choice = np.array(CHOICES)[axis] > 0
        search.choice[rows, axis] = np.where(is_choice, plan.value[at, best][kept], -1)
        search.bought = np.where(buys > 0, np.minimum(search.bought + 1, MOST_REPLICATES), 0)
        return kept


def seed_variance(lift: Floats, variance: Floats, repeats: Flags, stands: Flags) -> Floats:
    """(C,) the variance of retraining as `stats.lifts.seed_variance` has it: each repeat against the first of its recipe."""
    at = np.arange(len(lift))
    first = stands.argmax(1)
    others = stands.copy()
    others[at, first] = False
    over = lift - lift[at, first][:, None]
    squares = np.where(repeats, lift**2 - variance, 0) + np.where(others, over**2 - variance, 0)
    num = (repeats | others).sum(1)
    return np.asarray(np.maximum(0, squares.sum(1) / np.maximum(num, 1)) / 2)


def _item_table() -> tuple[Floats, Floats]:
    """Accuracies, and at each E[p_i^2]: p_i is the chance of a right answer to item i."""
    grid = np.linspace(EDGE / 4, 1 - EDGE / 4, 1000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = (1 - ITEM_CORRELATION) ** 0.5
    chance = ndtr((ndtri(grid)[:, None] - ITEM_CORRELATION**0.5 * nodes) / spread)
    return grid, np.asarray((chance**2 * weights).sum(1) / weights.sum())


GRID, SQUARES = _item_table()


def item_parts(accuracy: Floats) -> tuple[Floats, Floats]:
    """The variances of one answer to one item: of a run alone, and shared by all runs."""
    squares = np.interp(accuracy, GRID, SQUARES)
    return np.maximum(0, accuracy - squares), np.maximum(0, squares - accuracy**2)


def _clip(accuracy: Floats) -> Floats:
    return np.asarray(np.clip(accuracy, EDGE, 1 - EDGE))
