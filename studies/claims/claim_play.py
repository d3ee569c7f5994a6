"""Whole campaigns by runs instead of items, thousands at once: what training and items come to in a world of `claim_worlds`.

A run's accuracy in a family is the level of the reference recipe, plus the effects of its settings, plus the luck of its training. The
reference adapter has luck of its own. The number of right answers among M items is normal, with the variances of studies.simulated's items:
a part that all runs of a set share, and a part of each run alone. Shapes: C campaigns, R rounds, A arms, F families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from pipeline.stats.design import Design
from pipeline.stats.shift_test import LEAST_SPREAD
from studies.claims.claim_search import CHOICES, NOISY_AXES, Judged, Planned, Search
from studies.claims.claim_twin import REFERENCE, STANDING, Runs
from studies.claims.claim_worlds import ClaimWorld
from studies.simulated import EDGE, ITEM_CORRELATION, Flags, Floats, Ints

Z = 2.45  # article 7's z, below which an arm is set aside


@dataclass(frozen=True)
class Played:
    """What campaigns show on fresh items. `effect` (C, R, A) is the truth without luck, the mean over families."""

    runs: Runs
    right: Ints  # (C, R, A, F)
    truncated: Ints  # (C, R, A, F)
    reference: Ints  # (C, R, F) right answers
    item_variance: Floats  # (C, R, A, F) of the family's paired lift
    effect: Floats
    set_aside: Flags  # (C, R, A)
    kept: Flags  # (C, R)


class Campaigns:
    """`num` campaigns of a world."""

    def __init__(
        self, world: ClaimWorld, design: Design, confirmation: str, rng: np.random.Generator, num: int
    ) -> None:
        self.world, self.design, self.confirmation, self.rng, self.num = world, design, confirmation, rng, num
        self.levels = np.array([float(level) for level in design.accuracies])
        easier = np.argsort(self.levels)[: world.easier_families]
        self.ease = np.zeros((2, len(self.levels)))  # of dev and fresh, in probits
        self.ease[0, easier], self.ease[1, easier] = world.dev_easier, world.fresh_easier
        own = np.full(num, world.reference_luck) if world.reference_luck is not None else self._luck(np.ones(num))
        self.reference = clip(self.levels + own[:, None])  # (C, F)
        self.dev_items = self.rng.standard_normal((num, len(self.levels)))  # the same in every round
        self.dev_reference = self._count(0, 0, self.reference[:, None], self.dev_items)[:, 0]
        self.drawn: dict[tuple[int, int], Floats] = {}

    def play(self) -> Played:
        """Play all rounds."""
        search = Search(self.num, len(self.levels))
        rounds: list[tuple[Any, ...]] = []
        for number in range(1, self.design.rounds + 1):
            plan = search.plan(number, self.design.rounds, self.confirmation)
            moves = self._moves(plan, number)
            effect = self._standing(search, plan) + moves
            accuracy = clip(self.levels + effect + self._run_luck(search, plan)[:, :, None])
            items = self.rng.standard_normal((self.num, len(self.levels)))
            fresh = self._count(1, number, accuracy, items)
            reference = self._count(1, number, self.reference[:, None], items)[:, 0]
            dev = self._count(0, number, accuracy, self.dev_items)
            item_variance = self._item_variance(accuracy, number)
            lift = (fresh - reference[:, None]).mean(2) / self.design.fresh_items
            variance = item_variance.mean(2) / len(self.levels)
            values = self._values(dev, fresh, reference)
            judged = judge(plan, values, lift, variance)
            is_gone = self.world.planted and not self.world.planted_stands
            kept = search.take(plan, judged, moves * (0 if is_gone else self.world.kept_share))
            cut = self.rng.binomial((self.design.fresh_items - fresh).astype(int), self.world.truncated)
            seen = (plan.kind, lift, variance, fresh, cut, reference, item_variance)
            rounds.append((*seen, effect.mean(2), judged.set_aside, kept))
        kind, lift, variance, *rest = (np.stack(each, 1) for each in zip(*rounds, strict=True))
        return Played(Runs(kind, lift, variance), *rest)

    def _standing(self, search: Search, plan: Planned) -> Floats:
        """(C, A, F) the effects of the standing settings that an arm has; a moved axis has its new setting alone."""
        every, whole = np.arange(self.num)[:, None], search.effects.sum(1)[:, None]
        has_standing = plan.moved | (plan.kind == STANDING)
        overwritten = np.where(plan.moved[:, :, None], search.effects[every, np.maximum(plan.axis, 0)], 0)
        return np.where(has_standing[:, :, None], whole - overwritten, 0)

    def _moves(self, plan: Planned, number: int) -> Floats:
        """(C, A, F) the effects of the moved settings. A setting that is tried again has the same one."""
        world, effects = self.world, np.zeros((*plan.axis.shape, len(self.levels)))
        if world.recipe_sd or world.common_sd:
            for axis in range(len(CHOICES)):
                for value in np.unique(plan.value[plan.axis == axis]):
                    here = (plan.axis == axis) & (plan.value == value)
                    effects += np.where(here[:, :, None], self._drawn(axis, int(value))[:, None], 0)
        if world.planted and number == world.planted_round:
            effects += world.planted * (plan.axis == 0)[:, :, None]
        return effects

    def _drawn(self, axis: int, value: int) -> Floats:
        if (axis, value) not in self.drawn:
            own = self.rng.normal(0, self.world.recipe_sd, (self.num, len(self.levels)))
            self.drawn[axis, value] = own + self.rng.normal(0, self.world.common_sd, (self.num, 1))
        return self.drawn[axis, value]

    def _run_luck(self, search: Search, plan: Planned) -> Floats:
        """(C, A) the luck of training."""
        stands = np.asarray(search.stands[:, NOISY_AXES].any(1))[:, None] & (plan.kind != REFERENCE)
        factor = np.where(stands | np.isin(plan.axis, NOISY_AXES), self.world.noisy, 1.0)
        return self._luck(np.where(plan.kind == REFERENCE, self.world.anchors, factor))

    def _luck(self, factor: Floats) -> Floats:
        world = self.world
        if world.tails:
            drawn = self.rng.standard_t(world.tails, factor.shape) * ((world.tails - 2) / world.tails) ** 0.5
        else:
            drawn = self.rng.standard_normal(factor.shape)
        collapses = self.rng.random(factor.shape) < world.collapse_probability
        return np.asarray(world.seed_sd * factor * drawn - world.collapse * collapses)

    def _on_set(self, which: int, number: int, accuracy: Floats) -> Floats:
        """Accuracies on dev (0) or on round `number`'s fresh items (1)."""
        shift = self.ease[which] - (self.world.fresh_harder * number if which else 0)
        return np.asarray(ndtr(ndtri(accuracy) + shift)) if shift.any() else accuracy

    def _count(self, which: int, number: int, accuracy: Floats, items: Floats) -> Floats:
        """(C, A, F) right answers. items: (C, F) the luck of the items, which all runs share; standard normal."""
        size = self.design.fresh_items if which else self.design.dev_items
        there = self._on_set(which, number, accuracy)
        own, shared = item_parts(there)
        mean = there + np.sqrt(shared / size) * items[:, None]
        mean += np.sqrt(own / size) * self.rng.standard_normal(there.shape)
        return np.asarray(np.clip(np.rint(mean * size), 0, size))

    def _item_variance(self, accuracy: Floats, number: int) -> Floats:
        """(C, A, F) the variance over items of a family's paired lift over the reference, estimated from the items on which the two differ."""
        own, theirs = (item_parts(self._on_set(1, number, each))[0] for each in (accuracy, self.reference[:, None]))
        size = self.design.fresh_items
        differing = (own + theirs) * size
        counted = np.rint(differing + np.sqrt(differing) * self.rng.standard_normal(differing.shape))
        return np.asarray(np.maximum(0, counted) / size**2)

    def _values(self, dev: Floats, fresh: Floats, reference: Floats) -> Floats:
        """(C, A) the shrunk values of `stats.arm_values`, where dev counts in every family and there is no board."""
        m, n = self.design.dev_items, self.design.fresh_items
        raw = (dev - self.dev_reference[:, None] + fresh - reference[:, None]) / (m + n)
        own = item_parts(clip(dev.mean(1) / m))[0] / (m + n)
        mean = raw.mean(1)
        spread = np.maximum(float(LEAST_SPREAD), raw.var(1, ddof=1) - own)
        factor = spread / (spread + own)
        level = (dev.mean(1) - self.dev_reference) / m
        return np.asarray((level[:, None] + factor[:, None] * (raw - mean[:, None])).mean(2))


