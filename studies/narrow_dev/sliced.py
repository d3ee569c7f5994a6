"""Campaigns in which nothing is wrong, and dev is a declared slice of its families: `evidence simulate` has them as worlds of their own.

Half of the fresh and board items of a family lie outside of the slice that all its dev items lie in. They may be easier or harder, and a
recipe's effect may arrive there by a factor of its own. Apart from that the world is the healthy one of studies.simulated, whose words and
shapes this module uses. It is apart because the shipped critical values name the code that made them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.stats.design import Design
from studies.nature import clip
from studies.simulated import (
    BATCH,
    FOLLOWED,
    INFERENCE_SD,
    CountArrays,
    Floats,
    RoundSeen,
    Sampler,
    World,
    ahead_on_dev,
    counts_of,
    easier,
)  # fmt: skip

HEALTHY = World()


@dataclass(frozen=True)
class Slice:
    """How a family is outside of the slice: `easier` by so many probits in the families at `where` (None: in all; 0 is the strongest), and
    with effects of `slope_sd` around what they are inside, by family and arm."""

    easier: float = 0.0
    where: tuple[int, ...] | None = None
    slope_sd: float = 0.0


SLICES = {
    **{
        f"outside {'easier' if probits > 0 else 'harder'} by {abs(probits):g} {words}": Slice(probits, where)
        for probits in (0.6, -0.6, 1.0, -1.0)
        for words, where in {"in the strongest": (0,), "in the weakest": (-1,), "in all": None}.items()
    },
    **{
        f"effects outside {words}, items harder by 0.6": Slice(-0.6, None, sd)
        for words, sd in {"0.8 to 1.2 times": 0.1, "0.5 to 1.5 times": 0.25, "0 to 2 times": 0.5}.items()
    },
}
"""The last three are no nulls in the strict sense: dev runs ahead of fresh items for some recipes and behind for others."""


@dataclass
class Mixed:
    """Items of which the second half lie outside of the slice."""

    inside: Sampler
    outside: Sampler

    @classmethod
    def new(cls, rng: np.random.Generator, shape: tuple[int, int, int], reference: Floats, aside: Floats) -> Mixed:
        """Draw the items and the reference's answers. shape: (C, F, M); reference: (C, F, 1) its accuracies inside; aside: (F, 1) probits."""
        num_inside = shape[2] // 2
        sizes = num_inside, shape[2] - num_inside
        drawn = [
            Sampler.new(rng, (*shape[:2], size), each)
            for size, each in zip(sizes, (reference, easier(reference, aside)), strict=True)
        ]
        return cls(*drawn)

    def counts(self, inside: Floats, outside: Floats) -> CountArrays:
        """Draw answers from (C, F, A) accuracies inside and outside of the slice, and count them."""
        answers = np.concatenate([self.inside.answers(inside), self.outside.answers(outside)], axis=-1)
        return counts_of(answers, np.concatenate([self.inside.reference, self.outside.reference], axis=-1))


def batches(world: Slice, design: Design, seed: tuple[int, ...], num: int) -> Iterator[list[RoundSeen]]:
    """As simulated.batches: `num` campaigns, `BATCH` at a time."""
    for start in range(0, num, BATCH):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((*seed, start // BATCH))))
        yield play(world, design, rng, min(BATCH, num - start))


def play(world: Slice, design: Design, rng: np.random.Generator, num: int) -> list[RoundSeen]:
    """Simulate `num` campaigns. The arm ahead on dev wins each round, as in simulated.play."""
    base = np.array([float(level) for level in design.accuracies])[:, None]
    shape = (num, len(base), design.arms)
    aside = np.zeros((len(base), 1))
    aside[slice(None) if world.where is None else list(world.where)] = world.easier
    own = clip(base + HEALTHY.seeds(rng, (num, len(base), 1)))
    dev = Sampler.new(rng, (*shape[:2], design.dev_items), own)
    board = Mixed.new(rng, (*shape[:2], max(1, design.board_rows // len(base))), own, aside)
    of_reference = np.concatenate([board.inside.reference, board.outside.reference], axis=-1).mean((1, 2))
    printed = np.round(of_reference[:, None] + rng.normal(0, INFERENCE_SD, (num, 2)), 2).mean(1)
    centre = np.zeros((num, len(base), 1))
    rounds: list[RoundSeen] = []
    for _ in range(design.rounds):
        recipe = (
            centre + rng.normal(0, HEALTHY.recipe_sd, shape) + rng.normal(0, HEALTHY.common_sd, (num, 1, design.arms))
        )
        gain = recipe + HEALTHY.seeds(rng, shape)
        inside = clip(base + gain)
        outside = easier(clip(base + rng.normal(1, world.slope_sd, shape) * gain), aside)
        fresh = Mixed.new(rng, (*shape[:2], design.fresh_items), own, aside)
        on_board = board.counts(inside, outside)
        score = on_board.right.mean(1) / on_board.num_items
        told = np.round(score + rng.normal(0, INFERENCE_SD, score.shape), 2)
        rounds.append(RoundSeen(dev.counts(inside), fresh.counts(inside, outside), told, printed))
        winner = ahead_on_dev(rounds[-1])
        centre += FOLLOWED * (recipe[np.arange(num), :, winner][..., None] - centre)
    return rounds
