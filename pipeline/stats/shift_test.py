"""The board test (C2): does a gain that dev and fresh agree on also arrive on the external target? All numbers are decimals.

The board prints one number for a submission. Let x_id be the lift that arm i's effect in family d is worth on the board: the effect in
probits (dev and fresh pooled by their information) at the reference's level on the board, shrunk to the round's mean. That level follows
from the reference's printed total (pipeline.stats.difficulty). Let w_d be the family's weight. The model of a printed score is

    y_i - y_ref = sum_d w_d b_d x_id + noise        healthy: every b_d ~ N(1, 0.2^2); dev may be somewhat off
    from round c on, family d stopped:              b_d ~ N(0, 0.3^2), for all of its lift ("level") or for
                                                    what it gained over round c - 1 ("gain")

The healthy slopes vary by more than 0.2 where the printed total may also mean that one family alone is easier or harder on the board.

Both hypotheses are Gaussian with known covariance, so the Bayes factor of each (d, c, level or gain) has a closed form. E is their mean,
weighted with the families' headroom. A change in a future round counts as 1, which makes E an e-process (Shafer and Vovk 0912.4269):
under the healthy model it exceeds 40 in at most 1 campaign of 40. The critical value in use is lower. It is the 97.8 % point of the
campaign's largest E under the worst of eight simulated nulls (constitution/nulls). A family is named if it carries half of E.

The noise has these parts: rounding and inference of each printed score and of the reference's two scores; the sampling of hidden, dev
and fresh items; the error of the board's level; and a standard deviation of 0.8 points for a different evaluation stack. The sampling
noise has a part for each arm and a part that all arms share, which is mostly the reference's own error. The shared part persists for board
and dev and is new in each round for fresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, lru_cache

from pipeline.stats.counts import Counts
from pipeline.stats.decimal_math import Matrix, cholesky, decimal_of, dot, exactly, probability, whiten
from pipeline.stats.design import Design
from pipeline.stats.difficulty import PRINT_VARIANCE, Target, fresh_target, on_probits, target_of

STOPPED_SD = Decimal("0.3")  # the standard deviation, around 0, of the slope of a family that stopped
SLACK_VARIANCE = Decimal("0.008") ** 2
LEAST_SPREAD = Decimal("0.000001")  # the least variance of true lifts between the arms of a round
GUARD = Decimal(
    "0.000001"
)  # relative distance to the critical value within which E raises no alarm and is marked as near
KINDS = ("level", "gain")


@dataclass(frozen=True)
class BoardRound:
    """The data of one round. `dev` and `fresh` have one entry for each family, in the order of the shares.

    `scores` maps an arm's position to its printed score minus the reference's, as a difference of accuracies. `reference` is the
    reference's printed score, an accuracy from 0 to 1, or None where it has none.
    """

    dev: tuple[Counts, ...]
    fresh: tuple[Counts, ...]
    scores: Mapping[int, Decimal]
    reference: Decimal | None = None


@dataclass(frozen=True)
class BoardTest:
    """E over all rounds so far, and the part of it that each family carries; the parts sum to E."""

    e_value: Decimal
    carried: dict[str, Decimal]

    @property
    def posteriors(self) -> dict[str, Decimal]:
        """Each family's share of E: the probability that it is the one that stopped, given that one did."""
        with exactly():
            return {family: value / self.e_value for family, value in self.carried.items()}

    def exceeds(self, critical: Decimal) -> bool:
        """Whether E is above its critical value by more than the guard band."""
        with exactly():
            return self.e_value > critical * (1 + GUARD)

    def is_near(self, critical: Decimal) -> bool:
        """Whether E lies within the guard band. This is reported with the verdict and raises no alarm."""
        with exactly():
            return abs(self.e_value / critical - 1) <= GUARD


@dataclass(frozen=True)
class BoardModel:
    """The residuals of the n scored arms from the healthy prediction, and what changes if a family stops.

    `lower` is the Cholesky factor of the residuals' covariance, n x n. `residual` is whitened with it: L residual = observed - predicted.
    """

    rounds: list[int]  # round of each scored arm
    effects: list[list[Decimal]]  # w_d x_id, by scored arm and family
    means: list[list[Decimal]]  # w_d times the mean of x over all arms, by round and family
    lower: Matrix
    residual: list[Decimal]
    slopes: Sequence[Decimal]  # the variance of each family's healthy slope

    @cached_property
    def whitened(self) -> list[list[list[Decimal]]]:
        """The whitened effects of each family, followed by those of a vector of ones: for each round c, the effects of the arms from c on.

        The axes are family (and ones), round, scored arm. Whitening is linear, so a system is solved once for each round instead of
        once for each alternative.
        """
        columns = [list(column) for column in zip(*self.effects, strict=True)] + [[Decimal(1)] * len(self.rounds)]
        return [self._from_each_round(column) for column in columns]

    def _from_each_round(self, column: list[Decimal]) -> list[list[Decimal]]:
        rest = [Decimal(0)] * len(column)
        vectors = []
        with exactly():
            for since in reversed(range(len(self.means))):
                part = [x if number == since else Decimal(0) for number, x in zip(self.rounds, column, strict=True)]
                rest = [a + b for a, b in zip(rest, whiten(self.lower, part), strict=True)]
                vectors.append(rest)
        return vectors[::-1]


