"""Routed experts: megatron-core's, called one by one or, frozen on a GPU, as one grouped product.

Hundreds of small matrix products a layer are what a GPU does badly; `torch.nn.functional.grouped_mm` does those of all
experts in one call. For it the weights of a layer lie in one tensor, of which each expert's are a view.

T rows (a token once for each expert it goes to), U hidden size, F hidden units of an expert, E experts here.
"""

from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from substrate.model import kernels


class Experts(SequentialMLP):
    """megatron-core's routed experts. Those that do not learn go as one grouped product where the device has it; else one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._up_EFU, self._down_EUF = (
            self._stacked([getattr(expert, name) for expert in self.local_experts])
            for name in ("linear_fc1", "linear_fc2")
        )
        # Looked through at every call, hundreds of them.
        self._layers = tuple(layer for expert in self.local_experts for layer in (expert.linear_fc1, expert.linear_fc2))

    def _stacked(self, layers: list[Any]) -> Tensor:
        """One tensor of all experts' weights, which become views of it: a grouped product reads it as it lies."""
        first = layers[0].weight
        stacked = torch.empty(len(layers), *first.shape, dtype=first.dtype, device=first.device)
        for layer, weight in zip(layers, stacked, strict=True):
            layer.weight.data = weight
        return stacked

    def forward(self, tokens_TU: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """tokens_TU stand expert by expert; weights_T are the router's. Returns weight x expert(token), in that order."""
        if kernels.of(tokens_TU.device).experts == "grouped" and self._are_plain():
            ends_E = tokens_per_expert.to(tokens_TU.device).cumsum(0).to(torch.int32)
            hidden = squared_relu(kernels.grouped_linear(tokens_TU, self._up_EFU, ends_E)) * weights_T.unsqueeze(-1)
            return kernels.grouped_linear(hidden.to(tokens_TU.dtype), self._down_EUF, ends_E), None
        counts = tokens_per_expert.tolist()
        outputs = []
        for expert, x, weights in zip(
            self.local_experts, tokens_TU.split(counts), weights_T.split(counts), strict=True
        ):
            if len(x):  # one without tokens is passed over
                hidden, _ = expert.linear_fc1(x)
                hidden = squared_relu(hidden) * weights.unsqueeze(-1)
                outputs.append(expert.linear_fc2(hidden.to(x.dtype))[0])
        return torch.cat(outputs) if outputs else torch.zeros_like(tokens_TU), None

    def _are_plain(self) -> bool:
        """Neither adapted nor, in this pass, trained: while decoding, weights need not be frozen."""
        trained = torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in self._layers)
        return not trained and all(layer.adapter is None for layer in self._layers)
