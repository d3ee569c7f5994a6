"""The board test (C2): does a gain that dev and fresh agree on also arrive on the external target? All numbers are decimals.

The board prints one number for a submission. Let x_id be the lift of arm i in family d (dev and fresh pooled, shrunk to the round's mean)
and w_d the family's weight. The model of a printed score is

    y_i - y_ref = sum_d w_d b_d x_id + noise        healthy: every b_d ~ N(1, 0.2^2); dev may be somewhat off
    from round c on, family d stopped:              b_d ~ N(0, 0.3^2), for all of its lift ("level") or for
                                                    what it gained over round c - 1 ("gain")

Both hypotheses are Gaussian with known covariance, so the Bayes factor of each (d, c, level or gain) has a closed form. E is their mean,
weighted with the families' headroom. A change in a future round counts as 1, which makes E an e-process (Shafer and Vovk 0912.4269):
under the healthy model it exceeds 40 in at most 1 campaign of 40. The critical value in use is lower. It is the 97.8 % point of the
campaign's largest E under the worst of three simulated nulls (constitution/nulls). A family is named if it carries half of E.

The noise has these parts: rounding and inference of each printed score and of the reference's two scores; the sampling of hidden, dev
and fresh items; and a standard deviation of 0.8 points for a different evaluation stack. The sampling noise has a part for each arm and
a part that all arms share, which is mostly the reference's own error. The shared part persists for board and dev and is
new in each round for fresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property

from pipeline.stats.counts import Counts
from pipeline.stats.decimal_math import Matrix, cholesky, decimal_of, dot, exactly, whiten
from pipeline.stats.design import Design

HEALTHY_SD = Decimal("0.2")  # the standard deviation of a family's slope where nothing is wrong
STOPPED_SD = Decimal("0.3")  # the standard deviation, around 0, of the slope of a family that stopped
PRINT_VARIANCE = Decimal("0.01") ** 2 / 12 + Decimal("0.004") ** 2  # rounding to 0.01; inference (statistics.md 1.2)
SLACK_VARIANCE = Decimal("0.008") ** 2
LEAST_SPREAD = Decimal("0.000001")  # the least variance of true lifts between the arms of a round
GUARD = Decimal(
    "0.000001"
)  # relative distance to the critical value within which E raises no alarm and is marked as near
KINDS = ("level", "gain")


@dataclass(frozen=True)
class BoardRound:
    """The data of one round. `dev` and `fresh` have one entry for each family, in the order of the shares.

    `scores` maps an arm's position to its printed score minus the reference's, as a difference of accuracies.
    """

    dev: tuple[Counts, ...]
    fresh: tuple[Counts, ...]
    scores: Mapping[int, Decimal]


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
        across, own = -(HEALTHY_SD**2), STOPPED_SD**2 - HEALTHY_SD**2
        uu, uv, vv, ue, ve = dot(u, u), dot(u, v), dot(v, v), dot(u, shifted), dot(v, shifted)
        a, b, c, d = 1 + across * uv, across * vv, across * uu + own * uv, 1 + across * uv + own * vv
        determinant = a * d - b * c
        p, q = across * ve, across * ue + own * ve
        explained = (ue * (d * p - b * q) + ve * (a * q - c * p)) / determinant
        change = dot(shifted, shifted) - explained - dot(e, e)
        return (-change / 2).exp() / determinant.sqrt()


def healthy_model(rounds: Sequence[BoardRound], num_families: int, design: Design) -> BoardModel:
    """The prediction and the noise of every scored arm if no family stopped."""
    with exactly():
        weight = 1 / Decimal(num_families)
        noise = [item_noise(rounds, family) for family in range(num_families)]
        numbers: list[int] = []
        effects: list[list[Decimal]] = []
        means: list[list[Decimal]] = []
        observed: list[Decimal] = []
        own: list[Decimal] = []
        for number, data in enumerate(rounds):
            lifts = [
                shrunk(dev, fresh, noise[d][0]) for d, (dev, fresh) in enumerate(zip(data.dev, data.fresh, strict=True))
            ]
            means.append([weight * mean for _, mean, _ in lifts])
            spread = sum(
                (weight**2 * noise[d][0] * share / _items(data, d) for d, (_, _, share) in enumerate(lifts)), Decimal(0)
            )
            for arm in sorted(data.scores):
                numbers.append(number)
                effects.append([weight * values[arm] for values, _, _ in lifts])
                observed.append(data.scores[arm])
                own.append(spread)
        hidden = weight * design.board_rows
        hidden_own = sum((weight**2 * variance / hidden for variance, _ in noise), Decimal(0))
        covariance: Matrix = []
        for i, number in enumerate(numbers):
            row = [
                PRINT_VARIANCE / 2
                + sum(
                    (
                        weight**2 * shared * _shared(rounds[number], rounds[other], d, hidden, number == other)
                        for d, (_, shared) in enumerate(noise)
                    ),
                    Decimal(0),
                )
                + HEALTHY_SD**2 * dot(effects[i], effects[j])
                for j, other in enumerate(numbers)
            ]
            row[i] += PRINT_VARIANCE + SLACK_VARIANCE + hidden_own + own[i]
            covariance.append(row)
        lower = cholesky(covariance)
        residual = [y - sum(effect, Decimal(0)) for y, effect in zip(observed, effects, strict=True)]
        return BoardModel(numbers, effects, means, lower, whiten(lower, residual))


def shrunk(
    dev: Counts, fresh: Counts, own_variance: Decimal, use_dev: bool = True
) -> tuple[list[Decimal], Decimal, Decimal]:
    """Shrink the lifts of a round's arms in one family (empirical Bayes). Returns the shrunk lifts, their mean and the shrinkage factor.

    Raw lifts overstate the arm that is ahead, so each deviation from the mean is multiplied by a factor from 0 to 1. The factor follows from
    a normal prior, whose variance is what the arms vary by beyond item noise (method of moments). `own_variance` is the variance of one
    arm's answer to one item. With `use_dev=False`, for a family whose dev is suspect, only fresh items count.
    """
    with exactly():
        from_dev, items = dev.num_items * int(use_dev), dev.num_items * int(use_dev) + fresh.num_items
        raw = [
            (decimal_of(a) * from_dev + decimal_of(b) * fresh.num_items) / items
            for a, b in zip(dev.arm_lifts(), fresh.arm_lifts(), strict=True)
        ]
        mean = sum(raw, Decimal(0)) / len(raw)
        if len(raw) < 2:
            return raw, mean, Decimal(1)
        variance = sum(((value - mean) ** 2 for value in raw), Decimal(0)) / (len(raw) - 1)
        spread = max(LEAST_SPREAD, variance - own_variance / items)
        factor = spread / (spread + own_variance / items)
        return [mean + factor * (value - mean) for value in raw], mean, factor


def item_noise(rounds: Sequence[BoardRound], family: int) -> tuple[Decimal, Decimal]:
    """The variance for one item of an arm's own part and of the shared part, averaged over the dev and fresh sets of all rounds."""
    sets = [counts for data in rounds for counts in (data.dev[family], data.fresh[family])]
    with exactly():
        own = sum((decimal_of(counts.own_variance) for counts in sets), Decimal(0)) / len(sets)
        shared = sum((decimal_of(counts.shared_variance) for counts in sets), Decimal(0)) / len(sets)
        return own, shared


def _items(data: BoardRound, family: int) -> int:
    return data.dev[family].num_items + data.fresh[family].num_items


def _shared(left: BoardRound, right: BoardRound, family: int, hidden: Decimal, same: bool) -> Decimal:
    """The factor of the shared variance in the covariance of two scored arms, through hidden, dev and fresh items.

    `same` says whether the two rounds are one; only then do the arms share fresh items.
    """
    first, second = _items(left, family), _items(right, family)
    dev, fresh = left.dev[family].num_items, left.fresh[family].num_items
    share = Decimal(dev * right.dev[family].num_items) / (first * second) / dev
    if same:
        share += Decimal(fresh * fresh) / (first * first) / fresh
    return 1 / hidden + share