def judge(plan: Planned, values: Floats, lift: Floats, variance: Floats) -> Judged:
    """What `decision/promotion.py` and `policy_update.py` make of (C, A) values, lifts and variances over items."""
    stands, repeats = plan.kind == STANDING, plan.kind == REFERENCE
    any_stands, every = stands.any(1), np.arange(len(lift))
    runs = np.where(any_stands[:, None], stands, repeats)
    base = np.where(runs, values, 0).sum(1) / (runs.sum(1) + ~any_stands)  # the reference adapter counts with 0
    over = lift - np.where(any_stands, lift[every, stands.argmax(1)], 0)[:, None]
    seeds = seed_variance(lift, variance, repeats, stands)
    below = plan.moved & (over < 0) & (over**2 > Z**2 * (variance + 2 * seeds[:, None]))
    gains = np.where(plan.moved & ~below, values - base[:, None], -np.inf)
    largest = np.where(plan.moved, over, -np.inf).max(1)
    buys = (largest > 0) & (2 * seeds >= np.where(largest > 0, largest, 0) ** 2)
    return Judged(below, np.where(gains > 0, gains, -np.inf), buys)


def seed_variance(lift: Floats, variance: Floats, repeats: Flags, stands: Flags) -> Floats:
    """(C,) the variance of retraining as `stats.lifts.seed_variance` has it: each repeat against the first of its recipe."""
    every, first = np.arange(len(lift)), stands.argmax(1)
    others = stands.copy()
    others[every, first] = False
    over = lift - lift[every, first][:, None]
    squares = np.where(repeats, lift**2 - variance, 0) + np.where(others, over**2 - variance, 0)
    return np.asarray(np.maximum(0, squares.sum(1) / np.maximum((repeats | others).sum(1), 1)) / 2)


def _item_table() -> tuple[Floats, Floats]:
    """Accuracies, and at each E[p_i^2], where p_i is the chance of a right answer to item i."""
    grid = np.linspace(EDGE / 4, 1 - EDGE / 4, 1000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    chance = ndtr((ndtri(grid)[:, None] - ITEM_CORRELATION**0.5 * nodes) / (1 - ITEM_CORRELATION) ** 0.5)
    return grid, np.asarray((chance**2 * weights).sum(1) / weights.sum())


GRID, SQUARES = _item_table()


def item_parts(accuracy: Floats) -> tuple[Floats, Floats]:
    """The variances of one answer to one item: of a run alone, and shared by all runs."""
    squares = np.interp(accuracy, GRID, SQUARES)
    return np.maximum(0, accuracy - squares), np.maximum(0, squares - accuracy**2)


def clip(accuracy: Floats) -> Floats:
    """Keep accuracies away from 0 and 1."""
    return np.asarray(np.clip(accuracy, EDGE, 1 - EDGE))
