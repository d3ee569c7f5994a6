"""Supervised fine-tuning of a LoRA on solved puzzles: the audited default, and the recipe of every round's anchor.

The base model is frozen; low-rank pairs on its linear layers learn to write, after the prompt, the worked solution
and the boxed answer of `data/train.jsonl`. The loss is the mean cross-entropy over the learned tokens of the batch: a
long solution weighs more than a short one.

LoRA: Hu et al., arXiv:2106.09685. y = W x + (alpha / rank) B A x, A random, B zero at the start, so step 0 is the
base model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from substrate.errors import DataError, UsageError
from substrate.schedule import SHAPES

if TYPE_CHECKING:
    import torch

    from substrate.data import Example, MicroBatch, Stream
    from substrate.model import HybridModel
    from substrate.parallel import Parallel
    from substrate.tokenizer import Tokenizer

TRACE_STYLES = ("stepwise", "short")  # stepwise: as the training file has it; short: written anew from the prompt


@dataclass(frozen=True)
class Lora:
    """Where the trainable pairs sit and how large they are."""

    rank: int  # r, columns of B and rows of A
    alpha: int  # the pair's output is scaled by alpha / rank
    dropout: float  # share of the pair's inputs set to zero in training
    targets: list[str]  # modules that get a pair, by their published names: substrate.model.lora.TARGETS

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "from 0 to below 1")
        _require(bool(self.targets), "lora.targets", self.targets, "at least one module")


@dataclass(frozen=True)
class SftLora:
    """The keys of hydra_conf/recipe/sft_lora.yaml."""

    method: str  # the key of this file in substrate.recipes.METHODS
    num_steps: int  # optimizer steps
    batch_size: int  # sequences a step, over all data-parallel ranks
    micro_batch_size: int  # sequences a forward pass of one rank, at most; gradients of a step are summed over passes
    sequence_length: int  # tokens of an example at most; a longer one is refused
    learning_rate: float  # peak
    weight_decay: float  # AdamW's, decoupled
    clip_norm: float  # L2 norm of the gradient over all trainable parameters, at most
    schedule: str  # shape of the learning rate over the steps, one of substrate.schedule.SHAPES
    warmup_steps: int  # steps until the peak
    min_lr_ratio: float  # final learning rate over the peak
    checkpoint_every: int  # steps between checkpoints
    trace_style: str  # how much of the working is learned, one of TRACE_STYLES
    lora: Lora
    mix: dict[str, float] = field(hash=False)  # share of each family in the stream; without one it is left out

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "micro_batch_size", "sequence_length", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "clip_norm"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.schedule in SHAPES, "schedule", self.schedule, f"one of {', '.join(SHAPES)}")
        _require(self.trace_style in TRACE_STYLES, "trace_style", self.trace_style, f"in {', '.join(TRACE_STYLES)}")
        _require(0 <= self.warmup_steps < self.num_steps, "warmup_steps", self.warmup_steps, "0 to num_steps - 1")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        shares = self.mix.values()
        _require(min(shares, default=-1) >= 0 and sum(shares) > 0, "mix", self.mix, "shares >= 0, one of them > 0")

    def stream(self, train_data: Path, tokenizer: Path, parallel: "Parallel", seed: int) -> "Stream":
        """Mixed, masked, right-padded batches of the training file, this data-parallel rank's rows."""
        from substrate.data import Stream, read_examples
        from substrate.tokenizer import Tokenizer

        encoder = Tokenizer.from_file(tokenizer)
        return Stream(
            read_examples(train_data),
            self.mix,
            lambda example: self._encode(example, encoder),
            seed=seed,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
            multiple=parallel.tp,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp,
        )

    def attach(self, model: "torch.nn.Module", seed: int) -> None:
        """Freezes the model and gives each target module its pair."""
        from substrate.model import add_lora

        add_lora(model, self.lora.rank, self.lora.alpha, self.lora.dropout, self.lora.targets, seed)

    def outputs(self, model: "HybridModel", batch: "MicroBatch") -> "torch.Tensor":
        """Log-probabilities of the labels, (B, L) in nats; hidden states where the model is not the last stage."""
        from substrate.model import token_log_probs

        return token_log_probs(model, batch.tokens_BL, batch.labels_BL)

    def loss(self, outputs: "torch.Tensor", batch: "MicroBatch", num_targets: int) -> "torch.Tensor":
        """Summed cross-entropy of the learned tokens here, over their number in the whole batch (nats a token)."""
        return -(outputs * batch.mask_BL.to(outputs)).sum() / num_targets

    def save(self, model: "torch.nn.Module", folder: Path) -> None:
        """Writes the pairs, whole, in PEFT's names. All ranks call it."""
        from substrate.model import save_adapter

        save_adapter(model, folder)

    def _encode(self, example: "Example", encoder: "Tokenizer") -> tuple[list[int], list[int]]:
        from substrate.tasks import FAMILIES

        try:
            trace = example.trace
            if self.trace_style == "short":
                family = FAMILIES[example.family]
                trace = family.trace(family.parse(example.prompt), "short")
            return encoder.encode_prompt(example.prompt), encoder.encode_answer(trace, example.answer)
        except (KeyError, ValueError) as error:
            raise DataError(f"{example.item_id} cannot be written as training tokens: {error}") from None


def _require(holds: bool, key: str, value: object, valid: str) -> None:
    if not holds:
        raise UsageError(f"recipe.{key} is {value!r}; valid is {valid}")
