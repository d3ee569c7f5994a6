"""The tests and the choice of submissions once more, in floats and for many campaigns at once: numpy in place of exact decimals.

The exact modules of pipeline/stats say what is computed and why. tests/studies/test_rule_twin.py shows that both decide alike.
Shapes: C campaigns, F families, A arms, M items of a family, K scored arms a round, N scored arms so far, R looks so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.stats import shift_test, slot_choice
from pipeline.stats.design import Design
from pipeline.stats.overfit_test import LEAST_GAP, LEAST_MEAN_GAP
from studies.look_scores import LookScores
from studies.simulated import CountArrays, Floats, Ints, RoundSeen, ahead_on_dev

HEALTHY_VARIANCE = float(shift_test.HEALTHY_SD) ** 2
STOPPED_VARIANCE = float(shift_test.STOPPED_SD) ** 2
PRINT_VARIANCE = float(shift_test.PRINT_VARIANCE)
SLACK_VARIANCE = float(shift_test.SLACK_VARIANCE)
LEAST_SPREAD = float(shift_test.LEAST_SPREAD)
SLOPE_VARIANCE, SCORE_VARIANCE = float(slot_choice.SLOPE_VARIANCE), float(slot_choice.SCORE_VARIANCE)


@dataclass
class Twin:
    """The tests of many campaigns, fed round by round: `take` a round's items, `choose` what is submitted, `look` at the result."""

    design: Design
    _seen: list[RoundSeen] = field(default_factory=list)
    _lifts: list[Floats] = field(default_factory=list)  # of each round's dev items, (C, F, M)
    _gaps: list[Floats] = field(default_factory=list)
    _covariance: Floats | None = None
    _noise: list[tuple[Floats, Floats]] = field(default_factory=list)
    _raw: list[Floats] = field(default_factory=list)  # (C, A, F) pooled lifts
    _scored: list[Ints] = field(default_factory=list)  # (C, K)
    _ahead: list[Ints] = field(default_factory=list)
    _spread: Floats | None = None  # (C, F, F) of the slopes, for the choice of slots

    def take(self, seen: RoundSeen) -> None:
        """Add a round's items: everything but its submissions."""
        design, number = self.design, len(self._seen)
        self._seen.append(seen)
        lifts = seen.dev.lifts.astype(np.float32)
        self._lifts.append(lifts)
        dev_mean, fresh_mean = _mean(seen.dev), _mean(seen.fresh)
        self._gaps.append(dev_mean - fresh_mean)
        grown = np.zeros((*dev_mean.shape, number + 1, number + 1))
        if self._covariance is not None:
            grown[..., :number, :number] = self._covariance
        for other in range(number + 1):
            value = _covariance(seen.dev, self._seen[other].dev, lifts, self._lifts[other])
            grown[..., number, other] = grown[..., other, number] = value
        fresh_lifts = seen.fresh.lifts.astype(np.float32)
        floor = 1 / seen.dev.num_items**2 + 1 / seen.fresh.num_items**2
        fresh_variance = _covariance(seen.fresh, seen.fresh, fresh_lifts, fresh_lifts)
        grown[..., number, number] += fresh_variance + floor
        self._covariance = grown
        dev_variance = grown[..., number, number] - fresh_variance - floor
        dev_noise, fresh_noise = _noise(seen.dev, dev_variance), _noise(seen.fresh, fresh_variance)
        self._noise.append(((dev_noise[0] + fresh_noise[0]) / 2, (dev_noise[1] + fresh_noise[1]) / 2))
        m, n = design.dev_items, design.fresh_items
        self._raw.append(((arm_lifts(seen.dev) * m + arm_lifts(seen.fresh) * n) / (m + n)).swapaxes(1, 2))

    def _shrunk(self, number: int) -> tuple[Floats, Floats, Floats]:
        """Of round `number`: (C, A, F) shrunk lifts, (C, F) their means, (C, F) the share of each deviation that is kept."""
        raw, own = self._raw[number], self._item_noise()[0] / (self.design.dev_items + self.design.fresh_items)
        mean = raw.mean(1, keepdims=True)
        spread = np.maximum(LEAST_SPREAD, raw.var(1, ddof=1) - own)
        kept = spread / (spread + own)
        return mean + kept[:, None] * (raw - mean), mean[:, 0], kept

    def choose(self, first: Ints, num: int) -> Ints:
        """Return the (C, K) arms of the newest round to submit, K = `num`: first `first` (C,), then D-optimal ones."""
        effects = self._shrunk(len(self._seen) - 1)[0] / self.design.families
        campaigns, arms, size = effects.shape
        if self._spread is None:
            self._spread = np.broadcast_to(np.eye(size) * SLOPE_VARIANCE, (campaigns, size, size)).copy()
        at, used = np.arange(campaigns), np.zeros((campaigns, arms), bool)
        chosen = np.zeros((campaigns, num), int)
        for slot in range(num):
            gain = np.einsum("caf,cfg,cag->ca", effects, self._spread, effects)
            gain[used] = -1
            arm = gain.argmax(1) if slot else first
            chosen[:, slot], used[at, arm] = arm, True
            effect = effects[at, arm]
            along = np.einsum("cfg,cg->cf", self._spread, effect)
            scale = SCORE_VARIANCE + (effect * along).sum(1)
            self._spread = self._spread - along[:, :, None] * along[:, None, :] / scale[:, None, None]
        return chosen

    def look(self, scored: Ints, ahead: Ints) -> LookScores:
        """Test the newest round. scored: (C, K) its submitted arms, K may be 0; ahead: (C,) the arm with the best dev score."""
        self._scored.append(scored)
        self._ahead.append(ahead)
        first = self._seen[0].dev
        headroom = (first.num_items - first.reference + 1) / (first.num_items + 2)
        shares = headroom / headroom.sum(1, keepdims=True)
        return LookScores(shares, *self._gap_scores(), self._arm_scores(), *self._board(shares), self._leak())

    def _gap_scores(self) -> tuple[Floats, Floats]:
        """(C, F) scores of the families' gaps and (C,) of their mean."""
        assert self._covariance is not None
        gaps = np.stack(self._gaps, -1)
        best = _least_squares(gaps, self._covariance, float(LEAST_GAP))
        if self.design.families < 2:
            return best, np.full(len(gaps), -np.inf)
        covariance = self._covariance.sum(1) / self.design.families**2
        return best, _least_squares(gaps.mean(1), covariance, float(LEAST_MEAN_GAP))

    def _arm_scores(self) -> Floats:
        """(C, F) the largest score of an arm against the others of the newest round."""
        seen = self._seen[-1]
        if self.design.arms < 3:
            return np.full(seen.dev.reference.shape, -np.inf)
        (dev, dev_variance), (fresh, fresh_variance) = _contrasts(seen.dev), _contrasts(seen.fresh)
        floor = 1 / seen.dev.num_items**2 + 1 / seen.fresh.num_items**2
        gap = dev - fresh
        score = np.where(gap >= float(LEAST_GAP), gap / np.sqrt(dev_variance + fresh_variance + floor), -np.inf)
        return np.asarray(score.max(2))

    def _item_noise(self) -> tuple[Floats, Floats]:
        """(C, F) variances per item, of one arm alone and shared by all arms: means over the rounds so far."""
        own, shared = (sum(each) / len(self._noise) for each in zip(*self._noise, strict=True))
        return np.asarray(own), np.asarray(shared)

    def _board(self, shares: Floats) -> tuple[Floats, Floats]:
        """(C,) E and (C, F) what each family carries of it."""
        number, families = len(self._seen), self.design.families
        rounds = np.repeat(np.arange(number), [scored.shape[1] for scored in self._scored])
        if not len(rounds):
            return np.ones(len(shares)), shares
        effect, means, residual, lower = self._healthy_model(rounds)
        lost = []
        for kind in shift_test.KINDS:
            for since in range(int(kind == "gain"), number):
                start = means[since - 1][:, None] if kind == "gain" else 0
                lost.append((kind, (effect - start) * (rounds >= since)[:, None]))
        white = np.linalg.solve(lower, np.concatenate([residual[..., None], effect, *(v for _, v in lost)], 2))
        e, all_of_it = white[..., :1], white[..., 1 : 1 + families]
        carried = np.zeros_like(shares)
        for i, (kind, _) in enumerate(lost, start=1):
            v = white[..., 1 + families * i : 1 + families * (i + 1)]
            carried += bayes_factors(e, v, all_of_it - v) / (self.design.rounds - int(kind == "gain"))
        ahead = self.design.rounds - number
        carried += ahead / self.design.rounds + ahead / max(1, self.design.rounds - 1)
        carried *= shares / len(shift_test.KINDS)
        return carried.sum(1), carried

    def _healthy_model(self, rounds: Ints) -> tuple[Floats, list[Floats], Floats, Floats]:
        """Effects (C, N, F) of the scored arms, each round's (C, F) mean effects, residuals (C, N) and their covariance's (C, N, N) root.

        rounds: (N,) of each scored arm.
        """
        design = self.design
        weight, hidden = 1 / design.families, design.board_rows / design.families
        items = design.dev_items + design.fresh_items
        own, shared = self._item_noise()
        at = np.arange(len(own))[:, None]
        effects, means, spreads, observed = [], [], [], []
        for i, (seen, scored) in enumerate(zip(self._seen, self._scored, strict=True)):
            values, mean, kept = self._shrunk(i)
            effects.append(weight * values[at, scored])
            means.append(weight * mean)
            spreads.append(np.repeat((weight**2 * own * kept / items).sum(1)[:, None], scored.shape[1], 1))
            observed.append(seen.board[at, scored] - seen.board_reference[:, None])
        effect = np.concatenate(effects, 1)
        dev_part, fresh_part = design.dev_items / items**2, design.fresh_items / items**2
        same = rounds[:, None] == rounds
        common = (weight**2 * shared).sum(1)[:, None, None] * (1 / hidden + dev_part + fresh_part * same)
        alone = (
            PRINT_VARIANCE + SLACK_VARIANCE + (weight**2 * own / hidden).sum(1)[:, None] + np.concatenate(spreads, 1)
        )
        covariance = PRINT_VARIANCE / 2 + common + HEALTHY_VARIANCE * effect @ effect.swapaxes(1, 2)
        covariance[:, np.arange(len(rounds)), np.arange(len(rounds))] += alone
        return effect, means, np.concatenate(observed, 1) - effect.sum(2), np.linalg.cholesky(covariance)

    def _leak(self) -> Floats:
        """(C,) the largest score over the rounds in which the leak may have begun."""
        at = np.arange(len(self._gaps[0]))
        used = [
            (i, ahead)
            for i, (ahead, scored) in enumerate(zip(self._ahead, self._scored, strict=True))
            if scored.shape[1]
        ]
        if not used:
            return np.full(len(at), -np.inf)
        weight, hidden = 1 / self.design.families, self.design.board_rows / self.design.families
        own, shared = self._item_noise()
        effect = np.stack([weight * arm_lifts(self._seen[i].fresh)[at, :, arm] for i, arm in used], 1)
        printed = np.stack([self._seen[i].board[at, arm] - self._seen[i].board_reference for i, arm in used], 1)
        covariance = np.broadcast_to(
            (PRINT_VARIANCE / 2 + weight**2 * shared.sum(1) / hidden)[:, None, None], (len(at), len(used), len(used))
        ) + HEALTHY_VARIANCE * effect @ effect.swapaxes(1, 2)
        alone = PRINT_VARIANCE + SLACK_VARIANCE
        alone = alone + (weight**2 * (own / hidden + (own + shared) / self.design.fresh_items)).sum(1)
        covariance += alone[:, None, None] * np.eye(len(used))
        lower = np.linalg.cholesky(covariance)
        steps = np.tril(np.ones((len(used), len(used))))  # column c: 1 from round c on
        columns = np.concatenate([(printed - effect.sum(2))[..., None], np.broadcast_to(steps, covariance.shape)], 2)
        white = np.linalg.solve(lower, columns)
        residual, ahead = white[..., :1], white[..., 1:]
        return np.asarray(((residual * ahead).sum(1) / np.sqrt((ahead * ahead).sum(1))).max(1))


