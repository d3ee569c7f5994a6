"""Supervised fine-tuning of a LoRA on solved puzzles: the audited default, and the recipe of every round's anchor.

The base model is frozen. Low-rank pairs on its linear layers learn to write, after the prompt, the worked solution and
the boxed answer of `data/train.jsonl`. The loss is the cross-entropy of the learned tokens, weighted by
`loss_weighting`:

    uniform       the mean over all learned tokens: a long solution weighs more than a short one
    per_family    the mean over families of the mean over their tokens: all families weigh the same
    per_row       the mean over rows of the mean over their tokens
    min_log_prob  the mean over rows of a softmax-weighted mean in which a row's least likely tokens weigh most, because
                  a greedy completion fails at the first token that is not the likeliest, wherever it is
"""

from typing import TYPE_CHECKING

from substrate.recipes.base_recipe import BaseRecipe

if TYPE_CHECKING:
    import torch

    from substrate.data.batches import MicroBatch


class SftLora(BaseRecipe):
    """The method of hydra_conf/recipe/sft_lora.yaml."""

    def loss(self, outputs: "torch.Tensor", batch: "MicroBatch") -> "torch.Tensor":
        """Returns the weighted cross-entropy of this micro-batch's learned tokens, in nats."""
        weights = batch.weights_1L.to(outputs)
        if self.loss_weighting == "min_log_prob":
            from substrate.data.batches import by_row, in_line

            # Over each row's learned tokens. Detached: no gradient flows through the weights.
            rows = zip(by_row(batch, -outputs.detach()), by_row(batch, weights), strict=True)
            shares = [unlikely.masked_fill(weight == 0, float("-inf")).softmax(-1) for unlikely, weight in rows]
            weights = weights * in_line(batch, shares)
        return -(outputs * weights).sum()
