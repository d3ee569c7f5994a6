"""A frozen linear layer with a trained low-rank change, y = x (W + B A)^T, with a backward pass of its own.

Automatic differentiation keeps the low-rank product, casts both factors in every pass, and adds the two parts of x's
gradient in a pass over memory of its own. Here the second product adds to the first. In float32 W + B A is made once a
pass where it costs less than the two small products of every token, and then each direction is one product. In half
precision that sum would round the change away.

N rows, I inputs, O outputs, R columns of B: rank x adapted modules.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_linear(
    x_NI: Tensor, weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, cast: tuple[Tensor, Tensor], mask_OR: Tensor | float
) -> Tensor:
    """Returns x (W + (mask B) A)^T, (N, O). Gradients go to x, and to the float32 factors A_RI and B_OR, where they are wanted.

    B_OR may have one block of columns for several modules, which `mask_OR` (O, R) then repeats; a number scales it.
    cast: A_RI and the masked B_OR in the type of x, without gradients.
    """
    y: Tensor = _LowRankLinear.apply(x_NI, weight_OI, A_RI, B_OR, cast, mask_OR)
    return y


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        cast: tuple[Tensor, Tensor],
        mask_OR: Tensor | float,
    ) -> Tensor:
        A, B = cast
        outputs, inputs = weight_OI.shape
        ctx.is_merged = x_NI.dtype is torch.float32 and len(x_NI) * (inputs + outputs) > inputs * outputs
        # Where a matrix is no larger than both small ones for every token, the gradient of the whole matrix is less work.
        ctx.is_narrow = inputs * outputs < 2 * len(A) * (inputs + outputs)
        if ctx.is_merged:
            weight_OI, low_NR = torch.addmm(weight_OI, B, A), None
            y_NO = F.linear(x_NI, weight_OI)
        else:
            low_NR = F.linear(x_NI, A)
            y_NO = F.linear(x_NI, weight_OI).addmm_(low_NR, B.T)
        ctx.save_for_backward(x_NI, weight_OI, low_NR)
        ctx.cast, ctx.mask, ctx.rank = cast, mask_OR, B_OR.shape[1]
        return y_NO

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, low_NR = ctx.saved_tensors
        A, B = ctx.cast
        of_x = of_A = of_B = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight_OI
        if ctx.is_merged and ctx.is_narrow:
            of_W = gradient.T @ x_NI
            of_A, of_B = B.T @ of_W, of_W @ A.T
        else:
            back_NR = gradient @ B
            of_A, of_B = back_NR.T @ x_NI, gradient.T @ (F.linear(x_NI, A) if low_NR is None else low_NR)
            if of_x is not None and not ctx.is_merged:
                of_x.addmm_(back_NR, A)
        of_B = of_B.float() * ctx.mask
        if of_B.shape[1] > ctx.rank:
            of_B = of_B.unflatten(1, (-1, ctx.rank)).sum(1)
        of_A = of_A.float()
        return of_x, None, of_A, of_B, None, None
