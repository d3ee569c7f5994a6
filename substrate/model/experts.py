"""The mixture of experts in training: tokens sorted by expert, and routed experts that are one grouped product if frozen.

A layer has hundreds of small matrix products, which are slow on a GPU; `torch.nn.functional.grouped_mm` computes those
of all experts in one call. For this the weights of a layer lie in one tensor, and each expert's weights are a view of it.

megatron-core's dispatcher builds a map of tokens x experts and reads it on the host. Where every rank has all experts,
`ExpertLayer` sorts the tokens instead. There are always N x k sorted rows, so no shape depends on the routing, and each
permutation is read by its inverse in the backward pass, without atomic additions. Tensor-parallel ranks gather the
tokens once for the routed experts and the shared one, and scatter the sum of both once.

N tokens, k experts of a token, T = N x k rows, U hidden size, F hidden units of an expert, E experts here. S positions of
this rank's part of the sequence, B sequences.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from substrate.model.lora import draw_seed
from substrate.ops import kernels
from substrate.ops.fused import squared_relu
from substrate.ops.routing import route, sort_by_expert


class ExpertLayer(MoELayer):
    """megatron-core's mixture of experts, with a dispatch of our own where every rank has all experts."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(S, B, U) -> (S, B, U), no bias."""
        if self.ep_group.size() > 1:
            output: tuple[Tensor, None] = super().forward(hidden_states, *args, **kwargs)
            return output
        config, router = self.config, self.router
        weights_Nk, ids_Nk = route(
            hidden_states.flatten(0, 1),
            router.weight,
            router.expert_bias,
            config.moe_router_topk,
            config.moe_router_topk_scaling_factor,
        )
        ranks = self.tp_group
        if ranks.size() > 1:
            hidden_states, weights_Nk = (
                gather_from_sequence_parallel_region(part, group=ranks) for part in (hidden_states, weights_Nk)
            )
            ids_Nk = gather_from_sequence_parallel_region(ids_Nk, tensor_parallel_output_grad=False, group=ranks)
        x_NU, k = hidden_states.flatten(0, 1), ids_Nk.shape[1]
        order, back, ends_E = sort_by_expert(ids_Nk.flatten(), self.num_local_experts)
        # The shared expert comes first, as in the library's layer: masks of dropout are drawn in this order.
        up, down = self.shared_experts.linear_fc1, self.shared_experts.linear_fc2
        shared_NU = down.product(squared_relu(up.product(x_NU)))
        if self.experts.are_frozen_in_turn(x_NU):
            routed_NU = _FrozenExperts.apply(
                x_NU, weights_Nk, self.experts.up_EFU, self.experts.down_EUF, order, back, ends_E.tolist()
            )
        else:
            weights_T = _Sorted.apply(weights_Nk.reshape(-1, 1), order, back, 1).squeeze(1)
            rows_TU = self.experts.apply_sorted(_Sorted.apply(x_NU, order, back, k), ends_E, weights_T)
            routed_NU = _Combined.apply(rows_TU, order, back, k)
        sum_SBU = (routed_NU + shared_NU).view(hidden_states.shape)
        if ranks.size() > 1:
            sum_SBU = reduce_scatter_to_sequence_parallel_region(sum_SBU, group=ranks)
        return sum_SBU, None


