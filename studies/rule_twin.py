"""The tests and the choice of submissions once more, in floats and for many campaigns at once: numpy in place of exact decimals.

The exact modules of pipeline/stats say what is computed and why. tests/studies/test_rule_twin.py shows that both decide alike.
Shapes: C campaigns, F families, A arms, M items of a family, K scored arms a round, N scored arms so far, R looks so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtr, ndtri

from pipeline.stats import arm_values, difficulty, shift_test
from pipeline.stats.design import Design
from pipeline.stats.overfit_test import LEAST_GAP, LEAST_MEAN_GAP
from studies.look_scores import LookScores
from studies.probits import (
    OnProbits,
    Target,
    contrasts,
    corrected,
    covariance,
    density,
    influence,
    lifts_at,
    noise,
    one_item,
    target_of,
)
from studies.simulated import Floats, Ints, RoundSeen, ahead_on_dev

HEALTHY_VARIANCE = float(difficulty.HEALTHY_SD) ** 2
STOPPED_VARIANCE = float(shift_test.STOPPED_SD) ** 2
PRINT_VARIANCE = float(difficulty.PRINT_VARIANCE)
SLACK_VARIANCE = float(shift_test.SLACK_VARIANCE)
LEAST_SPREAD = float(shift_test.LEAST_SPREAD)
SLOPE_VARIANCE, SCORE_VARIANCE = float(arm_values.SLOPE_VARIANCE), float(arm_values.SCORE_VARIANCE)


@dataclass
class Twin:
    """The tests of many campaigns, fed round by round: `take` a round's items, `choose` what is submitted, `look` at the result."""

    design: Design
    _seen: list[RoundSeen] = field(default_factory=list)
    _sets: list[tuple[OnProbits, OnProbits]] = field(default_factory=list)  # dev and fresh
    _influence: list[Floats] = field(default_factory=list)  # of each round's dev items on the mean effect, (C, F, M)
    _gaps: list[Floats] = field(default_factory=list)
    _covariance: Floats | None = None
    _noise: list[Floats] = field(
        default_factory=list
    )  # of each set, (3, C, F): own, shared, of one answer of the reference
    _scored: list[Ints] = field(default_factory=list)  # (C, K)
    _ahead: list[Ints] = field(default_factory=list)
    _spread: Floats | None = None  # (C, F, F) of the slopes, for the choice of slots

    def take(self, seen: RoundSeen) -> None:
        """Add a round's items: everything but its submissions."""
        number = len(self._seen)
        dev, fresh = OnProbits(seen.dev), OnProbits(seen.fresh)
        unit = dev.density
        self._seen.append(seen)
        self._sets.append((dev, fresh))
        self._gaps.append(unit * (dev.effects.mean(2) - fresh.effects.mean(2)))
        self._influence.append(influence(dev, unit))
        grown = np.zeros((*unit.shape, number + 1, number + 1))
        if self._covariance is not None:
            grown[..., :number, :number] = self._covariance
        for other in range(number + 1):
            value = covariance(self._influence[-1], self._influence[other])
            grown[..., number, other] = grown[..., other, number] = value
        fresh_influence = influence(fresh, unit)
        grown[..., number, number] += covariance(fresh_influence, fresh_influence)
        grown[..., number, number] += sum(one_item(each, unit) for each in (dev, fresh))
        self._covariance = grown
        self._noise += [noise(each) for each in (dev, fresh)]

    def _item_noise(self) -> Floats:
        """(2, C, F) variances of one arm alone and shared by all arms, as shares of p (1 - p): over the sets so far."""
        own, shared, binomial = np.sum(self._noise, 0)
        return np.stack([own / binomial, shared / binomial])

    def _fresh_level(self) -> tuple[Floats, Floats]:
        """(C, F) the reference's level on the fresh items of all rounds, and (C, F) its information."""
        fresh = [on_fresh for _, on_fresh in self._sets]
        right = np.sum([each.counts.reference for each in fresh], 0)
        level = ndtri(corrected(right, self.design.fresh_items * len(fresh)))
        return np.asarray(level), np.asarray(np.sum([each.information for each in fresh], 0))

    def _target(self) -> Target:
        return target_of(*self._fresh_level(), self._seen[-1].board_reference, self.design.board_rows)

    def _shrunk(self, number: int, target: Floats) -> tuple[Floats, Floats, Floats]:
        """Of round `number`: (C, A, F) shrunk lifts on the target, (C, F) their means, (C, F) the variance that is left."""
        dev, fresh = self._sets[number]
        items = (dev.information + fresh.information)[..., None]
        pooled = (dev.effects * dev.information[..., None] + fresh.effects * fresh.information[..., None]) / items
        raw = lifts_at(target, pooled).swapaxes(1, 2)
        own = self._item_noise()[0] * density(target) ** 2 / items[..., 0]
        mean = raw.mean(1, keepdims=True)
        spread = np.maximum(LEAST_SPREAD, raw.var(1, ddof=1) - own)
        kept = spread / (spread + own)
        return mean + kept[:, None] * (raw - mean), mean[:, 0], kept * own

    def choose(self, first: Ints, num: int) -> Ints:
        """Return the (C, K) arms of the newest round to submit, K = `num`: first `first` (C,), then D-optimal ones."""
        effects = self._shrunk(len(self._seen) - 1, self._fresh_level()[0])[0] / self.design.families
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
        dev, fresh = self._sets[-1]
        if self.design.arms < 3:
            return np.full(dev.share.shape, -np.inf)
        unit = dev.density[..., None]
        (on_dev, dev_variance), (on_fresh, fresh_variance) = contrasts(dev), contrasts(fresh)
        gap = unit * (on_dev - on_fresh)
        score = gap / (unit * np.sqrt(dev_variance + fresh_variance))
        return np.asarray(np.where(gap >= float(LEAST_GAP), score, -np.inf).max(2))

    def _board(self, shares: Floats) -> tuple[Floats, Floats]:
        """(C,) E and (C, F) what each family carries of it."""
        number, families = len(self._seen), self.design.families
        rounds = np.repeat(np.arange(number), [scored.shape[1] for scored in self._scored])
        if not len(rounds):
            return np.ones(len(shares)), shares
        effect, means, residual, lower, slopes = self._healthy_model(rounds)
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
            carried += bayes_factors(e, v, all_of_it - v, slopes) / (self.design.rounds - int(kind == "gain"))
        ahead = self.design.rounds - number
        carried += ahead / self.design.rounds + ahead / max(1, self.design.rounds - 1)
        carried *= shares / len(shift_test.KINDS)
        return carried.sum(1), carried

    def _healthy_model(self, rounds: Ints) -> tuple[Floats, list[Floats], Floats, Floats, Floats]:
        """Effects (C, N, F) of the scored arms, each round's (C, F) mean effects, residuals (C, N), their covariance's (C, N, N) root, and
        (C, F) variances of the healthy slopes.

        rounds: (N,) of each scored arm.
        """
        weight, hidden = 1 / self.design.families, self.design.board_rows / self.design.families
        target = self._target()
        binomial, here = ndtr(target.level) * ndtr(-target.level) / hidden, density(target.level)
        own, shared = self._item_noise()
        at = np.arange(len(own))[:, None]
        effects, means, left, observed = [], [], [], []
        for i, (seen, scored) in enumerate(zip(self._seen, self._scored, strict=True)):
            values, mean, rest = self._shrunk(i, target.level)
            effects.append(weight * values[at, scored])
            means.append(weight * mean)
            left.append(np.repeat((weight**2 * rest).sum(1)[:, None], scored.shape[1], 1))
            observed.append(seen.board[at, scored] - seen.board_reference[:, None])
        effect = np.concatenate(effects, 1)
        dev, fresh = (np.stack([each[i].information for each in self._sets])[rounds] for i in (0, 1))  # (N, C, F)
        parts = np.minimum(dev[:, None], dev) + fresh[:, None] * (rounds[:, None] == rounds)[..., None, None]
        parts = binomial + here**2 * parts / ((dev + fresh)[:, None] * (dev + fresh))
        common = np.einsum("cf,nmcf->cnm", weight**2 * shared, parts)
        covariance = PRINT_VARIANCE / 2 + common + _slopes_and_offset(effect, target)
        hidden_own = (weight**2 * own * binomial).sum(1)[:, None]
        alone = PRINT_VARIANCE + SLACK_VARIANCE + hidden_own + np.concatenate(left, 1)
        covariance[:, np.arange(len(rounds)), np.arange(len(rounds))] += alone
        residual, lower = np.concatenate(observed, 1) - effect.sum(2), np.linalg.cholesky(covariance)
        return effect, means, residual, lower, target.slopes

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
        target = self._target()
        binomial, here = ndtr(target.level) * ndtr(-target.level) / hidden, density(target.level)
        effect = np.stack([weight * lifts_at(target.level, self._sets[i][1].effects)[at, :, arm] for i, arm in used], 1)
        printed = np.stack([self._seen[i].board[at, arm] - self._seen[i].board_reference for i, arm in used], 1)
        covariance = (PRINT_VARIANCE / 2 + weight**2 * (shared * binomial).sum(1))[:, None, None]
        covariance = covariance + _slopes_and_offset(effect, target)
        for place, (i, _) in enumerate(used):
            sampling = own * binomial + (own + shared) * here**2 / self._sets[i][1].information
            covariance[:, place, place] += PRINT_VARIANCE + SLACK_VARIANCE + weight**2 * sampling.sum(1)
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


