"""Supervised fine-tuning of whole weights: `sft_lora`'s data and loss, without its low rank while training.

Trained is the full matrix of every target module; every other weight, the router among them, stays as pretrained.
What leaves the run is still an adapter of `lora.rank`: the nearest one to the change, singular value by singular value.
How much of the change it keeps is in progress.jsonl ("low_rank", "kept_share"): far below 1, raise the rank.

A low rank learns less and forgets less than this: Biderman et al., arXiv:2405.09673.
"""

from typing import TYPE_CHECKING

from substrate.recipes.knobs import require
from substrate.recipes.sft_lora import SftLora

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from substrate.training.run import Training


class SftFull(SftLora):
    """hydra_conf/recipe/sft_full.yaml."""

    def check_layout(self, pp: int, dp: int) -> None:
        super().check_layout(pp, dp)
        require(self.lora.dropout == 0, "lora.dropout", self.lora.dropout, "0: there is no pair while training")

    def attach(self, model: "torch.nn.Module", seed: int) -> None:
        """Freezes the model and gives each target module a change of its own."""
        from substrate.model.full import add_full

        add_full(model, self.lora.targets)

    def save(self, run: "Training", folder: "Path") -> None:
        """Writes the nearest adapter."""
        from substrate.model.full import to_lora

        share = to_lora(run.model, self.lora.rank, self.lora.alpha, self.lora.dropout, self.lora.targets)
        run.progress.write("low_rank", step=run.step, rank=self.lora.rank, kept_share=round(share, 6))
        super().save(run, folder)
