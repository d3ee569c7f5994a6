"""What methods share that learn from the model's own completions: worked solutions first, then samples of a limited length.

    steps 0 .. sft_steps - 1     as sft_lora
    the steps after              on completions that the model in training draws

A completion that reaches `max_new_tokens` is cut and has reward 0. So where the worked solutions that the model learns to
write are longer, nearly every sample is cut and nothing is learned. `check_solutions` compares the two before a campaign
is made, and `prepare` before the model is built.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from substrate.data.rows import Prepared, read_examples
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
        lengths: dict[str, list[int]] = {}
        for row in prepared.rows:
            lengths.setdefault(row.family, []).append(len(row.learned))
        shares = {family: float(len(found)) for family, found in lengths.items()}
        check_limit(lengths, shares, self.own.max_new_tokens, refuses=self.own.sft_steps > 0)
        return prepared

    def check_solutions(self, train_data: "Path", encoder: "Tokenizer") -> None:
        """Compares all solutions of the file, in the shares of the mix. Raises and warns as `prepare`."""
        lengths: dict[str, list[int]] = {family: [] for family, share in self.mix.items() if share > 0}
        for example in read_examples(train_data):
            if example.family in lengths:
                lengths[example.family].append(len(self._encode(example, encoder)[1]))
        check_limit(lengths, self.mix, self.own.max_new_tokens, refuses=self.own.sft_steps > 0)


def check_limit(
    lengths: Mapping[str, Sequence[int]], shares: Mapping[str, float], limit: int, *, refuses: bool
) -> None:
    """Warns of solutions that are longer than `limit` tokens.

    lengths: of solutions in tokens, by family. shares: of the families in training, normalised here. refuses: whether the
    model is first taught these solutions. Then it raises DataError if they are more than half.
    """
    found = {family: mine for family, mine in lengths.items() if mine}
    too_long = {family: sum(length > limit for length in mine) / len(mine) for family, mine in found.items()}
    total = sum(shares[family] for family in found)
    share = sum(shares[family] / total * part for family, part in too_long.items())
    if not share:
        return
    longest = max(max(mine) for mine in found.values())
    families = ", ".join(f"{family} {too_long[family]:.0%}" for family in sorted(found) if too_long[family])
    words = (
        f"recipe.options.max_new_tokens is {limit}, and {share:.0%} of the worked solutions are longer ({families}); a "
        f"completion of such a length is cut and has reward 0; valid is {longest}, the longest solution, or more"
    )
    if refuses and share > 0.5:
        raise DataError(words)
    warnings.warn(words, RuntimeWarning, stacklevel=2)