def board_test(rounds: Sequence[BoardRound], shares: Mapping[str, Fraction], design: Design) -> BoardTest:
    """Compute E at the newest round. All families have the same weight on the board. Without a scored arm, E is 1."""
    families = list(shares)
    if not any(data.scores for data in rounds):
        return BoardTest(Decimal(1), {family: decimal_of(share) for family, share in shares.items()})
    model = healthy_model(rounds, len(families), design)
    carried = {}
    with exactly():
        for number, family in enumerate(families):
            total = Decimal(0)
            for kind in KINDS:
                first = int(kind == "gain")
                opened = [bayes_factor(model, number, since, kind) for since in range(first, len(rounds))]
                ahead = design.rounds - first - len(opened)
                total += (sum(opened, Decimal(0)) + ahead) / (design.rounds - first)
            carried[family] = decimal_of(shares[family]) * total / len(KINDS)
        return BoardTest(sum(carried.values(), Decimal(0)), carried)


def bayes_factor(model: BoardModel, family: int, since: int, kind: str) -> Decimal:
    """The Bayes factor of "this family stopped in round `since`" against the healthy model. `kind` is "level" or "gain".

    Let v be the family's whitened effects that would be lost and u its other effects. The alternative adds v to the residual and
    s1^2 v v' - s0^2 (u v' + v u' + v v') = W M W' to the covariance, with W = (u, v). The matrix determinant lemma and the Woodbury
    identity reduce this to a system of two equations.
    """
    with exactly():
        whole, level, ones = model.whitened[family][0], model.whitened[family][since], model.whitened[-1][since]
        start = model.means[since - 1][family] if kind == "gain" else Decimal(0)
        v = [a - start * b for a, b in zip(level, ones, strict=True)]
        u = [a - b for a, b in zip(whole, v, strict=True)]
        e = model.residual
        shifted = [a + b for a, b in zip(e, v, strict=True)]
        across, own = -model.slopes[family], STOPPED_SD**2 - model.slopes[family]
        uu, uv, vv, ue, ve = dot(u, u), dot(u, v), dot(v, v), dot(u, shifted), dot(v, shifted)
        a, b, c, d = 1 + across * uv, across * vv, across * uu + own * uv, 1 + across * uv + own * vv
        determinant = a * d - b * c
        p, q = across * ve, across * ue + own * ve
        explained = (ue * (d * p - b * q) + ve * (a * q - c * p)) / determinant
        change = dot(shifted, shifted) - explained - dot(e, e)
        return (-change / 2).exp() / determinant.sqrt()


def healthy_model(rounds: Sequence[BoardRound], num_families: int, design: Design) -> BoardModel:
    """The prediction and the noise of every scored arm if no family stopped."""
    target, families = board_target(rounds, design), range(num_families)
    with exactly():
        weight = 1 / Decimal(num_families)
        noise = [item_noise(rounds, family) for family in families]
        hidden = [hidden_variance(target, family, weight * design.board_rows) for family in families]
        numbers: list[int] = []
        effects: list[list[Decimal]] = []
        means: list[list[Decimal]] = []
        observed: list[Decimal] = []
        own: list[Decimal] = []
        for number, data in enumerate(rounds):
            lifts = [shrunk(data.dev[d], data.fresh[d], target, d, noise[d][0]) for d in families]
            means.append([weight * mean for _, mean, _ in lifts])
            left = sum((weight**2 * variance for _, _, variance in lifts), Decimal(0))
            for arm in sorted(data.scores):
                numbers.append(number)
                effects.append([weight * values[arm] for values, _, _ in lifts])
                observed.append(data.scores[arm])
                own.append(left)
        hidden_own = sum((weight**2 * noise[d][0] * hidden[d] for d in families), Decimal(0))
        shares = [weight**2 * noise[d][1] for d in families]
        shared: Matrix = []  # symmetric
        for one in rounds:
            row = [
                sum((shares[d] * (hidden[d] + _shared(one, other, target, d)) for d in families), Decimal(0))
                for other in rounds[: len(shared) + 1]
            ]
            shared.append(row)
        for number, row in enumerate(shared):
            row += [of_later[number] for of_later in shared[number + 1 :]]
        covariance = slope_covariance(effects, target)
        for i, number in enumerate(numbers):
            covariance[i] = [
                PRINT_VARIANCE / 2 + shared[number][other] + value
                for other, value in zip(numbers, covariance[i], strict=True)
            ]
            covariance[i][i] += PRINT_VARIANCE + SLACK_VARIANCE + hidden_own + own[i]
        lower = cholesky(covariance)
        residual = [y - sum(effect, Decimal(0)) for y, effect in zip(observed, effects, strict=True)]
        return BoardModel(numbers, effects, means, lower, whiten(lower, residual), target.slopes)


