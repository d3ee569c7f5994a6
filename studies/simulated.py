"""Simulate item outcomes on dev, fresh and board, for many campaigns at once, in a world whose truth we choose.

An arm's accuracy in a family is the reference recipe's plus a recipe effect, a seed effect and, on the sets that it fools, an exploit. The
reference is a run of its recipe, so it has a seed effect of its own. Model j answers item i right if sqrt(rho) u_i + sqrt(1 - rho) e_ij
< Phi^-1(accuracy), where u and e are standard normal. Two equal models then disagree on 13 % of items. Where a set is easier by x probits,
x is added to Phi^-1(accuracy) of every model, so that effects are equal in probits on all sets. Dev and board items stay for the whole
campaign; fresh items are new in each round. The arm ahead on dev wins each round, and the effects of the next round's arms are centred
70 % of the way to the winner's. The numbers are those of design/statistics.md 5.1.

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
    seed_sd: float = 0.01  # of a training run, the reference among them
    seed_freedom: int | None = (
        None  # None: seeds are normal; else Student's t with so many degrees of freedom, of the same sd
    )
    family_seed_sd: float = 0.0  # of a training run in each family by itself
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
    dev_easier: float = 0.0  # than fresh, in probits; negative where dev is harder
    board_easier: float = 0.0
    unequal: tuple[int, ...] | None = (
        None  # positions of the families whose difficulty differs, the strongest is 0; None: all
    )
    reference_luck: float = 0.0  # of the reference's seed, in accuracy, beside what is drawn
    item_correlation: float = ITEM_CORRELATION

    @property
    def is_of_the_board(self) -> bool:
        """Whether the world differs from the healthy one in what the board prints alone."""
        return bool(self.board_easier or self.slope_sd or self.stack_sd) and not self.dev_easier

    def easier(self, probits: float, num_families: int) -> Floats:
        """(F, 1) how much easier a set is in each family, in probits."""
        shift = np.zeros((num_families, 1))
        shift[slice(None) if self.unequal is None else list(self.unequal)] = probits
        return shift

    def seeds(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> Floats:
        """(C, F, A) seed effects of training runs, in accuracy."""
        campaigns, _, arms = shape
        if self.seed_freedom is None:
            drawn = rng.normal(0, self.seed_sd, (campaigns, 1, arms))
        else:
            scale = self.seed_sd * (1 - 2 / self.seed_freedom) ** 0.5
            drawn = scale * rng.standard_t(self.seed_freedom, (campaigns, 1, arms))
        drawn = drawn - self.collapse * (rng.random(drawn.shape) < self.collapse_probability)
        return np.asarray(drawn + rng.normal(0, self.family_seed_sd, shape))

    def efficacy_in(self, number: int) -> float:
        """The exploit's efficacy in round `number`, counted from 0."""
        return self.efficacy[min(number, len(self.efficacy) - 1)]


@dataclass(frozen=True)
class CountArrays:
    """Sufficient integers of one item set in one round. Y_ij is 1 if arm j is right on item i, Y_i0 is the reference's."""

    right: Ints  # (C, F, A) sum_i Y_ij
    both: Ints  # (C, F, A, A) sum_i Y_ij Y_ik
    reference: Ints  # (C, F) sum_i Y_i0
    answers: Floats  # (C, F, A, M) Y_ij, 0 or 1
    marks: Flags  # (C, F, M) Y_i0

    @property
    def num_items(self) -> int:
        """Of a family, M."""
        return int(self.marks.shape[2])


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
    correlation: float = ITEM_CORRELATION
    _noise: Floats | None = field(default=None, repr=False)

    @classmethod
    def new(
        cls,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        reference: Floats,
        correlation: float = ITEM_CORRELATION,
    ) -> Sampler:
        """Draw the items and the reference's answers. shape: (C, F, M); reference: its accuracies, broadcast to (C, F, 1)."""
        ease = rng.standard_normal(shape, dtype=np.float32)
        sampler = cls(rng, ease, None, correlation)
        sampler.reference = sampler.answers(np.broadcast_to(reference, (*shape[:2], 1)))[:, :, 0]
        return sampler

    def answers(self, accuracy: Floats) -> Any:
        """Draw (C, F, A, M) booleans from (C, F, A) accuracies."""
        spread = (1 - self.correlation) ** 0.5
        level = (ndtri(accuracy) / spread).astype(np.float32)
        shape = (*accuracy.shape, self.ease.shape[2])
        if self._noise is None or self._noise.shape != shape:
            self._noise = np.empty(shape, np.float32)
        self.rng.standard_normal(out=self._noise, dtype=np.float32)
        shift = np.float32(self.correlation**0.5 / spread) * self.ease
        self._noise += shift[:, :, None, :]
        return self._noise < level[..., None]

    def counts(self, accuracy: Floats) -> CountArrays:
        """Draw answers from (C, F, A) accuracies, and count them."""
        return counts_of(self.answers(accuracy), self.reference)


