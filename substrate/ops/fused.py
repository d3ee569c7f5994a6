"""Elementwise parts of the layers with backward passes of their own, so that a step makes and keeps fewer tensors.

Automatic differentiation keeps every intermediate tensor, and gives each slice a gradient as large as what it was cut
from. Each function here keeps what its closed form needs. All compute in float32 and return their input's type.

Where the device has a compiler, the same parts are compiled from plain code (`compiled.py`).

S positions, B sequences, I channels, K taps of a convolution, H heads, P head dim, T rows, F hidden units.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from substrate.ops import compiled, kernels
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
    normed: Tensor
    if kernels.of(z.device).elementwise == "compiled":
        normed = compiled.run(compiled.gated_norm, (y, z), weight, eps, num_groups)
    else:
        normed = _GatedNorm.apply(y, z, weight, eps, num_groups)
    return normed


def add_skip(y_SBHP: Tensor, x_SBHP: Tensor, D_H: Tensor) -> Tensor:
    """Returns y + D x in float32: Mamba's output of the scan with what goes past it."""
    if kernels.of(x_SBHP.device).elementwise == "compiled":
        added: Tensor = compiled.run(compiled.add_skip, (y_SBHP, x_SBHP), D_H)
        return added
    return torch.addcmul(y_SBHP.float(), x_SBHP.float(), D_H.unsqueeze(-1))


def conv_silu(x_SBI: Tensor, weight_IK: Tensor, bias_I: Tensor, packing: Packing | None = None) -> Tensor:
    """Returns silu of the causal depthwise convolution, (S, B, I). Taps do not reach into another document of a packing."""
    y: Tensor
    if kernels.of(x_SBI.device).elementwise == "compiled":
        position_S = packing.position_S if packing is not None else None
        y = compiled.run(compiled.conv_silu, (x_SBI, position_S), weight_IK, bias_I)
    else:
        y = _ConvSilu.apply(x_SBI, weight_IK, bias_I, packing)
    return y


def squared_relu(x_TF: Tensor, weights_T1: Tensor | None = None) -> Tensor:
    """Returns relu(x)^2, times a weight (float32) for each row if given: one step of the backward pass, where separate ones keep three tensors."""
    y: Tensor
    if kernels.of(x_TF.device).elementwise == "compiled":
        flat_TF = x_TF.flatten(0, -2)  # of two dimensions, so that all callers share what is compiled
        if weights_T1 is None:
            y = compiled.run(compiled.squared_relu, (flat_TF,)).view(x_TF.shape)
        else:
            y = compiled.run(compiled.weighted_squared_relu, (flat_TF, weights_T1))
    else:
        y = _SquaredRelu.apply(x_TF, weights_T1)
    return y


def squared_relu_(x_TF: Tensor, weights_T1: Tensor | None = None) -> Tensor:
    """`squared_relu` without gradients, for decoding. It may overwrite x_TF."""
    if kernels.of(x_TF.device).elementwise == "compiled":
        return squared_relu(x_TF, weights_T1)
    y = F.relu_(x_TF).square_()
    return y if weights_T1 is None else (y * weights_T1).to(x_TF.dtype)


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


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, weights_T1: Tensor | None) -> Tensor:
        positive = F.relu(x_TF)
        ctx.save_for_backward(positive, weights_T1)
        y = positive * positive
        return y if weights_T1 is None else (y * weights_T1).to(x_TF.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        positive, weights_T1 = ctx.saved_tensors
        gradient = gradient * positive
        if weights_T1 is None:
            return gradient.mul_(2), None
        of_weights = (
            (gradient * positive).sum(-1, keepdim=True, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        return (gradient * (2 * weights_T1)).to(positive.dtype), of_weights


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
