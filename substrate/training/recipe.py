"""What the training loop needs of a recipe: twelve of its keys, and eight answers.

`substrate.recipes.knobs.Knobs` adds the other keys and answers for every method; each method answers what it is about.
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
    """The keys that the loop reads. `run` is the `training.run.Training` that asks."""

    num_steps: int  # optimizer steps
    batch_size: int  # sequences a step, over all data-parallel ranks
    micro_batch_size: int  # sequences a forward pass of one rank, at most; gradients of a step are summed over passes
    learning_rate: float  # peak
    weight_decay: float  # AdamW's, decoupled
    clip_norm: float  # L2 norm of the gradient over all trainable parameters, at most
    schedule: str  # shape of the learning rate over the steps, one of substrate.schedule.SHAPES
    warmup_steps: int  # steps until the peak
    min_lr_ratio: float  # final learning rate over the peak
    checkpoint_every: int  # steps between checkpoints, and between candidates of `selection`
    loss_weighting: str  # of tokens, rows and families in a batch's loss: substrate.batches.make_batch
    selection: Selection  # which of the run's states becomes the adapter

    def check_layout(self, pp: int, dp: int) -> None:
        """Raises UsageError where this recipe cannot run on these stages and data-parallel ranks."""
        raise NotImplementedError

    def prepare(self, train_data: Path, encoder: Tokenizer, seed: int) -> Prepared:
        """The rows of the run, chosen from the training file."""
        raise NotImplementedError

    def attach(self, model: torch.nn.Module, seed: int) -> None:
        """Freezes the model and makes what is trained."""
        raise NotImplementedError

    def batch(self, run: Any) -> Batch:
        """What the next step learns from: the same on every rank but for the data-parallel slice."""
        raise NotImplementedError

    def rate_scale(self, step: int) -> float:
        """What the schedule's learning rate of a step, from 0, is multiplied with."""
        raise NotImplementedError

    def outputs(self, model: HybridModel, batch: MicroBatch) -> torch.Tensor:
        """Log-probabilities of the labels, (B, L) in nats; hidden states where the model is not the last stage."""
        raise NotImplementedError

    def loss(self, outputs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """This micro-batch's part of the step's loss; those of all micro-batches and data-parallel ranks add up."""
        raise NotImplementedError

    def save(self, run: Any, folder: Path) -> None:
        """Writes the adapter (docs/contract.md). All ranks call it."""
        raise NotImplementedError