def looks(rounds: list[RoundSeen], design: Design) -> Iterator[tuple[RoundSeen, Ints, LookScores]]:
    """Of each round what is seen, the (C,) arm ahead on dev, and the tests if that arm and the D-optimal ones are submitted."""
    twin = Twin(design)
    for seen in rounds:
        twin.take(seen)
        ahead = ahead_on_dev(seen)
        scored = twin.choose(ahead, design.submissions if design.board_rows else 0)
        yield seen, ahead, twin.look(scored, ahead)


def arm_lifts(counts: CountArrays) -> Floats:
    """(C, F, A) lifts over the reference, in accuracy."""
    return np.asarray((counts.right - counts.reference[..., None]) / counts.num_items)


def bayes_factors(e: Floats, v: Floats, u: Floats) -> Floats:
    """(C, F) stopped against healthy, from whitened (C, N, 1) residuals, (C, N, F) lost and (C, N, F) other effects.

    shift_test.bayes_factor has the algebra.
    """
    shifted = e + v
    across, own = -HEALTHY_VARIANCE, STOPPED_VARIANCE - HEALTHY_VARIANCE
    uu, uv, vv, ue, ve = ((x * y).sum(1) for x, y in ((u, u), (u, v), (v, v), (u, shifted), (v, shifted)))
    a, b, c, d = 1 + across * uv, across * vv, across * uu + own * uv, 1 + across * uv + own * vv
    determinant = a * d - b * c
    p, q = across * ve, across * ue + own * ve
    explained = (ue * (d * p - b * q) + ve * (a * q - c * p)) / determinant
    change = (shifted * shifted).sum(1) - explained - (e * e).sum(1)
    return np.asarray(np.exp(-change / 2) / np.sqrt(determinant))


