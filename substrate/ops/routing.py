"""Which experts a token goes to, with which weight, and the order of rows in which one grouped product serves all experts.

Training and decoding share it. The router is Nemotron-H's, which is DeepSeek-V3's (arXiv:2412.19437, eq. 12 to 16).

N tokens, k experts of a token, T = N x k rows, U hidden size, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from substrate.ops import compiled, kernels


def route(x_NU: Tensor, gate_EU: Tensor, bias_E: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns weights_Nk (float32) and numbers_Nk of each token's experts; the bias affects the choice alone."""
    if kernels.of(x_NU.device).elementwise == "compiled":
        routed: tuple[Tensor, Tensor] = compiled.run(_route, (x_NU,), gate_EU, bias_E, top_k, scaling)
        return routed
    return _route(x_NU, gate_EU, bias_E, top_k, scaling)


def _route(x_NU: Tensor, gate_EU: Tensor, bias_E: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    scores_NE = F.linear(x_NU.float(), gate_EU.float()).sigmoid()
    numbers_Nk = (scores_NE.detach() + bias_E).topk(top_k, -1).indices
    weights_Nk = scores_NE.gather(1, numbers_Nk)
    if top_k > 1:
        weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
    return weights_Nk * scaling, numbers_Nk


def sort_by_expert(numbers_T: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the order of the rows by expert, its inverse, and the end of each expert's rows, all int64. No shape depends on the routing."""
    order_T = numbers_T.argsort(stable=True)
    back_T = torch.empty_like(order_T)
    back_T[order_T] = torch.arange(len(order_T), device=order_T.device)
    experts_E = torch.arange(num_experts, device=order_T.device)
    return order_T, back_T, torch.searchsorted(numbers_T[order_T], experts_E, right=True)
