"""What the training loop asks of a recipe: the keys that it reads and the methods that it calls.

`substrate.recipes.base_recipe.BaseRecipe` adds the other keys and implements what all training methods share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from substrate.training.selection import Selection

if TYPE_CHECKING:
    import torch

    from substrate.data.batches import Batch, MicroBatch
    from substrate.data.rows import Prepared
    from substrate.data.tokenizer import Tokenizer
    from substrate.model import HybridModel


@dataclass(frozen=True)
class Recipe:
    """The interface of a recipe. The argument `run` is the `training.run.Training` that calls."""

    num_steps: int  # optimizer steps
    batch_size: int  # sequences per step, over all data-parallel ranks
    micro_batch_tokens: int  # most tokens in a forward pass of one rank; a step sums gradients over passes
    learning_rate: float  # peak
    optimizer: str  # one of substrate.training.optimizer.OPTIMIZERS
    weight_decay: float
    clip_norm: float  # largest L2 norm of the gradient over all trainable parameters
    schedule: str  # shape of the learning rate over the steps, one of substrate.training.schedule.SHAPES
    warmup_steps: int  # steps until the peak
    min_lr_ratio: float  # final learning rate over the peak
    checkpoint_every: int  # steps between checkpoints, and between candidates of `selection`
    loss_weighting: str  # of tokens, rows and families in a batch's loss: substrate.data.batches.make_batch
    selection: Selection  # which state of the run becomes the adapter

    def check_layout(self, pp: int, dp: int) -> None:
        """Raises UsageError if this recipe cannot run on `pp` stages and `dp` data-parallel ranks."""
        raise NotImplementedError

    def prepare(self, train_data: Path, encoder: Tokenizer, seed: int) -> Prepared:
        """Chooses the rows of the run from the training file."""
        raise NotImplementedError

    def attach(self, model: torch.nn.Module, seed: int) -> None:
        """Freezes the model and adds the parameters that are trained."""
        raise NotImplementedError

    def batch(self, run: Any) -> Batch:
        """Returns the batch of the next step, cut to this data-parallel rank's part."""
        raise NotImplementedError

    def rate_scale(self, step: int) -> float:
        """Returns the factor on the schedule's learning rate at a step, counted from 0."""
        raise NotImplementedError

    def outputs(self, model: HybridModel, batch: MicroBatch, temperature: float = 1.0) -> torch.Tensor:
        """Returns log-probabilities of the labels, (1, L) in nats; hidden states unless this is the last stage.

        temperature: of the distribution softmax(logits / temperature) that the log-probabilities are of.
        """
        raise NotImplementedError

    def loss(self, outputs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Returns this micro-batch's part of the step's loss, which is the sum over micro-batches and dp ranks."""
        raise NotImplementedError

    def teaches(self, batch: Batch) -> bool:
        """Whether the loss of this batch has a gradient at all, where the model is as it started."""
        raise NotImplementedError

    def save(self, run: Any, folder: Path) -> None:
        """Writes the adapter (docs/contract.md). All ranks call it."""
        raise NotImplementedError