def bayes_factors(e: Floats, v: Floats, u: Floats, slopes: Floats | float = HEALTHY_VARIANCE) -> Floats:
    """(C, F) stopped against healthy, from whitened (C, N, 1) residuals, (C, N, F) lost and (C, N, F) other effects.

    slopes: (C, F) variances of the healthy slopes. shift_test.bayes_factor has the algebra.
    """
    shifted = e + v
    across, own = -slopes, STOPPED_VARIANCE - slopes
    uu, uv, vv, ue, ve = ((x * y).sum(1) for x, y in ((u, u), (u, v), (v, v), (u, shifted), (v, shifted)))
    a, b, c, d = 1 + across * uv, across * vv, across * uu + own * uv, 1 + across * uv + own * vv
    determinant = a * d - b * c
    p, q = across * ve, across * ue + own * ve
    explained = (ue * (d * p - b * q) + ve * (a * q - c * p)) / determinant
    change = (shifted * shifted).sum(1) - explained - (e * e).sum(1)
    return np.asarray(np.exp(-change / 2) / np.sqrt(determinant))


def _slopes_and_offset(effect: Floats, target: Target) -> Floats:
    """(C, N, N) covariance of the residuals by the families' slopes and by the error of the target's level. effect: (C, N, F)."""
    bent = (effect * target.level[:, None]).sum(2)
    by_slopes = (effect * target.slopes[:, None]) @ effect.swapaxes(1, 2)
    return np.asarray(by_slopes + target.variance[:, None, None] * bent[:, :, None] * bent[:, None])


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
