"""The elementwise parts in plain form, which `torch.compile` turns into one kernel each way (inductor: Triton on a GPU, C++ on a CPU).

`kernels` says where they are used, and why not elsewhere. Their backward passes are derived by the compiler, which keeps
inputs and computes intermediates again. All compute in float32 and return the type of their first input; `gated_norm`
that of z, `add_skip` float32.

The number of rows differs from pass to pass, so it is a symbol of the compiled code and not a part of it. What else differs
(types, packed or not, what is trained, with gradients or without) is compiled once each, on first use.

S positions, B sequences, I channels, K taps of a convolution, H heads, P head dim, T rows, F hidden units.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_silu(x_SBI: Tensor, position_S: Tensor | None, weight_IK: Tensor, bias_I: Tensor) -> Tensor:
    """`fused.conv_silu`. position_S: of each token in its document, or None where a sequence is one document."""
    S, K = x_SBI.shape[0], weight_IK.shape[1]
    padded = F.pad(x_SBI, (0, 0, 0, 0, K - 1, 0)).float()
    y_SBI = bias_I.float()
    for back in range(K):
        seen_SBI = padded[K - 1 - back : K - 1 - back + S]
        if position_S is not None and back:
            seen_SBI = torch.where((position_S >= back)[:, None, None], seen_SBI, 0.0)
        y_SBI = y_SBI + seen_SBI * weight_IK[:, K - 1 - back].float()
    return F.silu(y_SBI).to(x_SBI.dtype)


def add_skip(y_SBHP: Tensor, x_SBHP: Tensor, D_H: Tensor) -> Tensor:
    """`fused.add_skip`."""
    return y_SBHP.float() + x_SBHP.float() * D_H.unsqueeze(-1)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """`fused.gated_norm`."""
    grouped = (y.float() * F.silu(z.float())).unflatten(-1, (num_groups, -1))
    scale = (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((grouped * scale).flatten(-2) * weight.float()).to(z.dtype)


def squared_relu(x_TF: Tensor) -> Tensor:
    """`fused.squared_relu` without weights."""
    return F.relu(x_TF).float().square().to(x_TF.dtype)


def weighted_squared_relu(x_TF: Tensor, weights_T1: Tensor) -> Tensor:
    """`fused.squared_relu` with weights."""
    return (F.relu(x_TF).float().square() * weights_T1).to(x_TF.dtype)


def run(function: Callable[..., Any], rows: tuple[Tensor | None, ...], *others: Any) -> Any:
    """Returns function(*rows, *others), compiled. rows: tensors whose first dimension is the number of rows."""
    import torch._dynamo  # a second, which nobody else needs

    if rows[0] is not None and len(rows[0]) == 1 and torch.is_grad_enabled():
        return function(
            *rows, *others
        )  # such as an expert's only token: a single row would be compiled as a case of its own
    for tensor in rows:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function)(*rows, *others)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The compiler looks at the gradient of every input, also of those that keep none, and torch warns of that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    return torch.compile(function)
