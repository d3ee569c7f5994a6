"""C2, the board test: does a gain that dev and fresh agree on still arrive on the external target? Decimals, no float.

The board prints one number a submission. With x_id the lift of arm i in family d (dev and fresh pooled, shrunk to the round's mean) and
w_d its weight,

    y_i - y_ref = sum_d w_d b_d x_id + noise        healthy: every b_d ~ N(1, 0.2^2), dev may be somewhat off
    from round c on, family d stopped:              b_d ~ N(0, 0.3^2), for all of its lift ("level") or for
                                                    what it gained over round c - 1 ("gain")

so both sides are Gaussian with known covariance and the Bayes factor of each (d, c, level or gain) is closed. E is their mean, weighted
with the family's headroom; changes that lie ahead count 1, which makes E an e-process (Shafer and Vovk 0912.4269): under the
healthy model it exceeds 40 in at most 1 campaign in 40. The critical value that is used is lower, the 97.8 % point of the largest E of
a campaign under the worst of three simulated nulls (constitution/nulls). The family is named if it carries half of E.

Noise: rounding and inference of each printed score and of the reference's two; the hidden items, dev items and fresh items, each with
a part that all arms share (mostly the reference's own luck: it stays for board and dev, and is new each round for fresh) and a part
of each arm; and a slack of 0.8 points for another evaluation stack.
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

HEALTHY_SD = Decimal("0.2")  # of a family's slope where nothing is wrong
STOPPED_SD = Decimal("0.3")  # of the slope, around 0, of a family that stopped
PRINT_VARIANCE = Decimal("0.01") ** 2 / 12 + Decimal("0.004") ** 2  # rounding to 0.01; inference (statistics.md 1.2)
SLACK_VARIANCE = Decimal("0.008") ** 2
LEAST_SPREAD = Decimal("0.000001")  # of true lifts between the arms of a round, squared
GUARD = Decimal("0.000001")  # this near to its critical value E is no alarm, and flagged
KINDS = ("level", "gain")


@dataclass(frozen=True)
class BoardRound:
    """What one round gives the test. Families in the order of the shares; `scores`: arm number -> printed score minus the reference's."""

    dev: tuple[Counts, ...]
    fresh: tuple[Counts, ...]
    scores: Mapping[int, Decimal]


@dataclass(frozen=True)
class BoardTest:
    """E of all rounds so far, and how much of it each family carries."""

    e_value: Decimal
    carried: dict[str, Decimal]

    @property
    def posteriors(self) -> dict[str, Decimal]:
        """Share of E: which family, given that one stopped."""
        with exactly():
            return {family: value / self.e_value for family, value in self.carried.items()}

    def exceeds(self, critical: Decimal) -> bool:
        with exactly():
            return self.e_value > critical * (1 + GUARD)

    def is_near(self, critical: Decimal) -> bool:
        """Within the guard band: told beside the verdict, and no alarm."""
        with exactly():
            return abs(self.e_value / critical - 1) <= GUARD


@dataclass(frozen=True)
class BoardModel:
    """Residuals of the scored arms from the healthy prediction, whitened, and what a family's stop would change."""

    rounds: list[int]  # of each scored arm
    effects: list[list[Decimal]]  # w_d x_id of each scored arm, by family
    means: list[list[Decimal]]  # w_d times the mean x of all arms, by round and family
    lower: Matrix
    residual: list[Decimal]

    @cached_property
    def whitened(self) -> list[list[list[Decimal]]]:
        """Of each family its effects, and last a vector of ones: for every round c, whitened, what the arms from round c on have of it.

        Whitening is linear: a system is solved for each round's part once, and not for each alternative.
        """
        columns = [list(column) for column in zip(*self.effects, strict=True)] + [[Decimal(1)] * len(self.rounds)]
        return [self._from_each_round(column) for column in columns]

    def _from_each_round(self, column: list[Decimal]) -> list[list[Decimal]]:
        rest = [Decimal(0)] * len(column)
        found = []
        with exactly():
            for since in reversed(range(len(self.means))):
                part = [x if number == since else Decimal(0) for number, x in zip(self.rounds, column, strict=True)]
                rest = [a + b for a, b in zip(rest, whiten(self.lower, part), strict=True)]
                found.append(rest)
        return found[::-1]


def board_test(rounds: Sequence[BoardRound], shares: Mapping[str, Fraction], design: Design) -> BoardTest:
    """Families weigh the same on the board. With no scored arm E is 1."""
    families = list(shares)
    if not any(seen.scores for seen in rounds):
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
    """Stopped from round `since` on, against healthy.

    With v the effects that would be lost, u the family's others (whitened), the alternative adds to the covariance
    s1^2 v v' - s0^2 (u v' + v u' + v v') = W M W' with W = (u, v), and v to the residual: the matrix determinant lemma and
    Woodbury leave a system of two equations.
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
    """Prediction and noise of every scored arm if all families hold."""
    with exactly():
        weight = 1 / Decimal(num_families)
        noise = [item_noise(rounds, family) for family in range(num_families)]
        numbers: list[int] = []
        effects: list[list[Decimal]] = []
        means: list[list[Decimal]] = []
        observed: list[Decimal] = []
        own: list[Decimal] = []
        for number, seen in enumerate(rounds):
            lifts = [
                shrunk(dev, fresh, noise[d][0]) for d, (dev, fresh) in enumerate(zip(seen.dev, seen.fresh, strict=True))
            ]
            means.append([weight * mean for _, mean, _ in lifts])
            spread = sum(
                (weight**2 * noise[d][0] * kept / _items(seen, d) for d, (_, _, kept) in enumerate(lifts)), Decimal(0)
            )
            for arm in sorted(seen.scores):
                numbers.append(number)
                effects.append([weight * values[arm] for values, _, _ in lifts])
                observed.append(seen.scores[arm])
                own.append(spread)
        hidden = weight * design.board_rows
        hidden_own = sum((weight**2 * one / hidden for one, _ in noise), Decimal(0))
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
    """Empirical Bayes: lifts of a round's arms in a family, their mean, and the share of each deviation that is kept.

    Raw lifts overstate whoever is ahead; a normal prior whose spread is what the arms vary by beyond item noise (method of moments)
    shrinks them to the mean. `use_dev=False`: from fresh items alone, for a family whose dev is suspect.
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
        kept = spread / (spread + own_variance / items)
        return [mean + kept * (value - mean) for value in raw], mean, kept


def item_noise(rounds: Sequence[BoardRound], family: int) -> tuple[Decimal, Decimal]:
    """(own, shared) variance per item, the mean over the rounds' dev and fresh sets."""
    sets = [counts for seen in rounds for counts in (seen.dev[family], seen.fresh[family])]
    with exactly():
        own = sum((decimal_of(counts.own_variance) for counts in sets), Decimal(0)) / len(sets)
        shared = sum((decimal_of(counts.shared_variance) for counts in sets), Decimal(0)) / len(sets)
        return own, shared


def _items(seen: BoardRound, family: int) -> int:
    return seen.dev[family].num_items + seen.fresh[family].num_items


def _shared(one: BoardRound, other: BoardRound, family: int, hidden: Decimal, same: bool) -> Decimal:
    """Of the variance per item that arms share: what two scored arms have in common through hidden, dev and fresh items."""
    first, second = _items(one, family), _items(other, family)
    dev, fresh = one.dev[family].num_items, one.fresh[family].num_items
    share = Decimal(dev * other.dev[family].num_items) / (first * second) / dev
    if same:
        share += Decimal(fresh * fresh) / (first * first) / fresh
    return 1 / hidden + share
