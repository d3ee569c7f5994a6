"""Test the hand-written backward passes against automatic differentiation of the plain forms, in float64."""

import pytest
import torch
import torch.nn.functional as F

from substrate.distributed import cpu  # noqa: F401  before megatron-core
from substrate.ops import fused, scan
from substrate.ops.low_rank import low_rank_linear
from substrate.ops.sequences import Packing
from tests.support.gradients import compare, drawn


def recurrence(x, dt, A, b, c, documents):
    """The scan one token at a time."""
    heads = x.shape[2] // b.shape[2]
    state = torch.zeros(*x.shape[1:], b.shape[-1], dtype=x.dtype)
    ys = []
    for s in range(len(x)):
        if documents is not None and s:
            state = state * (documents[s] == documents[s - 1])[:, None, None, None]
        b_BHN, c_BHN = (t[s].repeat_interleave(heads, 1) for t in (b, c))
        added = torch.einsum("bh,bhp,bhn->bhpn", dt[s], x[s], b_BHN)
        state = (dt[s] * A).exp()[..., None, None] * state + added
        ys.append(torch.einsum("bhpn,bhn->bhp", state, c_BHN))
    return torch.stack(ys), state


@pytest.mark.parametrize("lengths", [None, [45], [20, 9, 16], [1, 1, 30, 13]])
@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("num_outputs", [1, 2], ids=["outputs", "outputs and state"])
def test_scan_equals_the_recurrence_with_its_gradients(lengths, chunk, num_outputs):
    S, B, H, P, G, N = 45, 1 if lengths else 2, 4, 3, 2, 5
    x, b, c = drawn(S, B, H, P), drawn(S, B, G, N, seed=1), drawn(S, B, G, N, seed=2)
    dt, A = drawn(S, B, H).sigmoid(), -drawn(H).abs() - 0.1
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[:, None] if lengths else None
    compare(
        lambda *given: scan.chunked_scan(*given, chunk, documents),
        lambda *given: recurrence(*given, documents),
        [x, dt, A, b, c],
        num_outputs,
        close=1e-5,  # of A's gradient, a sum over all tokens of numbers of both signs
    )


def test_norms_and_their_gradients():
    def plain_gated(y, z, weight):
        gated = (y * F.silu(z)).unflatten(-1, (3, -1))
        return F.rms_norm(gated, gated.shape[-1:], eps=1e-5).flatten(-2) * weight

    compare(
        lambda x, w: fused.rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
        [drawn(7, 2, 12), drawn(12)],
    )
    compare(
        lambda y, z, w: fused.gated_norm(y, z, w, 1e-5, 3),
        plain_gated,
        [drawn(7, 2, 12), drawn(7, 2, 12, seed=1), drawn(12)],
    )


@pytest.mark.parametrize("lengths", [None, [2, 1, 9], [12]])
@pytest.mark.parametrize("taps", [1, 4])
def test_convolution_and_its_gradients(lengths, taps):
    packing = Packing(lengths, torch.device("cpu")) if lengths else None

    def plain(x, weight, bias):
        parts = x.split(lengths or [len(x)])
        return torch.cat(
            [
                F.silu(F.conv1d(F.pad(part.permute(1, 2, 0), (taps - 1, 0)), weight[:, None], bias, groups=6)).permute(
                    2, 0, 1
                )
                for part in parts
            ]
        )

    ours = lambda x, weight, bias: fused.conv_silu(x, weight, bias, packing)  # noqa: E731
    compare(ours, plain, [drawn(12, 1 if lengths else 2, 6), drawn(6, taps), drawn(6)])
    compare(ours, plain, [drawn(2, 1, 6), drawn(6, taps), drawn(6)]) if lengths is None else None


def test_squared_relu_and_its_gradients():
    compare(fused.squared_relu, lambda x: F.relu(x).square(), [drawn(9, 5)])
    compare(fused.squared_relu, lambda x, w: F.relu(x).square() * w, [drawn(9, 5), drawn(9, 1)])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen):
    leaves = [drawn(8, 1, 6).float(), drawn(6, 4).float(), drawn(6).float()]
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number != frozen)
    fused.conv_silu(*leaves).square().sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [number != frozen for number in range(3)]


@pytest.mark.parametrize("rows", [3, 200], ids=["two products", "merged"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rank", [2, 24], ids=["small", "whole gradient"])
def test_low_rank_layers_and_their_gradients(rows, blocks, rank):
    inputs, outputs = 16, 21
    mask = 0.5 if blocks == 1 else (drawn(outputs, rank * blocks, seed=3) > 0).double()
    weight = drawn(outputs, inputs, seed=2)

    def plain(x, A, B):
        return x @ (weight + (B.repeat(1, blocks) * mask) @ A).T

    def ours(x, A, B):
        scale = mask if blocks == 1 else mask.float()
        cast = (A.detach(), (B.repeat(1, blocks) * scale).detach())
        return low_rank_linear(x, weight.float(), A, B, cast, scale)

    compare(ours, plain, [drawn(rows, inputs), drawn(rank * blocks, inputs), drawn(outputs, rank, seed=1)])
