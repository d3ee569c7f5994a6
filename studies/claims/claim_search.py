"""The search of simulated campaigns: which eight arms a round runs, as `decision/plan.py` makes them, and what a result changes.

Many campaigns at once. Contrasts, controls and repaired families are left out: no null of the alarms gets them. The real code's campaigns
agree (`claim_check`). Shapes: C campaigns, A arms, F families, X axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.campaign.records import NUM_ARMS
from pipeline.claims.assess_claims import DOUBLED, FINAL_ROUND
from studies.claims.claim_twin import AXIS, OVERWRITES, REFERENCE, STANDING
from studies.simulated import Flags, Floats, Ints

CHOICES = (0, 2, 0, 3, 0, 3, 1)
"""Of the seven shipped axes, how many values they have beside the reference's; 0: a range, which never ends."""
NOISY_AXES = (0, 2)  # learning rate and mixture
LEAST_AXES, PLATEAU_LOOKS, MOST_REPLICATES = 4, 3, 2  # article 11


@dataclass(frozen=True)
class Planned:
    """One round's arms. `axis` (C, A) is the moved axis, -1 for none; `value` (C, A) its value's number."""

    kind: Ints  # (C, A), as in claim_twin
    axis: Ints
    value: Ints

    @property
    def moved(self) -> Flags:
        """(C, A) the axis arms."""
        return np.asarray(self.axis >= 0)


@dataclass(frozen=True)
class Judged:
    """What one round shows: (C, A) arms set aside, (C, A) gains in value over the baseline, -inf for none, (C,) is a replicate bought?"""

    set_aside: Flags
    gains: Floats
    buys: Flags


