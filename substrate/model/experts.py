"""Routed experts: megatron-core's, computed one by one or, if frozen and on a GPU, as one grouped product.

A layer has hundreds of small matrix products, which are slow on a GPU; `torch.nn.functional.grouped_mm` computes those
of all experts in one call. For this the weights of a layer lie in one tensor, and each expert's weights are a view of it.

T rows (a token once for each expert it goes to), U hidden size, F hidden units of an expert, E experts here.
"""

from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from substrate.model import kernels
from substrate.model.lora import draw_seed


class Experts(SequentialMLP):
    """megatron-core's routed experts, as one grouped product if the device has it and they are frozen without adapters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.up_EFU, self.down_EUF = (
            self._stacked([getattr(expert, name) for expert in self.local_experts])
            for name in ("linear_fc1", "linear_fc2")
        )
        # Listed once, because every call checks hundreds of them.
        self._layers = tuple(layer for expert in self.local_experts for layer in (expert.linear_fc1, expert.linear_fc2))

    def _stacked(self, layers: list[Any]) -> Tensor:
        """Returns one tensor of all experts' weights, and makes their weights views of it."""
        first = layers[0].weight
        stacked = torch.empty(len(layers), *first.shape, dtype=first.dtype, device=first.device)
        for layer, weight in zip(layers, stacked, strict=True):
            layer.weight.data = weight
        return stacked

    def forward(self, tokens_TU: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Returns weight x expert(token). tokens_TU are sorted by expert; weights_T are the router's."""
        if kernels.of(tokens_TU.device).experts == "grouped" and self._are_plain():
            ends_E = tokens_per_expert.to(tokens_TU.device).cumsum(0).to(torch.int32)
            hidden = squared_relu(kernels.grouped_linear(tokens_TU, self.up_EFU, ends_E)) * weights_T.unsqueeze(-1)
            return kernels.grouped_linear(hidden.to(tokens_TU.dtype), self.down_EUF, ends_E), None
        counts = tokens_per_expert.tolist()
        if self.training:
            # One number for all experts, because ranks have different experts, and some of those have no tokens.
            seed = draw_seed()
            for layer in self._layers:
                if layer.adapter is not None:
                    layer.adapter.pass_seed = seed
        outputs = []
        for expert, x, weights in zip(
            self.local_experts, tokens_TU.split(counts), weights_T.split(counts), strict=True
        ):
            if len(x):  # an expert without tokens is skipped
                hidden, _ = expert.linear_fc1(x)
                hidden = squared_relu(hidden) * weights.unsqueeze(-1)
                outputs.append(expert.linear_fc2(hidden.to(x.dtype))[0])
        return torch.cat(outputs) if outputs else torch.zeros_like(tokens_TU), None

    def _are_plain(self) -> bool:
        """Whether no expert has an adapter or is trained in this pass. Without gradients, weights need not be frozen."""
        trained = torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in self._layers)
        return not trained and all(layer.adapter is None for layer in self._layers)
