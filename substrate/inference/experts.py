"""The mixture of experts as decoding runs it: routed experts and the shared one. It keeps nothing between tokens.

Tokens are sorted by expert, so that one grouped product serves all experts. There are always N x k sorted rows, so every
shape depends on the number of tokens alone: nothing waits for the device, and a graph can hold the pass. A few rows on
a GPU are multiplied without being sorted. On a CPU a layer of few small experts is one dense product, in which an expert
that a token was not sent to has weight 0: that is more arithmetic in fewer calls.

Where experts are spread over ranks (ep > 1), each rank gathers the rows of all, applies its own experts and returns the
sums. Sources: the router of Nemotron-H is DeepSeek-V3's (arXiv:2412.19437, eq. 12 to 16).

N rows, U hidden size, E experts here, F hidden units of an expert here, k experts of a token.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from substrate.inference.cache import Prompts, Step
from substrate.inference.projections import GroupedProjection, Projection, joined, summed
from substrate.ops import kernels
from substrate.ops.fused import squared_relu_
from substrate.ops.routing import route, sort_by_expert

DENSE_ROWS = 32  # most rows of a dense product: with more, the surplus arithmetic costs more than the calls
DENSE_WEIGHTS = 2**18  # most weights of one of its factors, E x F x U


class Experts:
    """One layer's experts on this rank, over megatron-core's own tensors."""

    def __init__(self, layer: Any, groups: Any) -> None:
        """layer: the `MoELayer` of a `HybridModel`; groups: the model's process groups."""
        experts, shared, config = layer.experts, layer.shared_experts, layer.config
        self.gate_EU, self.bias_E = layer.router.weight.detach().float(), layer.router.expert_bias.detach()
        self.top_k, self.scaling = config.moe_router_topk, config.moe_router_topk_scaling_factor
        self.tp, self.spread = groups.tp, groups.tp_ep if groups.ep.size() > 1 else None
        self.first, self.num_here = layer.local_expert_indices[0], len(layer.local_expert_indices)
        self.up = GroupedProjection(experts.up_EFU, [each.linear_fc1 for each in experts.local_experts])
        self.down = GroupedProjection(experts.down_EUF, [each.linear_fc2 for each in experts.local_experts])
        self.shared_up, self.shared_down = Projection(shared.linear_fc1), Projection(shared.linear_fc2)
        self.room = 0  # most tokens of a rank in this pass, where ranks with different tokens share experts
        self.dense = self._stack() if self._is_small() else None

    def new_cache(self, num_slots: int, max_length: int) -> tuple[Tensor, ...]:
        return ()

    def prompts(self, x_NU: Tensor, kept: tuple[Tensor, ...], at: Prompts) -> Tensor:
        return self._run(x_NU)

    def step(self, x_NU: Tensor, kept: tuple[Tensor, ...], at: Step) -> Tensor:
        return self._run(x_NU)

    def idle(self, x_NU: Tensor) -> None:
        """Applies this rank's experts to other ranks' rows, in a pass in which it has none of its own: x_NU is (1, U) zeros."""
        if self.spread is not None:
            self._exchange(x_NU, *self._route(x_NU))

    def _run(self, x_NU: Tensor) -> Tensor:
        weights_Nk, ids_Nk = self._route(x_NU)
        if self.dense is not None and len(x_NU) <= DENSE_ROWS:
            return summed(self._together(x_NU, weights_Nk, ids_Nk, *self.dense), self.tp)
        shared_NU = self.shared_down(squared_relu_(self.shared_up(x_NU)))
        if self.spread is None:
            return summed(self._routed(x_NU, weights_Nk, ids_Nk).add_(shared_NU), self.tp)
        return self._exchange(x_NU, weights_Nk, ids_Nk).add_(summed(shared_NU, self.tp))

    def _route(self, x_NU: Tensor) -> tuple[Tensor, Tensor]:
        return route(x_NU, self.gate_EU, self.bias_E, self.top_k, self.scaling)

    def _routed(self, x_NU: Tensor, weights_Nk: Tensor, ids_Nk: Tensor) -> Tensor:
        """Returns the weighted sum of each row's experts on this rank; a row whose expert is elsewhere adds nothing."""
        k = ids_Nk.shape[1]
        ids, weights = (ids_Nk - self.first).flatten(), weights_Nk.flatten()
        if self.spread is not None:
            # Rows of other ranks' experts go to the last expert here with weight 0: shapes stay the same.
            here = (ids >= 0) & (ids < self.num_here)
            ids, weights = ids.where(here, self.num_here - 1), weights * here
        if kernels.takes_few_rows(len(ids), x_NU.device):

            def product(x: Tensor, weight_EOI: Tensor) -> Tensor:
                return kernels.few_rows_linear(x, weight_EOI, ids)

            y = self.down(squared_relu_(self.up(x_NU, product), weights.unsqueeze(1)), product)
            return y.view(-1, k, y.shape[1]).sum(1)
        order, back, ends_E = sort_by_expert(ids, self.num_here)
        ends_E = ends_E.to(torch.int32)

        def grouped(x: Tensor, weight_EOI: Tensor) -> Tensor:
            return kernels.grouped_linear(x, weight_EOI, ends_E)

        y = self.down(squared_relu_(self.up(x_NU[order // k], grouped), weights[order].unsqueeze(1)), grouped)
        return y[back].view(-1, k, y.shape[1]).sum(1)

    def _is_small(self) -> bool:
        """Whether the layer has a dense form. It has no room for an adapter that is not merged."""
        weight, parts = self.up.weight_EOI, (self.up, self.down, self.shared_up, self.shared_down)
        fits = weight.device.type == "cpu" and weight.numel() <= DENSE_WEIGHTS
        return fits and self.spread is None and all(part.pair is None for part in parts)

    def _stack(self) -> tuple[Tensor, Tensor]:
        """Returns all experts' and the shared one's weights as the two factors of a dense product."""
        up = torch.cat([self.up.weight_EOI.flatten(0, 1), self.shared_up.weight_OI])
        down = torch.cat([self.down.weight_EOI.transpose(1, 2).flatten(0, 1).T, self.shared_down.weight_OI], 1)
        return up, down

    def _together(self, x_NU: Tensor, weights_Nk: Tensor, ids_Nk: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights_NE = torch.zeros(len(x_NU), self.num_here, device=x_NU.device).scatter_(1, ids_Nk, weights_Nk)
        hidden = F.relu(F.linear(x_NU, up)).square_()
        shape = self.up.weight_EOI.shape[:2]
        hidden[:, : shape.numel()].view(-1, *shape).mul_(weights_NE.unsqueeze(-1))
        return F.linear(hidden, down)

    def _exchange(self, x_NU: Tensor, weights_Nk: Tensor, ids_Nk: Tensor) -> Tensor:
        """Returns the routed experts' sum of this rank's rows, with every rank's experts. All ranks of `spread` call it.

        Tensor-parallel ranks hold the same rows, so each sends a share of them. Ranks with fewer rows than `room` fill
        up with rows of zeros.
        """
        assert self.spread is not None
        ranks, num_rows = self.tp.size(), len(x_NU)
        share = -(-max(num_rows, self.room) // ranks)
        surplus, mine = share * ranks - num_rows, slice(self.tp.rank() * share, (self.tp.rank() + 1) * share)
        x, weights, ids = (
            joined(F.pad(part, (0, 0, 0, surplus))[mine], self.spread) for part in (x_NU, weights_Nk, ids_Nk)
        )
        partial = self._routed(x, weights, ids).contiguous()
        dist.all_reduce(partial, group=self.spread)
        begin = self.spread.rank() * share
        return joined(partial[begin : begin + share], self.tp)[:num_rows]
