"""Supervised fine-tuning of a LoRA on solved puzzles: the audited default, and the recipe of every round's anchor.

The base model is frozen; low-rank pairs on its linear layers learn to write, after the prompt, the worked solution
and the boxed answer of `data/train.jsonl`. The loss is cross-entropy over the learned tokens of the batch, weighted by
`loss_weighting`:

    uniform       the mean over all learned tokens: a long solution weighs more than a short one
    per_family    the mean over families of the mean over their tokens: a family with long solutions weighs no more
    per_row       the mean over rows of the mean over their tokens
    min_log_prob  the mean over rows of a softmax-weighted mean, in which a row's least likely tokens weigh most:
                  a greedy completion fails at the first token that is not the likeliest, wherever it stands
"""

from typing import TYPE_CHECKING

from substrate.recipes.knobs import Knobs

if TYPE_CHECKING:
    import torch

    from substrate.data.batches import MicroBatch


class SftLora(Knobs):
    """hydra_conf/recipe/sft_lora.yaml."""

    def loss(self, outputs: "torch.Tensor", batch: "MicroBatch") -> "torch.Tensor":
        """Weighted cross-entropy of the learned tokens here, in nats a token."""
        weights = batch.weights_BL.to(outputs)
        if self.loss_weighting == "min_log_prob":
            # Weights are told by the log-probabilities and not learned through them.
            unlikely = (-outputs.detach()).masked_fill(weights == 0, float("-inf"))
            weights = weights * unlikely.softmax(-1)
        return -(outputs * weights).sum()
