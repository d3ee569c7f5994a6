"""Stand in for training and the board in one campaign: decide what the arms of a real plan would score.

Each setting has effects that are drawn once a campaign: a recipe effect in each family, and an exploit, distributed as
design/statistics.md 5.1 says for an arm (studies.simulated). A setting in the standing recipe keeps 70 % of both, which is that section's
"next round's means move 70 % toward the winner". The anchor and the replicates of the reference have no effects. The reference is a run of
its recipe, so it has a seed effect, which every lift over it contains. Sets may be easier or harder, as in studies.simulated. Items,
effects, seeds and board scores are drawn by name, so that every policy meets the same ones and their differences are paired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.campaign.records import Arm, Outcome
from pipeline.stats.design import Design
from studies.simulated import EDGE, FOLLOWED, INFERENCE_SD, Floats, Sampler, World, easier

SEED = 53  # neither that of the critical values nor that of the alarm table


@dataclass(frozen=True)
class PlayedRound:
    """One round: its outcomes, the score that the board would print for each arm, and each arm's true lift on the target: over the reference
    recipe, at the target's difficulty.
    """

    reference: Outcome
    outcomes: Sequence[Outcome]
    board: Mapping[str, str]
    truth: Mapping[str, float]


@dataclass
class Nature:
    """The truth of one campaign. The first family in name order has the reference's highest accuracy, the last its lowest."""

    world: World
    design: Design
    number: int  # of the campaign
    families: Sequence[str]
    repaired: dict[str, int] = field(default_factory=dict)  # family -> round from which its dev items are new

    def __post_init__(self) -> None:
        self.levels = np.array([float(level) for level in self.design.accuracies])[: len(self.families)]
        self.weakest = np.argsort(self.levels)[: self.world.exploited_families]
        rng = self.rng("campaign")
        self.slopes = np.clip(rng.normal(1, self.world.slope_sd, len(self.levels)), *self.world.slope_range)
        luck = self.world.reference_luck + self.world.seeds(self.rng("seed", "reference"), self._shape(1))[0]
        self.base = self.levels[:, None]
        self.own = clip(self.base + luck)  # (F, 1) accuracies of the reference adapter
        self.dev_easier, self.board_easier = (
            self.world.easier(probits, len(self.levels)) for probits in (self.world.dev_easier, self.world.board_easier)
        )
        rows = max(1, self.design.board_rows // len(self.levels))
        on_board = clip(self.base + self.slopes[:, None] * luck)
        self.hidden = self._items(rows, easier(on_board, self.board_easier), "board")
        self.dev = self._items(self.design.dev_items, easier(self.own, self.dev_easier), "dev")
        printed = self.hidden.reference.mean() + rng.normal(0, INFERENCE_SD, 2)
        self.reference_scores = [f"{score:.2f}" for score in printed]

    def rng(self, *names: object) -> np.random.Generator:
        """Return a generator for the thing of this name, so that no policy's path changes the luck of another."""
        words = np.frombuffer(hashlib.sha256("/".join(map(str, names)).encode()).digest(), np.uint32)
        return np.random.Generator(
            np.random.SFC64(np.random.SeedSequence([SEED, self.number, *(int(word) for word in words)]))
        )

    def effects(self, arm: Arm) -> tuple[Floats, float]:
        """Return the (F,) recipe effect and the exploit of an arm's settings, in accuracy."""
        recipe, bent = np.zeros(len(self.levels)), 0.0
        moves = arm.role in ("axis", "contrast")
        for place, setting in enumerate(arm.overrides, 1):
            share = 1.0 if moves and place == len(arm.overrides) else FOLLOWED
            rng = self.rng(*setting)
            recipe += share * (
                self.world.recipe_sd * rng.normal(size=len(recipe)) + self.world.common_sd * rng.normal()
            )
            bent += share * rng.normal(0, self.world.exploit_sd)
        return recipe, abs(bent)

    def repair(self, repaired: Mapping[str, str]) -> None:
        """Draw new dev items for families that the policy repaired. repaired: family -> the round since which it has them, such as r0003."""
        for family, name in repaired.items():
            if family not in self.repaired:
                self.repaired[family] = int(name[1:])
                at = self.families.index(family)
                level = easier(self.own, self.dev_easier)[at : at + 1]
                new = self._items(self.design.dev_items, level, "dev", family, name)
                self.dev.ease[0, at], self.dev.reference[0, at] = new.ease[0, 0], new.reference[0, 0]

    def play(self, number: int, arms: Sequence[Arm]) -> PlayedRound:
        """Play round `number`, counted from 1, with these arms."""
        world, names = self.world, [f"r{number:04d}", *(arm.name for arm in arms)]
        found = [self.effects(arm) for arm in arms]
        recipe = np.array([effect for effect, _ in found]).T  # (F, A)
        exploit = np.array([bent for _, bent in found])
        seed = np.concatenate([world.seeds(self.rng("seed", arm.seed), self._shape(1))[0] for arm in arms], 1)
        since = np.array([self.repaired.get(family, 1) for family in self.families])
        gain, learned = np.zeros(recipe.shape), np.zeros(recipe.shape)
        for at in self.weakest:
            gain[at] = world.efficacy_in(number - 1) * exploit
            # What is learned of dev items begins anew with new ones; what fools the whole generator does not.
            learned[at] = gain[at] if world.fools_fresh else world.efficacy_in(number - since[at]) * exploit
        honest = recipe + seed - world.lost_target * gain
        target = self.slopes[:, None] * (recipe + seed) - world.lost_target * gain
        base, drift = self.base, np.full(self.base.shape, -world.fresh_harder * number)
        fresh = self._items(self.design.fresh_items, easier(self.own, drift), "fresh", number)
        self.dev.rng, self.hidden.rng = self.rng("dev", *names), self.rng("board", *names)
        on_dev, on_fresh = clip(base + honest + learned), clip(base + honest + (gain if world.fools_fresh else 0))
        answers = {
            "dev": self.dev.answers(easier(on_dev, self.dev_easier)[None])[0],
            "fresh": fresh.answers(easier(on_fresh, drift)[None])[0],
        }
        references = {"dev": self.dev.reference[0], "fresh": fresh.reference[0]}
        on_board = easier(clip(base + target + (gain if world.fools_board else 0)), self.board_easier)
        hidden = self.hidden.answers(on_board[None])[0].mean((0, 2))
        truth = (easier(clip(base + target), self.board_easier) - easier(base, self.board_easier)).mean(0)
        noise = self.rng("inference", number).normal(0, 1, (2, len(arms)))
        board = hidden + INFERENCE_SD * noise[0] + world.stack_sd * noise[1]
        outcomes = [
            Outcome(
                arm.name,
                arm.role,
                "completed",
                "completed",
                outcomes=self.marks({s: a[:, i] for s, a in answers.items()}),
            )
            for i, arm in enumerate(arms)
        ]
        reference = Outcome("reference", "reference", "completed", "completed", outcomes=self.marks(references))
        return PlayedRound(
            reference,
            outcomes,
            {arm.name: f"{score:.2f}" for arm, score in zip(arms, board, strict=True)},
            {arm.name: float(lift) for arm, lift in zip(arms, truth, strict=True)},
        )

    def marks(self, answers: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Write the (F, M) booleans of each item set as a record holds them: strings of 1 and 0 by family."""
        return {
            item_set: {
                family: (row.view(np.uint8) + 48).tobytes().decode()
                for family, row in zip(self.families, np.ascontiguousarray(each), strict=True)
            }
            for item_set, each in answers.items()
        }

    def _items(self, number: int, reference: Floats, *names: object) -> Sampler:
        """Draw `number` items of each family; reference: (F, 1) its accuracies on them."""
        return Sampler.new(
            self.rng(*names), (1, len(reference), number), reference, correlation=self.world.item_correlation
        )

    def _shape(self, items: int) -> tuple[int, int, int]:
        return (1, len(self.levels), items)


def clip(accuracy: Floats) -> Floats:
    """Keep accuracies away from 0 and 1."""
    return np.clip(accuracy, EDGE, 1 - EDGE)
