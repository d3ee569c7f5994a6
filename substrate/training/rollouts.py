"""Samples completions from the model in training and scores them, for rejection sampling and policy gradients.

    Sampler(model, parallel, tokenizer, Sampling(...)).sample(rows, num_each=8, seed="11/rollout/3")

Prompts are split among the data-parallel ranks, which decode and reward their own samples; then the samples are
gathered. Where these ranks share experts (ep > 1), they make their passes together (inference/decode.py).

A truncated completion has reward 0 whatever it says, because the judge would cut it at its limit too.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from substrate.answers import extract, is_correct
from substrate.data.rows import Row
from substrate.inference.decode import Decoding, decode
from substrate.interface.progress import Progress

if TYPE_CHECKING:
    from substrate.data.tokenizer import Tokenizer
    from substrate.distributed.groups import Parallel
    from substrate.model import HybridModel


HEARTBEAT_SECONDS = 20.0  # seconds between progress lines: a trial that writes nothing for long counts as stalled


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float  # 0 is greedy
    top_p: float
    max_new_tokens: int
    batch_size: int  # sequences decoded together


class Sample(NamedTuple):
    """One completion of a row's prompt."""

    item_id: str
    ids: list[int]  # the last one is an end id unless truncated
    log_probs: list[float]  # of each id by the decoding engine, in the distribution that it was drawn from, in nats
    truncated: bool
    reward: float  # 1.0 for the right answer, else 0.0


class Sampler:
    """The native decoding engine on the model in training."""

    def __init__(
        self,
        model: "HybridModel",
        parallel: "Parallel",
        tokenizer: "Tokenizer",
        how: Sampling,
        progress: "Progress | None" = None,
    ) -> None:
        self._progress = progress or Progress(Path(), rank=1, done_steps=0)  # rank 1, so that it writes nothing
        self._model, self._parallel, self._tokenizer, self._how = model, parallel, tokenizer, how

    def sample(self, rows: Sequence[Row], num_each: int, seed: str) -> list[list[Sample]]:
        """Returns `num_each` completions of each row's prompt, equal on every rank; model and `seed` determine them."""
        parallel = self._parallel
        numbers = range(parallel.dp_rank, len(rows), parallel.dp)
        asked = [(f"{number}/{copy}", rows[number].prompt) for number in numbers for copy in range(num_each)]
        decoding = Decoding(
            self._how.max_new_tokens,
            self._how.batch_size,
            self._how.temperature,
            self._how.top_p,
            seed=int.from_bytes(seed.encode()),
            log_probs=True,
        )
        self._model.eval()
        done: dict[str, Sample] = {}
        heard = time.monotonic()
        together = parallel.largest if parallel.ep > 1 and parallel.dp > 1 else None
        for each in decode(self._model, asked, decoding, self._tokenizer.end_ids, together=together):
            row = rows[int(each.item_id.partition("/")[0])]
            done[each.item_id] = self._scored(row, each.ids, each.log_probs, each.truncated)
            if time.monotonic() - heard >= HEARTBEAT_SECONDS:
                heard = time.monotonic()
                self._progress.write("sampling", done=len(done), total=len(asked))
        self._model.train()
        samples = parallel.gather(done)
        return [[samples[f"{number}/{copy}"] for copy in range(num_each)] for number in range(len(rows))]

    def _scored(self, row: Row, ids: list[int], log_probs: list[float], truncated: bool) -> Sample:
        right = not truncated and is_correct(row.answer, extract(self._tokenizer.decode(ids)))
        return Sample(row.item_id, ids, log_probs, truncated, float(right))


def by_family(rows: Sequence[Row], groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Returns the mean reward of each family, rounded for a progress line."""
    families = dict.fromkeys(row.family for row in rows)
    rewards = {
        family: [one.reward for row, group in zip(rows, groups, strict=True) if row.family == family for one in group]
        for family in families
    }
    return {family: round(sum(found) / len(found), 4) for family, found in rewards.items()}
