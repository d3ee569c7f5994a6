"""The campaigns of `claim_play` once more, with every answer to every item drawn, as studies.simulated draws them: a check of its normal counts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.campaign.records import NUM_ARMS
from studies.claims.claim_play import Campaigns
from studies.simulated import Floats, Sampler

DEV = (0, 0)


class ItemCampaigns(Campaigns):
    """Counts and item variances come from drawn answers. `items`, the normal model's luck of the items, is not used."""

    def __init__(self, *arguments: Any) -> None:
        self.samplers: dict[tuple[int, int], Sampler] = {}
        super().__init__(*arguments)

    def _count(self, which: int, number: int, accuracy: Floats, items: Floats) -> Floats:
        key = (which, number) if which else DEV
        there = self._on_set(which, number, accuracy).swapaxes(1, 2)
        if key not in self.samplers:
            size = self.design.fresh_items if which else self.design.dev_items
            self.samplers = (
                {DEV: self.samplers[DEV]} if DEV in self.samplers else {}
            )  # earlier fresh items are done with
            self.samplers[key] = Sampler.new(self.rng, (self.num, len(self.levels), size), there[:, :, :1])
        bits = self.samplers[key].answers(there)
        if which and accuracy.shape[1] == NUM_ARMS:
            self.arms = bits
        elif which:
            self.of_reference = bits
        return np.asarray(bits.sum(-1).swapaxes(1, 2).astype(float))

    def _item_variance(self, accuracy: Floats, number: int) -> Floats:
        differences = self.arms.view(np.int8) - self.of_reference.view(np.int8)
        n = differences.shape[-1]
        total, differing = differences.sum(-1, dtype=int), np.abs(differences).sum(-1, dtype=int)
        return np.asarray(((differing - total**2 / n) / (n * (n - 1))).swapaxes(1, 2))
