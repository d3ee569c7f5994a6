"""The twin against the real code: null campaigns by the real plan, evidence and decision, item by item, in the worlds of `claim_worlds`.

Two things are compared. On the runs of a real campaign the twin must say what the real code said, exactly. And over all worlds together
the number of campaigns with a false claim must be what the twin's rates predict, by one binomial test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from pipeline.campaign.records import Arm, Outcome
from pipeline.claims import runs
from pipeline.claims.assess_claims import claims_after
from pipeline.decision import derive, history, plan
from pipeline.stats.design import Design
from studies.claims import claim_twin
from studies.claims.claim_play import clip
from studies.claims.claim_twin import AXIS, NONE, OVERWRITES, REFERENCE, STANDING, Runs
from studies.claims.claim_worlds import ClaimWorld
from studies.closed_loop import Ours, start
from studies.nature import Nature, PlayedRound
from studies.simulated import Floats, Sampler, World

NOISY_KEYS = ("recipe.learning_rate", "recipe.mix.")
KIND = {runs.REFERENCE: REFERENCE, runs.STANDING: STANDING, runs.AXIS: AXIS}


class NullNature(Nature):
    """Stands in for training in a world in which no setting does anything; only luck differs."""

    def __init__(self, truth: ClaimWorld, design: Design, number: int, families: Sequence[str]) -> None:
        super().__init__(World(), design, number, families)
        self.truth = truth
        easier = np.argsort(self.levels)[: truth.easier_families]
        self.ease = np.zeros((2, len(self.levels)))
        self.ease[0, easier], self.ease[1, easier] = truth.dev_easier, truth.fresh_easier
        luck = truth.reference_luck
        self.own = clip(self.levels + (self._luck("reference", 1.0) if luck is None else luck))
        self.dev = Sampler.new(self.rng("dev"), self._shape(design.dev_items), self._on_set(0, 0, self.own)[:, None])

    def play(self, number: int, arms: Sequence[Arm]) -> PlayedRound:
        """Play round `number`, counted from 1, with these arms."""
        lucks = [self._luck(f"seed {arm.seed}", self._factor(arm)) for arm in arms]
        accuracy = clip(self.levels[:, None] + np.array(lucks))
        names = [f"r{number:04d}", *(arm.name for arm in arms)]
        own = self._on_set(1, number, self.own)[:, None]
        fresh = Sampler.new(self.rng("fresh", number), self._shape(self.design.fresh_items), own)
        self.dev.rng = self.rng("dev", *names)
        answers = {
            "dev": self.dev.answers(self._on_set(0, number, accuracy.T).T[None])[0],
            "fresh": fresh.answers(self._on_set(1, number, accuracy.T).T[None])[0],
        }
        outcomes = [
            Outcome(arm.name, arm.role, "completed", "completed", outcomes=self._cut(self.marks({s: a[:, i] for s, a in answers.items()}), arm))
            for i, arm in enumerate(arms)
        ]  # fmt: skip
        marks = self.marks({"dev": self.dev.reference[0], "fresh": fresh.reference[0]})
        reference = Outcome("reference", "reference", "completed", "completed", outcomes=marks)
        return PlayedRound(reference, outcomes, {}, dict.fromkeys((arm.name for arm in arms), 0.0))

    def _cut(self, marks: Mapping[str, Mapping[str, str]], arm: Arm) -> dict[str, dict[str, str]]:
        """The outcome strings with some of the wrong answers truncated."""
        rng = self.rng("truncated", arm.seed)

        def cut(text: str) -> str:
            codes = np.frombuffer(text.encode(), np.uint8)
            is_cut = (codes == ord("0")) & (rng.random(len(codes)) < self.truth.truncated)
            return np.where(is_cut, np.uint8(ord("T")), codes).tobytes().decode()

        return {
            item_set: {family: cut(text) for family, text in by_family.items()} for item_set, by_family in marks.items()
        }

    def _factor(self, arm: Arm) -> float:
        if arm.replicate_of == "reference":
            return self.truth.anchors
        return self.truth.noisy if any(key.startswith(NOISY_KEYS) for key, _ in arm.overrides) else 1.0

    def _luck(self, name: str, factor: float) -> float:
        truth, rng = self.truth, self.rng("luck", name)
        if truth.tails:
            drawn = rng.standard_t(truth.tails) * ((truth.tails - 2) / truth.tails) ** 0.5
        else:
            drawn = rng.normal()
        return float(truth.seed_sd * factor * drawn - truth.collapse * (rng.random() < truth.collapse_probability))

    def _on_set(self, which: int, number: int, accuracy: Floats) -> Floats:
        shift = self.ease[which] - (self.truth.fresh_harder * number if which else 0)
        return np.asarray(ndtr(ndtri(accuracy) + shift))


@dataclass(frozen=True)
class Said:
    """What one real campaign said: did it claim, show anything to be worse, make a family SUSPECT by canaries alone? Did the twin agree?"""

    claimed: bool
    worse: bool
    suspect: bool
    set_aside: bool
    agrees: bool


def campaign(truth: ClaimWorld, design: Design, confirmation: str, number: int) -> Said:
    """Run one null campaign by the real code, and the twin on its runs."""
    begin = start()
    nature = NullNature(truth, design, number, begin.families[: design.families])
    player, policy, suspect = Ours(design, nature, confirmation), begin.policy, False
    for round_number in range(1, design.rounds + 1):
        replicates = begin.rules.first_round_replicates if round_number == 1 else 0
        is_last = round_number == design.rounds
        arms = plan.make_arms(policy, round_number, number, replicates, begin.reference, confirmation, is_last)
        policy = player.take(f"r{round_number:04d}", policy, arms, nature.play(round_number, arms))
        assert player.decision is not None
        suspect |= any(state.code == "canaries" for state in player.decision.families.values())
    played = history.read_history(player.records)
    every_run = derive.runs_of(played, played.rounds_until(f"r{design.rounds:04d}"))
    found = claim_twin.every_round(arrays_of([every_run], design.rounds), confirmation, begin.rules)
    claimed, worse, agrees = False, False, True
    for last in range(1, design.rounds + 1):
        so_far = [run for run in every_run if run.round <= last]
        exact = claims_after(so_far, last, design.rounds, confirmation, begin.rules)
        worse_arms = {f"a{arm}" for arm in np.flatnonzero(found.worse_arms[0, last - 1])}
        ours = (exact.is_claimed, exact.worse_standing.is_shown, set(exact.shown_worse))
        agrees &= ours == (found.claimed[0, last - 1], found.worse_standing[0, last - 1], worse_arms)
        claimed, worse = claimed or exact.is_claimed, worse or exact.worse_standing.is_shown or bool(worse_arms)
    return Said(claimed, worse, suspect, bool(policy.set_aside), bool(agrees))


def arrays_of(campaigns: Sequence[Sequence[runs.Run]], rounds: int, arms: int = 8) -> Runs:
    """The exact runs of some campaigns as the twin's arrays."""
    shape = (len(campaigns), rounds, arms)
    kind, lift, variance = np.full(shape, NONE), np.zeros(shape), np.zeros(shape)
    for number, every_run in enumerate(campaigns):
        for run in every_run:
            at = number, run.round - 1, int(run.arm[1:])
            kind[at] = OVERWRITES if run.overwrites else KIND[run.kind]
            lift[at], variance[at] = run.lift, run.variance
    return Runs(kind, lift, variance)
