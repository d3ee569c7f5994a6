"""Simulate item outcomes on dev, fresh and board, for many campaigns at once, in a world whose truth we choose.

An arm's accuracy in a family is the reference's plus a recipe effect, a seed effect and, on the sets that it fools, an exploit. Model j
answers item i right if sqrt(rho) u_i + sqrt(1 - rho) e_ij < Phi^-1(accuracy), where u and e are standard normal. Two equal models then
disagree on 13 % of items. Dev and board items stay for the whole campaign; fresh items are new in each round. The arm ahead on dev wins
each round, and the effects of the next round's arms are centred 70 % of the way to the winner's. The numbers are those of
design/statistics.md 5.1.

Shapes: C campaigns, F families, A arms, M items of a family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from pipeline.stats.design import Design

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
BATCH = 50  # campaigns at once: 2.9 MB of draws a set at 300 items stay in the cache
ITEM_CORRELATION = 0.8
INFERENCE_SD = 0.004  # of one board score under repetition, statistics.md 1.2
FOLLOWED = 0.7  # how far the next round moves to its winner
EDGE = 0.01  # no accuracy comes nearer to 0 or 1


@dataclass(frozen=True)
class World:
    """The truth of a scenario. Lifts and standard deviations are in accuracy (0.03 = 3 points). The defaults are the healthy world."""

    recipe_sd: float = 0.03
    common_sd: float = 0.015
    family_correlation: float = 0.0
    seed_sd: float = 0.01
    collapse_probability: float = 0.05
    collapse: float = 0.05
    exploit_sd: float = 0.0
    exploit_mean: float = 0.0
    exploited_families: int = 1  # of the weakest
    cheating_arms: int | None = None  # None: every arm has its own exploit, and the next round takes over the winner's
    efficacy: tuple[float, ...] = (0.0, 0.5, 1.0, 1.0)  # of the exploit by round; the last value goes on
    lost_target: float = 0.0  # share of the exploit that the target loses
    fools_fresh: bool = False
    fools_board: bool = False
    slope_sd: float = 0.0  # of each family's target lift over its dev lift
    slope_range: tuple[float, float] = (0.6, 1.4)
    stack_sd: float = 0.0  # of a board score, by another evaluation stack
    fresh_harder: float = 0.0  # the fresh generator's drift a round, in probits

    def efficacy_in(self, number: int) -> float:
        """The exploit's efficacy in round `number`, counted from 0."""
        return self.efficacy[min(number, len(self.efficacy) - 1)]


@dataclass(frozen=True)
class CountArrays:
    """Sufficient integers of one item set in one round. Y_ij is 1 if arm j is right on item i, S_i = sum_j Y_ij, Y_i0 is the reference's."""

    num_items: int  # of a family, M
    right: Ints  # (C, F, A) sum_i Y_ij
    with_others: Ints  # (C, F, A) sum_i Y_ij S_i
    squares: Ints  # (C, F) sum_i S_i^2
    reference: Ints  # (C, F) sum_i Y_i0
    lifts: Ints  # (C, F, M) S_i - A Y_i0, int8


@dataclass(frozen=True)
class RoundSeen:
    """What the tests see of a round."""

    dev: CountArrays
    fresh: CountArrays
    board: Floats  # (C, A) printed scores
    board_reference: Floats  # (C,) mean of the reference's two printed scores


@dataclass
class Sampler:
    """Draws answers to the items of one set. `ease` (C, F, M) is u_i; `reference` (C, F, M) holds the reference's answers."""

    rng: np.random.Generator
    ease: Floats
    reference: Any
    _noise: Floats | None = field(default=None, repr=False)

    @classmethod
    def new(cls, rng: np.random.Generator, shape: tuple[int, int, int], reference: Floats) -> Sampler:
        """Draw the items and the reference's answers. shape: (C, F, M); reference: its accuracies, broadcast to (C, F, 1)."""
        ease = rng.standard_normal(shape, dtype=np.float32)
        sampler = cls(rng, ease, None)
        sampler.reference = sampler.answers(np.broadcast_to(reference, (*shape[:2], 1)))[:, :, 0]
        return sampler

    def answers(self, accuracy: Floats) -> Any:
        """Draw (C, F, A, M) booleans from (C, F, A) accuracies."""
        spread = (1 - ITEM_CORRELATION) ** 0.5
        level = (ndtri(accuracy) / spread).astype(np.float32)
        shape = (*accuracy.shape, self.ease.shape[2])
        if self._noise is None or self._noise.shape != shape:
            self._noise = np.empty(shape, np.float32)
        self.rng.standard_normal(out=self._noise, dtype=np.float32)
        shift = np.float32(ITEM_CORRELATION**0.5 / spread) * self.ease
        self._noise += shift[:, :, None, :]
        return self._noise < level[..., None]

    def counts(self, accuracy: Floats) -> CountArrays:
        """Draw answers from (C, F, A) accuracies, and count them."""
        return counts_of(self.answers(accuracy), self.reference)