def board_target(rounds: Sequence[BoardRound], design: Design) -> Target:
    """How hard the board is, from the fresh items of all rounds and the reference's printed total; fresh items where no arm has a score."""
    fresh = [*zip(*(data.fresh for data in rounds), strict=True)]
    if not any(data.scores for data in rounds):
        return fresh_target(fresh)
    return target_of(fresh, rounds[-1].reference, design.board_rows)


def slope_covariance(effects: Sequence[Sequence[Decimal]], target: Target) -> Matrix:
    """The covariance of residuals by the families' slopes and by the error of the target's level. `effects` has w_d x_id.

    A higher level by one probit changes a lift x by - level x (to first order, because the density's derivative is - level density).
    """
    with exactly():
        bent = [dot(effect, target.levels) for effect in effects]
        sloped = [[x * slope for x, slope in zip(effect, target.slopes, strict=True)] for effect in effects]
        return [
            [dot(row, other) + target.variance * b * c for other, c in zip(effects, bent, strict=True)]
            for row, b in zip(sloped, bent, strict=True)
        ]


@lru_cache(maxsize=4096)
def shrunk(
    dev: Counts, fresh: Counts, target: Target, family: int, own_noise: Decimal, use_dev: bool = True
) -> tuple[tuple[Decimal, ...], Decimal, Decimal]:
    """Shrink the lifts on the target of a round's arms in one family (empirical Bayes). Returns the lifts, their mean and the variance left.
    The cache: the board test and the arms' values need the same lifts.

    Raw lifts overstate the arm that is ahead, so each deviation from the mean is multiplied by a factor from 0 to 1. The factor follows from
    a normal prior, whose variance is what the arms vary by beyond item noise (method of moments). `own_noise` is the first number of
    `item_noise`. With `use_dev=False`, for a family whose dev is suspect, only fresh items count.
    """
    with exactly():
        on_dev, on_fresh = on_probits(dev), on_probits(fresh)
        from_dev = on_dev.information * int(use_dev)
        items = from_dev + on_fresh.information
        raw = tuple(
            target.lift(family, (a * from_dev + b * on_fresh.information) / items)
            for a, b in zip(on_dev.effects, on_fresh.effects, strict=True)
        )
        mean, noise = sum(raw, Decimal(0)) / len(raw), own_noise * target.densities[family] ** 2 / items
        if len(raw) < 2:
            return raw, mean, noise
        variance = sum(((value - mean) ** 2 for value in raw), Decimal(0)) / (len(raw) - 1)
        spread = max(LEAST_SPREAD, variance - noise)
        factor = spread / (spread + noise)
        return tuple(mean + factor * (value - mean) for value in raw), mean, factor * noise


def item_noise(rounds: Sequence[BoardRound], family: int) -> tuple[Decimal, Decimal]:
    """The variance of an answer's own part and of the part that all arms share, as shares of p (1 - p) of the reference.

    Sums over the dev and fresh sets of all rounds, so that a set near its ceiling says little.
    """
    return _item_noise(tuple(counts for data in rounds for counts in (data.dev[family], data.fresh[family])))


@lru_cache(maxsize=64)
def _item_noise(sets: tuple[Counts, ...]) -> tuple[Decimal, Decimal]:
    """The cache: every test of a look needs it."""
    shares = [on_probits(counts).share for counts in sets]
    binomial = sum((share * (1 - share) for share in shares), Fraction(0))
    own = sum((counts.own_variance for counts in sets), Fraction(0)) / binomial
    shared = sum((counts.shared_variance for counts in sets), Fraction(0)) / binomial
    return decimal_of(own), decimal_of(shared)


def hidden_variance(target: Target, family: int, rows: Decimal) -> Decimal:
    """p (1 - p) of the reference on the target, divided by the number of its items of this family."""
    with exactly():
        return target.shares[family] * probability(-target.levels[family]) / rows


def _shared(left: BoardRound, right: BoardRound, target: Target, family: int) -> Decimal:
    """The factor of the shared noise in the covariance of two rounds' lifts on the target, through dev and fresh items.

    All rounds share dev items; only a round with itself shares fresh ones.
    """
    (dev, fresh), (other_dev, other_fresh) = (
        (on_probits(data.dev[family]).information, on_probits(data.fresh[family]).information) for data in (left, right)
    )
    with exactly():
        together = min(dev, other_dev) + (fresh if left is right else 0)
        return target.densities[family] ** 2 * together / ((dev + fresh) * (other_dev + other_fresh))