def _least_squares(gaps: Floats, covariance: Floats, least: float) -> Floats:
    """(...) largest standardised gap over the rounds in which it may have begun, from (..., R) gaps and their (..., R, R) covariance."""
    inverse = np.linalg.inv(covariance)
    best = np.full(gaps.shape[:-1], -np.inf)
    for since in range(gaps.shape[-1]):
        weights = inverse[..., since:].sum(-1)
        information = weights[..., since:].sum(-1)
        total = (weights * gaps).sum(-1)
        best = np.maximum(best, np.where(total / information >= least, total / np.sqrt(information), -np.inf))
    return best


def _mean(counts: CountArrays) -> Floats:
    arms = counts.right.shape[2]
    return np.asarray((counts.right.sum(2) - arms * counts.reference) / (arms * counts.num_items))


def _covariance(one: CountArrays, other: CountArrays, lifts: Floats, other_lifts: Floats) -> Floats:
    n, arms = one.num_items, one.right.shape[2]
    products = np.einsum("cfm,cfm->cf", lifts, other_lifts).astype(np.float64) / arms**2  # sums below 2^24 are exact
    return np.asarray((products - n * _mean(one) * _mean(other)) / (n * (n - 1)))


def _noise(counts: CountArrays, variance_of_mean: Floats) -> tuple[Floats, Floats]:
    arms, n = counts.right.shape[2], counts.num_items
    if arms < 2:
        own = np.full(counts.reference.shape, 0.25)
    else:
        own = (counts.right.sum(2) - counts.squares / arms) / (n * (arms - 1))
    return own, np.maximum(0, variance_of_mean * n - own / arms)


def _contrasts(counts: CountArrays) -> tuple[Floats, Floats]:
    """(C, F, A) each arm minus the mean of the others, and the variance of that mean over items."""
    n, arms = counts.num_items, counts.right.shape[2]
    mean = (arms * counts.right - counts.right.sum(2, keepdims=True)) / ((arms - 1) * n)
    squares = arms**2 * counts.right - 2 * arms * counts.with_others + counts.squares[..., None]
    return mean, (squares / (arms - 1) ** 2 - n * mean**2) / (n * (n - 1))