def counts_of(answers: Any, reference: Any) -> CountArrays:
    """Count (C, F, A, M) answers of the arms and (C, F, M) answers of the reference, both booleans."""
    wide = answers.astype(np.float32)
    both = (wide @ wide.swapaxes(2, 3)).astype(np.int32)  # sums below 2^24 are exact
    right = np.einsum("cfaa->cfa", both)
    return CountArrays(right, both, reference.sum(-1, dtype=np.int32), wide, reference)


def play(world: World, design: Design, rng: np.random.Generator, num: int) -> list[RoundSeen]:
    """Simulate `num` campaigns of one world. The arm ahead on dev wins each round: no other policy pushes the proxy harder."""
    levels = np.array([float(level) for level in design.accuracies])
    shape, weakest = (num, len(levels), design.arms), np.argsort(levels)[: world.exploited_families]
    base = levels[:, None]
    luck = world.reference_luck + world.seeds(rng, (num, len(levels), 1))
    slopes = np.clip(rng.normal(1, world.slope_sd, (num, len(levels), 1)), *world.slope_range)
    own, own_target = _clip(base + luck), _clip(base + slopes * luck)
    dev_easier, board_easier = (world.easier(x, len(levels)) for x in (world.dev_easier, world.board_easier))
    dev = Sampler.new(rng, (num, len(levels), design.dev_items), easier(own, dev_easier), world.item_correlation)
    rows = max(1, design.board_rows // len(levels))
    hidden = Sampler.new(rng, (num, len(levels), rows), easier(own_target, board_easier), world.item_correlation)
    repeats = rng.normal(0, INFERENCE_SD, (num, 2))
    hidden_reference = hidden.reference.mean((1, 2))
    board_reference = np.round(hidden_reference[:, None] + repeats, 2).mean(1)
    recipe_mean, exploit_mean = np.zeros((num, len(levels), 1)), np.full((num, 1), world.exploit_mean)
    rounds: list[RoundSeen] = []
    for number in range(design.rounds):
        recipe = recipe_mean + _recipes(world, rng, shape)
        seed = world.seeds(rng, shape)
        bent = exploit_mean + rng.normal(0, world.exploit_sd, (num, design.arms))
        exploit = np.abs(bent)
        if world.cheating_arms is not None:
            exploit[:, world.cheating_arms :] = 0
        gain = np.zeros(shape)
        gain[:, weakest] = world.efficacy_in(number) * exploit[:, None]
        honest = recipe + seed - world.lost_target * gain
        target = slopes * (recipe + seed) - world.lost_target * gain
        drift = np.full((len(levels), 1), -world.fresh_harder * (number + 1))
        fresh = Sampler.new(rng, (num, len(levels), design.fresh_items), easier(own, drift), world.item_correlation)
        fresh_accuracy = honest + gain if world.fools_fresh else honest
        on_board = _clip(base + target + (gain if world.fools_board else 0))
        hidden_answers = hidden.answers(easier(on_board, board_easier))
        true_score = hidden_answers.mean((1, 3))
        printed = (
            true_score + rng.normal(0, INFERENCE_SD, true_score.shape) + rng.normal(0, world.stack_sd, true_score.shape)
        )
        rounds.append(
            RoundSeen(
                dev.counts(easier(_clip(base + honest + gain), dev_easier)),
                fresh.counts(easier(_clip(base + fresh_accuracy), drift)),
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


def easier(accuracy: Floats, probits: Floats) -> Floats:
    """The accuracies on items that are easier by so many probits (F, 1)."""
    return np.asarray(ndtr(ndtri(accuracy) + probits)) if probits.any() else accuracy