@dataclass
class Search:
    """What a round leaves to the next, in `num` campaigns."""

    num: int
    families: int
    stands: Flags = field(init=False)  # (C, X)
    effects: Floats = field(init=False)  # (C, X, F) of the settings that stand
    choice: Ints = field(init=False)  # (C, X) which value stands, -1 for the reference's
    closed: Flags = field(init=False)  # (C, X, values) set aside
    tries: Ints = field(init=False)  # (C, X, values) how often a choice was tried
    looks: Ints = field(init=False)  # (C, X) how often an axis moved
    newest: Ints = field(init=False)  # (C, X) the place in time of its last move, -1 for none
    quiet: Ints = field(init=False)  # (C, X) looks without a gain
    retired: Flags = field(init=False)  # (C, X)
    bought: Ints = field(init=False)  # (C,) replicates

    def __post_init__(self) -> None:
        shape = (self.num, len(CHOICES))
        self.stands, self.retired = np.zeros(shape, bool), np.zeros(shape, bool)
        self.effects, self.choice = np.zeros((*shape, self.families)), np.full(shape, -1)
        self.closed, self.tries = np.zeros((*shape, max(CHOICES)), bool), np.zeros((*shape, max(CHOICES)), int)
        self.looks, self.newest = np.zeros(shape, int), np.full(shape, -1)
        self.quiet, self.bought = np.zeros(shape, int), np.zeros(self.num, int)

    def plan(self, number: int, rounds: int, confirmation: str) -> Planned:
        """The arms of round `number`: the anchor first, then the axes in turn, replicates last."""
        any_stands = self.stands.any(1)
        is_doubled = int(confirmation == DOUBLED and number > 1)
        confirms = any_stands & (confirmation == FINAL_ROUND and number == rounds)
        bought = np.maximum(0, self.bought - is_doubled)  # the doubled standing run counts as the first of them
        repeats = 1 + is_doubled + np.where(any_stands, 0, bought + (number == 1))
        standing = np.where(any_stands, 1 + is_doubled + bought, 0)
        repeats, standing = np.where(confirms, 4, repeats), np.where(confirms, 4, standing)
        slots = NUM_ARMS - repeats - standing
        order, value = self._moves()
        moves = np.minimum((order >= 0).sum(1), slots)
        repeats = repeats + np.where(any_stands, 0, slots - moves)
        arm = np.arange(NUM_ARMS)
        moved = (arm >= 1) & (arm <= moves[:, None])
        at = np.clip(arm - 1, 0, len(CHOICES) - 1)
        axis = np.where(moved, order[:, at], -1)
        overwrites = np.take_along_axis(self.stands, np.maximum(axis, 0), 1)
        is_repeat = (arm == 0) | ((arm > moves[:, None]) & (arm < (moves + repeats)[:, None]))
        others = np.where(is_repeat, REFERENCE, STANDING)
        kind = np.where(moved, np.where(overwrites, OVERWRITES, AXIS), others)
        return Planned(kind, axis, np.where(moved, value[:, at], 0))

    def _moves(self) -> tuple[Ints, Ints]:
        """(C, X) the axes that have a value left, those that waited longest first, -1 behind them; and the number of that value."""
        value = self.looks + 1
        has_value = ~self.retired
        for axis, choices in enumerate(CHOICES):
            if choices:
                free = ~self.closed[:, axis, :choices] & (np.arange(choices) != self.choice[:, axis, None])
                tries = np.where(free, self.tries[:, axis, :choices], np.iinfo(int).max)
                value[:, axis] = tries.argmin(1)
                has_value[:, axis] &= free.any(1)
        key = np.where(has_value, self.newest, np.iinfo(int).max)
        order = np.argsort(key, 1, kind="stable")
        has_value = np.take_along_axis(has_value, order, 1)
        return np.where(has_value, order, -1), np.take_along_axis(value, order, 1)

    def count_turns(self, plan: Planned) -> None:
        """Note what the axes were given in a round."""
        now = self.newest.max() + 1
        for arm in range(plan.axis.shape[1]):
            rows = np.nonzero(plan.axis[:, arm] >= 0)[0]
            axis = plan.axis[rows, arm]
            is_choice = np.array(CHOICES)[axis] > 0
            self.newest[rows, axis] = now + arm
            self.looks[rows, axis] += 1
            self.tries[rows[is_choice], axis[is_choice], plan.value[rows, arm][is_choice]] += 1

    def take(self, plan: Planned, judged: Judged, kept_effect: Floats) -> Flags:
        """Change the search by a round's result. Returns (C,) whether a setting was kept.

        kept_effect: (C, A, F) the effect that each arm's moved setting has once it stands.
        """
        self.count_turns(plan)
        every, best = np.arange(self.num), judged.gains.argmax(1)
        kept = judged.gains[every, best] > -np.inf
        self._retire(plan, judged.gains)
        axes = np.maximum(plan.axis, 0)
        closing = judged.set_aside & (np.array(CHOICES)[axes] > 0)
        at = np.nonzero(closing)[0]
        self.closed[at, axes[closing], plan.value[closing]] = True
        rows, axis, value = every[kept], plan.axis[every, best][kept], plan.value[every, best][kept]
        self.effects[rows, axis] = kept_effect[every, best][kept]
        self.stands[rows, axis] = True
        self.choice[rows, axis] = np.where(np.array(CHOICES)[axis] > 0, value, -1)
        self.bought = np.where(judged.buys, np.minimum(self.bought + 1, MOST_REPLICATES), 0)
        return np.asarray(kept)

    def _retire(self, plan: Planned, gains: Floats) -> None:
        """Retire each axis that gained nothing in `PLATEAU_LOOKS` looks in a row, while enough are left."""
        for axis in range(len(CHOICES)):
            here = plan.axis == axis
            gained = (here & (gains > -np.inf)).any(1)
            quiet = np.where(gained, 0, self.quiet[:, axis] + 1)
            self.quiet[:, axis] = np.where(here.any(1), quiet, self.quiet[:, axis])
            is_left = (~self.retired).sum(1) > LEAST_AXES
            self.retired[:, axis] |= (self.quiet[:, axis] >= PLATEAU_LOOKS) & is_left