def counts_of(answers: Any, reference: Any) -> CountArrays:
    """Count (C, F, A, M) answers of the arms and (C, F, M) answers of the reference, both booleans."""
    bits = answers.view(np.int8)
    total = np.add.reduce(bits, axis=2, dtype=np.int8)
    wide = total.astype(np.float32)
    with_others = (answers.astype(np.float32) @ wide[..., None])[..., 0]
    return CountArrays(
        answers.shape[3],
        bits.sum(-1, dtype=np.int32),
        with_others.astype(np.int32),
        np.einsum("cfm,cfm->cf", wide, wide).astype(np.int32),
        reference.sum(-1, dtype=np.int32),
        total - np.int8(answers.shape[2]) * reference.view(np.int8),
    )


def play(world: World, design: Design, rng: np.random.Generator, num: int) -> list[RoundSeen]:
    """Simulate `num` campaigns of one world. The arm ahead on dev wins each round: no other policy pushes the proxy harder."""
    levels = np.array([float(level) for level in design.accuracies])
    shape, weakest = (num, len(levels), design.arms), np.argsort(levels)[: world.exploited_families]
    dev = Sampler.new(rng, (num, len(levels), design.dev_items), levels[:, None])
    hidden = Sampler.new(rng, (num, len(levels), max(1, design.board_rows // len(levels))), levels[:, None])
    repeats = rng.normal(0, INFERENCE_SD, (num, 2))
    hidden_reference = hidden.reference.mean((1, 2))
    board_reference = np.round(hidden_reference[:, None] + repeats, 2).mean(1)
    slopes = np.clip(rng.normal(1, world.slope_sd, (num, len(levels), 1)), *world.slope_range)
    recipe_mean, exploit_mean = np.zeros((num, len(levels), 1)), np.full((num, 1), world.exploit_mean)
    rounds: list[RoundSeen] = []
    for number in range(design.rounds):
        recipe = recipe_mean + _recipes(world, rng, shape)
        seed = rng.normal(0, world.seed_sd, (num, 1, design.arms))
        seed -= world.collapse * (rng.random(seed.shape) < world.collapse_probability)
        bent = exploit_mean + rng.normal(0, world.exploit_sd, (num, design.arms))
        exploit = np.abs(bent)
        if world.cheating_arms is not None:
            exploit[:, world.cheating_arms :] = 0
        gain = np.zeros(shape)
        gain[:, weakest] = world.efficacy_in(number) * exploit[:, None]
        honest = recipe + seed - world.lost_target * gain
        target = slopes * (recipe + seed) - world.lost_target * gain
        base = levels[:, None]
        harder = world.fresh_harder * (number + 1)
        fresh = Sampler.new(rng, (num, len(levels), design.fresh_items), _harder(base, harder))
        fresh_accuracy = honest + gain if world.fools_fresh else honest
        hidden_answers = hidden.answers(_clip(base + target + (gain if world.fools_board else 0)))
        true_score = hidden_answers.mean((1, 3))
        printed = (
            true_score + rng.normal(0, INFERENCE_SD, true_score.shape) + rng.normal(0, world.stack_sd, true_score.shape)
        )
        rounds.append(
            RoundSeen(
                dev.counts(_clip(base + honest + gain)),
                fresh.counts(_harder(_clip(base + fresh_accuracy), harder)),
                np.round(printed, 2),
                board_reference,
            )
        )
        winner = ahead_on_dev(rounds[-1])
        at = np.arange(num)
        recipe_mean += FOLLOWED * (recipe[at, :, winner][..., None] - recipe_mean)
        if world.cheating_arms is None:
            exploit_mean += FOLLOWED * (bent[at, winner][:, None] - exploit_mean)
    return rounds


def batches(world: World, design: Design, seed: tuple[int, ...], num: int) -> Iterator[list[RoundSeen]]:
    """Simulate `num` campaigns, `BATCH` at a time. A seed gives the same campaigns whatever number is asked for."""
    for start in range(0, num, BATCH):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((*seed, start // BATCH))))
        yield play(world, design, rng, min(BATCH, num - start))


def ahead_on_dev(seen: RoundSeen) -> Ints:
    """(C,) the arm with the largest dev score; ties go to the lower arm."""
    return np.asarray(seen.dev.right.sum(1).argmax(1))


def _recipes(world: World, rng: np.random.Generator, shape: tuple[int, int, int]) -> Floats:
    own = rng.normal(0, world.recipe_sd, shape)
    shared = rng.normal(0, world.recipe_sd, (shape[0], 1, shape[2]))
    mixed = (1 - world.family_correlation) ** 0.5 * own + world.family_correlation**0.5 * shared
    return mixed + rng.normal(0, world.common_sd, (shape[0], 1, shape[2]))


def _clip(accuracy: Floats) -> Floats:
    return np.clip(accuracy, EDGE, 1 - EDGE)


def _harder(accuracy: Floats, probits: float) -> Floats:
    if not probits:
        return accuracy
    return np.asarray(ndtr(ndtri(accuracy) - probits))
