"""What methods share that learn from the model's own completions: worked solutions first, then samples of a limited length.

    steps 0 .. sft_steps - 1     as sft_lora
    the steps after              on completions that the model in training draws

A completion that reaches `max_new_tokens` is cut and has reward 0. So where the worked solutions that the model learns to
write are longer, nearly every sample is cut and nothing is learned. `prepare` compares the two before the model is built.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from substrate.data.rows import Prepared, Row
from substrate.interface.errors import DataError
from substrate.recipes.base_recipe import require
from substrate.recipes.sft_lora import SftLora

if TYPE_CHECKING:
    from pathlib import Path

    from substrate.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingOptions:
    """The keys of `recipe.options` that these methods have in common. Raises UsageError for a wrong value."""

    sft_steps: int  # steps on worked solutions; 0 for a base that solves some puzzles already
    samples_per_prompt: int
    temperature: float
    top_p: float
    max_new_tokens: int  # a longer completion is cut
    decode_batch_size: int
    learning_rate_scale: float  # factor on the schedule's rate in the steps on samples

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_new_tokens", "decode_batch_size"):
            require(getattr(self, name) >= 1, f"options.{name}", getattr(self, name), "at least 1")
        require(self.sft_steps >= 0, "options.sft_steps", self.sft_steps, "at least 0")
        require(self.temperature > 0, "options.temperature", self.temperature, "above 0: greedy samples are all equal")
        require(0 < self.top_p <= 1, "options.top_p", self.top_p, "above 0, up to 1")
        require(self.learning_rate_scale > 0, "options.learning_rate_scale", self.learning_rate_scale, "above 0")


class OwnSamples(SftLora):
    """A method that samples; subclasses add what they sample and how they learn from it."""

    own: SamplingOptions

    def check_layout(self, pp: int, dp: int) -> None:
        super().check_layout(pp, dp)
        require(
            pp == 1, "method", self.method, "sft_lora or sft_full with pp > 1: sampling needs all layers on one rank"
        )
        require(self.own.sft_steps < self.num_steps, "options.sft_steps", self.own.sft_steps, "below num_steps")

    def rate_scale(self, step: int) -> float:
        return self.own.learning_rate_scale if step >= self.own.sft_steps else 1.0

    def prepare(self, train_data: "Path", encoder: "Tokenizer", seed: int) -> Prepared:
        """Chooses the rows, and raises DataError where most of their solutions are longer than a completion may be."""
        prepared = super().prepare(train_data, encoder, seed)
        check_limit(prepared.rows, self.own.max_new_tokens, refuses=self.own.sft_steps > 0)
        return prepared


def check_limit(rows: Sequence[Row], limit: int, *, refuses: bool) -> None:
    """Warns of rows whose solution is longer than `limit` tokens.

    refuses: whether the model is first taught these solutions. Then it raises DataError if they are more than half.
    """
    too_long, all_of = (
        Counter(row.family for row in chosen) for chosen in ([row for row in rows if len(row.learned) > limit], rows)
    )
    share = too_long.total() / len(rows)
    if not share:
        return
    longest = max(len(row.learned) for row in rows)
    families = ", ".join(f"{family} {too_long[family] / all_of[family]:.0%}" for family in sorted(too_long))
    words = (
        f"recipe.options.max_new_tokens is {limit}, and {share:.0%} of the worked solutions are longer ({families}); a "
        f"completion of such a length is cut and has reward 0; valid is {longest}, the longest solution, or more"
    )
    if refuses and share > 0.5:
        raise DataError(words)
    warnings.warn(words, RuntimeWarning, stacklevel=2)