class _Sorted(torch.autograd.Function):
    """Each token's row once for each of its k experts, in the order of the experts: (N, U) -> (T, U)."""

    @staticmethod
    def forward(ctx: Any, x_NU: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.back, ctx.k = back, k
        return x_NU.index_select(0, order // k if k > 1 else order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.index_select(0, ctx.back)
        return gradient.unflatten(0, (-1, ctx.k)).sum(1) if ctx.k > 1 else gradient, None, None, None


class _Combined(torch.autograd.Function):
    """The sum of a token's k rows: (T, U) -> (N, U)."""

    @staticmethod
    def forward(ctx: Any, rows_TU: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.order, ctx.k = order, k
        return rows_TU.index_select(0, back).unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.index_select(0, ctx.order // ctx.k), None, None, None


class _FrozenExperts(torch.autograd.Function):
    """The weighted sum of a token's k experts, (N, U), expert by expert: an expert's rows are few enough for a core's cache.

    `embedding_bag` gathers and adds a token's rows in one pass, eight times as fast as a gather and a sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NU: Tensor,
        weights_Nk: Tensor,
        up_EFU: Tensor,
        down_EUF: Tensor,
        order: Tensor,
        back: Tensor,
        ends: list[int],
    ) -> Tensor:
        k = weights_Nk.shape[1]
        tokens, weights_T1 = order // k, weights_Nk.flatten()[order].unsqueeze(1)
        positive_TF = x_NU.new_empty(len(order), up_EFU.shape[1])
        rows_TU = x_NU.new_empty(len(order), x_NU.shape[1])
        for up, down, part in zip(up_EFU, down_EUF, _parts(ends), strict=True):
            positive = positive_TF[part]
            torch.mm(x_NU.index_select(0, tokens[part]), up.T, out=positive).relu_()
            torch.mm((positive * positive).mul_(weights_T1[part]), down.T, out=rows_TU[part])
        ctx.save_for_backward(positive_TF, weights_T1, up_EFU, down_EUF)
        ctx.order, ctx.back, ctx.ends, ctx.k = order, back, ends, k
        return F.embedding_bag(back.unflatten(0, (-1, k)), rows_TU, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        positive_TF, weights_T1, up_EFU, down_EUF = ctx.saved_tensors
        tokens, twice_T1 = ctx.order // ctx.k, 2 * weights_T1
        rows_TU, of_weights = gradient.new_empty(len(tokens), gradient.shape[1]), torch.empty_like(weights_T1)
        for up, down, part in zip(up_EFU, down_EUF, _parts(ctx.ends), strict=True):
            positive = positive_TF[part]
            of_hidden = torch.mm(gradient.index_select(0, tokens[part]), down).mul_(positive)
            torch.sum(of_hidden * positive, -1, keepdim=True, dtype=torch.float32, out=of_weights[part])
            torch.mm(of_hidden.mul_(twice_T1[part]), up, out=rows_TU[part])
        of_token = ctx.back.unflatten(0, (-1, ctx.k))
        of_x = F.embedding_bag(of_token, rows_TU, mode="sum")
        return of_x, of_weights.squeeze(1)[of_token], None, None, None, None, None


def _parts(ends: Sequence[int]) -> Iterator[slice]:
    """The rows of each expert, of some none."""
    return itertools.starmap(slice, itertools.pairwise([0, *ends]))


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
        """Does what `apply_sorted` says, in the form in which megatron-core's layer calls it."""
        return self.apply_sorted(tokens_TU, tokens_per_expert.cumsum(0), weights_T), None

    def apply_sorted(self, rows_TU: Tensor, ends_E: Tensor, weights_T: Tensor) -> Tensor:
        """Returns weight x expert(row). Rows are sorted by expert; ends_E has the end of each expert's; weights_T are float32."""
        weights_T1 = weights_T.unsqueeze(-1)
        if kernels.of(rows_TU.device).experts == "grouped" and self._are_plain():
            ends_E = ends_E.to(rows_TU.device, torch.int32)
            hidden = squared_relu(kernels.grouped_linear(rows_TU, self.up_EFU, ends_E), weights_T1)
            return kernels.grouped_linear(hidden, self.down_EUF, ends_E)
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        if self.training and not self._are_plain():
            # One number for all experts, because ranks have different experts, and some of those have no tokens.
            seed = draw_seed()
            for layer in self._layers:
                if layer.adapter is not None:
                    layer.adapter.pass_seed = seed
        outputs = []
        for expert, x, weights in zip(self.local_experts, rows_TU.split(counts), weights_T1.split(counts), strict=True):
            if len(x):  # an expert without tokens is skipped
                hidden, _ = expert.linear_fc1(x)
                outputs.append(expert.linear_fc2(squared_relu(hidden, weights))[0])
        return torch.cat(outputs) if outputs else torch.zeros_like(rows_TU)

    def are_frozen_in_turn(self, x: Tensor) -> bool:
        """Whether tokens like x go through frozen experts one after the other, and not through grouped products."""
        return kernels.of(x.device).experts == "sequential" and self._are_plain()

    def _are_plain(self) -> bool:
        """Whether no expert has an adapter or is trained in this pass. Without gradients, weights need not be frozen."""
        trained = torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in self._layers)
        return not trained and all(layer.adapter is None for layer in self._layers)
