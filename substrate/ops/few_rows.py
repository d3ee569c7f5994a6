"""A matrix product of a few rows, each with the weights of an expert of its own, in Triton: a step of one or a few sequences.

A grouped product computes whole tiles of rows. For the six rows of one token of the 30B it took 73 us on an H200, where
reading their weights takes 14, and a step has 46 such products. Here each program multiplies one row by a block of its
expert's outputs, so that the weights are read once and nothing is sorted. Sums are in float32.

This module imports Triton, so `kernels` imports it only where a GPU can compile. TRITON_INTERPRET=1 runs it anywhere.

N rows of x, T = N x k rows of the result, E experts, I inputs, O outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_OUT, BLOCK_IN = 8, 512  # outputs and inputs of a program at a time: 32 sums a thread


@triton.jit
def _one_row(  # type: ignore[no-untyped-def]
    x,
    weights,
    ids,
    y,
    rows_of_x,
    num_in: tl.constexpr,
    num_out: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    row = tl.program_id(0)
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = outs < num_out
    x += (row // rows_of_x) * num_in
    weights += tl.load(ids + row).to(tl.int64) * num_out * num_in
    sums = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for begin in range(0, num_in, BLOCK_IN):
        ins = begin + tl.arange(0, BLOCK_IN)
        is_in = ins < num_in
        part = tl.load(
            weights + outs[:, None] * num_in + ins[None, :], mask=is_out[:, None] & is_in[None, :], other=0.0
        )
        sums += part.to(tl.float32) * tl.load(x + ins, mask=is_in, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row * num_out + outs, tl.sum(sums, 1).to(y.dtype.element_ty), mask=is_out)


def few_rows_linear(x_NI: Tensor, weight_EOI: Tensor, ids_T: Tensor) -> Tensor:
    """Returns each of T rows times its expert's W^T, (T, O). Row t is that of x_NI at t // (T / N), with the expert ids_T[t]."""
    num_rows, (_, num_out, num_in) = len(ids_T), weight_EOI.shape
    y_TO = torch.empty(num_rows, num_out, dtype=x_NI.dtype, device=x_NI.device)
    _one_row[(num_rows, triton.cdiv(num_out, BLOCK_OUT))](
        x_NI.contiguous(),
        weight_EOI.contiguous(),
        ids_T,
        y_TO,
        num_rows // len(x_NI),
        num_in,
        num_out,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_IN=BLOCK_IN,
    )
    return y_TO
