"""Supervised fine-tuning of whole weights, with the data and loss of `sft_lora` but no low rank while training.

The full matrix of every target module is trained; all other weights, including the router, stay as pretrained. The run
still writes an adapter of rank `lora.rank`: the one nearest to the change, by singular value decomposition. How much of
the change it keeps is in progress.jsonl ("low_rank", "kept_share"); if that is far below 1, raise the rank.

A low rank learns less and forgets less than this: Biderman et al., arXiv:2405.09673.
"""

from typing import TYPE_CHECKING

from substrate.recipes.base_recipe import require
from substrate.recipes.sft_lora import SftLora

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from substrate.training.run import Training


class SftFull(SftLora):
    """The method of hydra_conf/recipe/sft_full.yaml."""

    def check_layout(self, pp: int, dp: int) -> None:
        super().check_layout(pp, dp)
        require(self.lora.dropout == 0, "lora.dropout", self.lora.dropout, "0: whole weights have no dropout")

    def attach(self, model: "torch.nn.Module", seed: int) -> None:
        """Freezes the model and adds a trainable change of the whole weight to each target module."""
        from substrate.model.full import add_full

        add_full(model, self.lora.targets)

    def save(self, run: "Training", folder: "Path") -> None:
        """Writes the adapter that is nearest to the change."""
        from substrate.model.full import to_lora

        share = to_lora(run.model, self.lora.rank, self.lora.alpha, self.lora.dropout, self.lora.targets)
        run.progress.write("low_rank", step=run.step, rank=self.lora.rank, kept_share=round(share, 6))
        super().save(run, folder)
