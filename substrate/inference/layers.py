"""The Mamba-2 mixer and attention as decoding runs them: flat tensor code over a static cache.

megatron-core's modules serve training. One token of decoding is too little work for them: their bookkeeping costs more
than the products. Each class here takes the tensors of such a module, without copying them, and has two forms of a pass:
whole prompts, and one more token of each sequence. The tests compare both with the modules and with transformers. The
mixture of experts is in `experts.py`.

N rows (B sequences x S positions), B sequences, S positions, U hidden size, I channels of the convolution, K its taps, H
heads, G groups, Q heads of a group, P head dim, N state dim of the scan, D head dim of attention, L kept positions. All sizes are this rank's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from substrate.inference.cache import Prompts, Step
from substrate.inference.projections import Projection, joined, summed
from substrate.ops import kernels
from substrate.ops.scan import chunked_scan

Kept = tuple[Tensor, ...]


class Mamba:
    """The Mamba-2 mixer (`substrate.model.mamba`). Its cache: the last K - 1 inputs of the convolution, and the state."""

    def __init__(self, mixer: Any) -> None:
        self.enter, self.leave, self.group = (
            Projection(mixer.in_proj),
            Projection(mixer.out_proj),
            mixer.out_proj.tp_group,
        )
        self.sizes, self.parts = mixer.split_sizes, mixer.conv_split_sizes
        self.shape = (mixer.num_groups, mixer.num_heads // mixer.num_groups, mixer.head_dim, mixer.state_dim)
        self.taps_KI = mixer.conv_weight_I1K.detach()[:, 0].T.contiguous()
        self.bias_I, self.dt_bias_H = mixer.conv_bias_I.detach(), mixer.dt_bias_H.detach()
        self.A_H, self.D_H1 = -mixer.A_log_H.detach().exp(), mixer.D_H.detach().unsqueeze(-1)
        self.norm_I, self.eps, self.chunk = (
            mixer.norm_weight_I.detach(),
            mixer.config.layernorm_epsilon,
            mixer.chunk_size,
        )

    def new_cache(self, num_slots: int, max_length: int) -> Kept:
        G, Q, P, N = self.shape
        window = self.taps_KI.new_zeros(num_slots, len(self.taps_KI) - 1, len(self.bias_I))
        return window, self.A_H.new_zeros(num_slots, G * Q, P, N, dtype=torch.float32)

    def prompts(self, x_NU: Tensor, kept: Kept, at: Prompts) -> Tensor:
        B, S = at.tokens_BS.shape
        valid_BS1 = at.valid_BS.unsqueeze(-1)
        z, xbc, dt = self.enter(x_NU).view(B, S, -1).split(self.sizes, -1)
        # Padding is on the left; set to zero, it leaves window and state as at the start of a sequence.
        taps = len(self.taps_KI)
        window = F.pad(xbc * valid_BS1, (0, 0, taps - 1, 0))
        convolved = self.bias_I
        for k in range(taps):
            convolved = torch.addcmul(convolved, window[:, k : k + S], self.taps_KI[k])
        x, b, c = self._heads(convolved)
        dt = F.softplus(dt.float() + self.dt_bias_H) * valid_BS1
        scan = kernels.triton_scan if kernels.of(x.device).scan == "triton" else chunked_scan
        x_SBHP, dt_SBH, b_SBGN, c_SBGN = (t.transpose(0, 1) for t in (x, dt, b, c))
        y, h_BHPN = scan(x_SBHP, dt_SBH, self.A_H, b_SBGN, c_SBGN, self.chunk)
        kept[0][at.rows] = window[:, S:]
        kept[1][at.rows] = h_BHPN
        return self._leave(y.transpose(0, 1).float(), x, z)

    def step(self, x_BU: Tensor, kept: Kept, at: Step) -> Tensor:
        (G, Q, P, N), B = self.shape, len(x_BU)
        window, h_BHPN = (tensor[at.rows] for tensor in kept)
        z, xbc, dt = self.enter(x_BU).split(self.sizes, -1)
        taps_BKI = torch.cat([window, xbc.unsqueeze(1)], 1)
        window.copy_(taps_BKI[:, 1:])
        x, b, c = self._heads((taps_BKI * self.taps_KI).sum(1).add_(self.bias_I))
        if kernels.of(x.device).scan == "triton":
            y_BHP = kernels.triton_step(h_BHPN, x, dt, self.dt_bias_H, self.A_H, self.D_H1[:, 0], b, c)
            normed = kernels.triton_gated_norm(y_BHP.flatten(1), z, self.norm_I, self.eps, G)
            return summed(self.leave(normed), self.group)
        dt_BH = F.softplus(dt.float() + self.dt_bias_H)
        h_BHPN.mul_((dt_BH * self.A_H).exp_()[..., None, None])
        xdt = (x.float() * dt_BH.unsqueeze(-1)).view(B, G, Q, P, 1)
        h_BHPN.view(B, G, Q, P, N).addcmul_(xdt, b.float()[:, :, None, None])
        y_BHP = (h_BHPN.view(B * G, Q * P, N) @ c.float().reshape(B * G, N, 1)).view(B, G * Q, P)
        return self._leave(y_BHP, x, z)

    def _heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., I) -> x (..., H, P), B and C (..., G, N)."""
        G, Q, P, N = self.shape
        x, b, c = F.silu(convolved).split(self.parts, -1)
        return x.unflatten(-1, (G * Q, P)), b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))

    def _leave(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Adds D x, multiplies by silu(z), normalises each group and projects: (..., H, P) -> (N, U)."""
        y = torch.addcmul(y, x.float(), self.D_H1).flatten(-2)
        gated = (y * F.silu(z.float())).unflatten(-1, (self.shape[0], -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2).to(z.dtype)
        return summed(self.leave((normed * self.norm_I).flatten(0, -2)), self.group)


class Attention:
    """Causal attention without positions. Its cache: keys and values (slots, G, L, D)."""

    def __init__(self, attention: Any) -> None:
        self.enter, self.leave = Projection(attention.linear_qkv), Projection(attention.linear_proj)
        self.group, self.dim = attention.linear_proj.tp_group, attention.hidden_size_per_attention_head
        ranks, total = self.group.size(), attention.config.num_query_groups
        self.num_groups = max(total // ranks, 1)
        self.heads = attention.config.num_attention_heads // max(total, ranks)  # query heads of a group here
        # More ranks than groups cut a group. Each of them needs its key and value, and its own share of the queries.
        self.sharing = max(ranks // total, 1)
        self.number, self.place = divmod(self.group.rank(), self.sharing)

    def new_cache(self, num_slots: int, max_length: int) -> Kept:
        shape = (num_slots, self.num_groups, max_length, self.dim)
        return self.enter.weight_OI.new_zeros(shape), self.enter.weight_OI.new_zeros(shape)

    def prompts(self, x_NU: Tensor, kept: Kept, at: Prompts) -> Tensor:
        B, S = at.tokens_BS.shape
        q, k, v = self._split(x_NU)  # (N, G, heads, D)
        q, k, v = (t.flatten(1, 2).view(B, S, -1, self.dim).transpose(1, 2) for t in (q, k, v))
        for row, length in enumerate(at.lengths):
            kept[0][at.rows.start + row, :, :length] = k[row, :, S - length :]
            kept[1][at.rows.start + row, :, :length] = v[row, :, S - length :]
        is_causal = at.mask_B1SS is None
        context = F.scaled_dot_product_attention(q, k, v, at.mask_B1SS, is_causal=is_causal, enable_gqa=True)
        return summed(self.leave(context.transpose(1, 2).reshape(B * S, -1)), self.group)

    def step(self, x_BU: Tensor, kept: Kept, at: Step) -> Tensor:
        q, k, v = self._split(x_BU)
        for tensor, new in zip(kept, (k, v), strict=True):
            tensor[at.slots_B, :, at.positions_B] = new[:, :, 0]
        # The query heads of a group see the same keys, so they are the positions of one query: keys are not repeated.
        keys, values = (tensor[at.rows, :, : at.mask_B11L.shape[-1]] for tensor in kept)
        context = F.scaled_dot_product_attention(q, keys, values, at.mask_B11L)
        return summed(self.leave(context.flatten(1)), self.group)

    def _split(self, x_NU: Tensor) -> tuple[Tensor, ...]:
        """(N, U) -> queries (N, G, heads of a group, D), keys and values (N, G, 1, D)."""
        qkv = self.enter(x_NU)
        if self.sharing == 1:
            return qkv.view(len(qkv), self.num_groups, -1, self.dim).split([self.heads, 1, 1], 2)
        group = joined(qkv, self.group, 1).unflatten(1, (-1, self.heads * self.sharing + 2, self.dim))[
            :, self.number : self.number + 1
        ]
        q, k, v = group.split([self.heads * self.sharing, 1, 1], 2)
        return q[:, :, self.place * self.heads : (self.place + 1) * self.heads], k, v
