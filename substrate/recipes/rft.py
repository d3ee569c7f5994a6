"""Rejection-sampling fine-tuning: learn from worked solutions, then from the model's own correct completions.

    steps 0 .. sft_steps - 1     as sft_lora
    before step sft_steps        `samples_per_prompt` completions are drawn for each of the next `num_prompts` prompts;
                                 for each prompt the `keep_per_prompt` shortest different correct ones are kept
    the steps after              sft_lora's loss on the kept completions, in the same shares of families

A family without a correct completion keeps its worked solutions: without any rows it would be forgotten. Checkpoints hold
the kept rows, because a resumed run could not draw them again: its weights have moved.

Sources: STaR, arXiv:2203.14465 (learn from own correct solutions); RFT, arXiv:2308.01825 (several different ones).
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from substrate.data.rows import Row
from substrate.interface.errors import DataError
from substrate.recipes.base_recipe import require
from substrate.recipes.own_samples import OwnSamples, SamplingOptions

if TYPE_CHECKING:
    from substrate.data.batches import Batch
    from substrate.training.rollouts import Sample
    from substrate.training.run import Training

SAMPLES = "samples"


@dataclass(frozen=True)
class Options(SamplingOptions):
    """The keys of `recipe.options`. Raises UsageError for a wrong value."""

    num_prompts: int
    keep_per_prompt: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "keep_per_prompt"):
            require(getattr(self, name) >= 1, f"options.{name}", getattr(self, name), "at least 1")


class Rft(OwnSamples):
    """The method of hydra_conf/recipe/rft.yaml."""

    OPTIONS = Options
    own: Options

    def batch(self, run: "Training") -> "Batch":
        if run.step < self.own.sft_steps:
            return run.stream[run.step]
        if run.step == self.own.sft_steps:
            run.kept[SAMPLES] = self._kept(run)
        if run.sampled is None:
            coming = run.rows[self.own.sft_steps * self.batch_size :]
            run.sampled = run.stream_of(_filled([Row(*each) for each in run.kept[SAMPLES]], coming))
        return run.sampled[run.step - self.own.sft_steps]

    def _kept(self, run: "Training") -> list[Row]:
        """Samples the coming prompts and returns the kept completions as rows. Raises DataError if none is correct."""
        from substrate.training.rollouts import Sampling, by_family

        own, begun = self.own, time.monotonic()
        coming = {row.item_id: row for row in run.rows[own.sft_steps * self.batch_size :]}
        asked = list(coming.values())[: own.num_prompts]
        how = Sampling(own.temperature, own.top_p, own.max_new_tokens, own.decode_batch_size)
        groups = run.sampler(how).sample(asked, own.samples_per_prompt, f"{run.task.seed}/samples")
        kept = [
            row._replace(learned=sample.ids)
            for row, group in zip(asked, groups, strict=True)
            for sample in _best(group, own.keep_per_prompt, self.sequence_length - len(row.prompt))
        ]
        rates = by_family(asked, groups)
        counts = dict(Counter(row.family for row in kept))
        seconds = round(time.monotonic() - begun, 3)
        run.progress.write("samples", step=run.step + 1, right=rates, kept=counts, seconds=seconds)
        if not kept:
            raise DataError(
                f"none of {len(asked) * own.samples_per_prompt} samples was correct: {json.dumps(rates)}; "
                "raise options.sft_steps, or sample more"
            )
        return kept


def _best(group: Sequence["Sample"], count: int, longest: int) -> list["Sample"]:
    """Returns the `count` shortest different correct samples of at most `longest` tokens."""
    different = {tuple(one.ids): one for one in group if one.reward == 1.0 and len(one.ids) <= longest}
    return sorted(different.values(), key=lambda one: (len(one.ids), one.ids))[:count]


def _filled(kept: Sequence[Row], coming: Sequence[Row]) -> list[Row]:
    """Replaces each coming row by a kept one of its family, in turn; a family without kept ones stays as it was."""
    pools = {row.family: [each for each in kept if each.family == row.family] for row in coming}
    taken = Counter[str]()
    rows = []
    for row in coming:
        pool = pools[row.family]
        rows.append(pool[taken[row.family] % len(pool)] if pool else row)
        taken[row.family] += 1
    return rows
