"""Elementwise parts of the layers with backward passes of their own, so that a step makes and keeps fewer tensors.

Automatic differentiation keeps every intermediate tensor, and gives each slice a gradient as large as what it was cut
from. Each function here keeps what its closed form needs. All compute in float32 and return their input's type.

S positions, B sequences, I channels, K taps of a convolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from substrate.ops import kernels
from substrate.ops.sequences import Packing


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dimension (arXiv:1910.07467)."""
    if x.device.type == "cuda":  # one kernel each way
        return F.rms_norm(x, weight.shape, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """Returns the RMS norm of y * silu(z) within each group of channels, times the weight of each channel, in z's type."""
    if kernels.of(z.device).scan == "triton":
        return kernels.triton_gated_norm(y, z, weight, eps, num_groups)
    normed: Tensor = _GatedNorm.apply(y, z, weight, eps, num_groups)
    return normed


def conv_silu(x_SBI: Tensor, weight_IK: Tensor, bias_I: Tensor, packing: Packing | None = None) -> Tensor:
    """Returns silu of the causal depthwise convolution, (S, B, I). Taps do not reach into another document of a packing."""
    y: Tensor = _ConvSilu.apply(x_SBI, weight_IK, bias_I, packing)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return ((wide * scale).mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, gradient = x.float() * scale, gradient.float()
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return _of_normed(gradient * weight, normed, scale).to(x.dtype), of_weight, None


def _of_normed(gradient: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """Returns the gradient of x from that of x * scale = `normed`, over the last dimension; changes `gradient`."""
    along = torch.linalg.vecdot(gradient, normed).unsqueeze(-1) / normed.shape[-1]
    return gradient.addcmul_(normed, along, value=-1).mul_(scale)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
        gate = F.silu(z.float())
        grouped = (y * gate).unflatten(-1, (num_groups, -1))
        scale = (grouped.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(y, z, gate, weight, scale)
        ctx.num_groups = num_groups
        return (grouped.mul_(scale).flatten(-2).mul_(weight)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, z, gate, weight, scale = ctx.saved_tensors
        groups = (ctx.num_groups, -1)
        normed, gradient = (y * gate).unflatten(-1, groups) * scale, gradient.float()
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = (gradient * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = _of_normed((gradient * weight).unflatten(-1, groups), normed, scale).flatten(-2)
        of_z = torch.ops.aten.silu_backward(gradient * y, z.float())
        return (gradient * gate).to(y.dtype), of_z.to(z.dtype), of_weight, None, None


class _ConvSilu(torch.autograd.Function):
    """A sum over taps: `conv1d` would need sequence-major data transposed twice, which costs more."""

    @staticmethod
    def forward(ctx: Any, x_SBI: Tensor, weight_IK: Tensor, bias_I: Tensor, packing: Packing | None) -> Tensor:
        taps_KI, K = weight_IK.T.contiguous(), weight_IK.shape[1]
        y_SBI = torch.addcmul(bias_I, x_SBI, taps_KI[K - 1])
        for back in range(1, min(K, len(x_SBI))):
            y_SBI[back:].addcmul_(_seen(x_SBI[:-back], packing, back), taps_KI[K - 1 - back])
        ctx.save_for_backward(x_SBI, taps_KI, y_SBI)
        ctx.packing = packing
        return F.silu(y_SBI)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_SBI, taps_KI, y_SBI = ctx.saved_tensors
        K, trains = len(taps_KI), ctx.needs_input_grad[1]
        gradient = torch.ops.aten.silu_backward(gradient, y_SBI)
        of_x = gradient * taps_KI[K - 1]
        of_taps = [(gradient * x_SBI).sum((0, 1))] if trains else []
        for back in range(1, min(K, len(x_SBI))):
            there = _seen(gradient[back:], ctx.packing, back)
            of_x[:-back].addcmul_(there, taps_KI[K - 1 - back])
            if trains:
                of_taps.append((there * x_SBI[:-back]).sum((0, 1)))
        of_bias = gradient.sum((0, 1)) if ctx.needs_input_grad[2] else None
        if not trains:
            return of_x, None, of_bias, None
        of_taps += [torch.zeros_like(of_taps[0])] * (K - len(of_taps))  # taps that reach beyond a short sequence
        return of_x, torch.stack(of_taps[::-1], 1), of_bias, None


def _seen(part_SBI: Tensor, packing: Packing | None, back: int) -> Tensor:
    """Sets to zero what a tap would take from another document: rows S - back, for positions from `back` on."""
    return part_SBI if packing is None else part_SBI * packing.has_before(back)[back:]
