"""The Mamba-2 mixer in plain torch, sharded over tensor-parallel ranks. Decoding has a form of its own (`inference/layers.py`).

A head keeps a P x N state that decays by a scalar and takes in one outer product per token (Mamba-2, arXiv:2405.21060,
eq. 1 and 6):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

`chunked_scan` computes the same y as matrix products (section 6 of the paper, "SSD"): inside a chunk a masked, decayed
attention of C against B; between chunks the recurrence over chunk states, itself a small lower-triangular product.
Nemotron-H surrounds it with (arXiv:2504.03624; the tests compare with transformers' `modeling_nemotron_h.py`):

    [z | x | B | C | dt] = in_proj(u)      [x | B | C] = silu(causal_conv([x | B | C]))      out_proj(norm(y * silu(z)))

with an RMS norm over each group of heads. A tensor-parallel rank holds whole groups, so each of the five parts of
`in_proj` is sharded by itself, the scan and the norm need no communication, and only the two projections communicate.

S sequence, B batch, U hidden size, I inner size (heads x P), H heads, G groups of heads, Q heads of a group (H = G x
Q), P head dim, N state dim, K taps of the convolution, C chunks, L positions of a chunk, T source positions of a chunk
(T = L). All sizes are this rank's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from substrate.model import kernels
from substrate.model.sequences import Packing


def chunked_scan(
    x_SBHP: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    B_SBGN: Tensor,
    C_SBGN: Tensor,
    chunk_size: int,
    document_SB: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence from a zero state over S tokens, in float32.

    dt is positive, or 0 where a token must not change the state; A is negative. Where `document_SB` changes from one
    token to the next, the state starts from zero again. Returns y_SBHP without the D term, and the state h_BHPN after
    the last token.
    """
    S, B, H, P = x_SBHP.shape
    G, N = B_SBGN.shape[2:]
    Q = H // G
    # Chunks of equal length: 130 tokens at chunk_size 64 are 3 chunks of 44 and not 3 of 64.
    num_chunks = -(-S // chunk_size)
    L = -(-S // num_chunks)

    def chunks(t: Tensor, *heads: int) -> Tensor:
        """(S, B, heads..., d) -> (B, C, heads..., L, d); zeros fill the tail, where dt = 0 keeps the state."""
        t = F.pad(t, (0, 0) * (t.dim() - 1) + (0, num_chunks * L - S))
        t = t.reshape(num_chunks, L, B, *heads, -1)
        return t.permute(2, 0, *range(3, 3 + len(heads)), 1, t.dim() - 1).contiguous()

    dt = chunks(dt_SBH.float().unsqueeze(-1), G, Q)  # (B, C, G, Q, L, 1)
    xdt = chunks(x_SBHP.float(), G, Q) * dt  # (B, C, G, Q, L, P)
    b = chunks(B_SBGN.float(), G, 1)  # (B, C, G, 1, L, N)
    c = chunks(C_SBGN.float(), G, 1)

    # Log decay from the start of the chunk to after position l, then from position t to position l >= t.
    log_decay = (dt.squeeze(-1) * A_H.view(G, Q, 1)).cumsum(-1)  # (B, C, G, Q, L)
    visible = torch.ones(L, L, dtype=torch.bool, device=dt.device).tril()
    later = torch.ones(num_chunks + 1, num_chunks, dtype=torch.bool, device=dt.device).tril(-1)
    at_end: Tensor | bool = True  # whether a token belongs to the document at its chunk's end
    at_start: Tensor | bool = True  # whether it belongs to the document at the end of the chunk before
    if document_SB is not None:
        documents = _chunked_documents(document_SB, num_chunks, L)  # (B, C, 1, 1, L)
        last = documents[..., -1:]
        visible = visible & (documents.unsqueeze(-1) == documents.unsqueeze(-2))
        # The document of the state that each chunk starts from, and of the last state.
        before = F.pad(last, (0, 0) * 3 + (1, 0), value=-1)
        at_end, at_start = documents == last, documents == before[:, :-1]
        later = later & (before[:, :, 0, 0] == last[:, :, 0, 0, 0].unsqueeze(1))[:, None, None]
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill_(~visible, -torch.inf).exp_()
    y = (c @ b.transpose(-1, -2) * between) @ xdt

    # What each chunk adds to the state, and from it the state at the start of every chunk and after the last one.
    to_end = ((log_decay[..., -1:] - log_decay).exp() * at_end).unsqueeze(-1)
    left = (xdt * to_end).transpose(-1, -2) @ b  # (B, C, G, Q, P, N)
    total = F.pad(log_decay[..., -1].cumsum(1), (0, 0, 0, 0, 1, 0)).permute(0, 2, 3, 1)  # (B, G, Q, C + 1)
    carry = (total.unsqueeze(-1) - total[..., None, 1:]).masked_fill_(~later, -torch.inf).exp_()  # (B, G, Q, C + 1, C)
    states = (carry @ left.permute(0, 2, 3, 1, 4, 5).flatten(-2)).unflatten(-1, (P, N))  # (B, G, Q, C + 1, P, N)
    entering = states[..., :-1, :, :].permute(0, 3, 1, 2, 5, 4)  # (B, C, G, Q, N, P)
    y = y + (c @ entering) * (log_decay.exp() * at_start).unsqueeze(-1)

    y_SBHP = y.permute(1, 4, 0, 2, 3, 5).reshape(num_chunks * L, B, H, P)[:S]
    return y_SBHP, states[..., -1, :, :].reshape(B, H, P, N)


def _chunked_documents(document_SB: Tensor, num_chunks: int, L: int) -> Tensor:
    """(S, B) -> (B, C, 1, 1, L); the tail of the last chunk has the last token's document."""
    tail = document_SB[-1:].expand(num_chunks * L - document_SB.shape[0], -1)
    return torch.cat([document_SB, tail]).T.unflatten(1, (num_chunks, 1, 1, L))


def causal_conv(window_SBI: Tensor, weight_I1K: Tensor, bias_I: Tensor, packing: Packing | None = None) -> Tensor:
    """Depthwise convolution of a window that starts K - 1 tokens early: (S + K - 1, B, I) -> (S, B, I).

    Taps do not reach into another document of a packing. It is a sum over taps, because `conv1d` would need sequence-major data
    transposed twice, which costs more.
    """
    K = weight_I1K.shape[-1]
    S = window_SBI.shape[0] - K + 1
    y_SBI = bias_I
    for k in range(K):
        tap_SBI = window_SBI[k : k + S]
        if packing is not None and (back := K - 1 - k):
            tap_SBI = tap_SBI * packing.has_before(back)
        y_SBI = torch.addcmul(y_SBI, tap_SBI, weight_I1K[:, 0, k])
    return y_SBI


@dataclass
class MambaMixerSubmodules:
    """Classes of the two projections, column-parallel and row-parallel."""

    in_proj: Any
    out_proj: Any


class MambaMixer(MegatronModule):
    """Replaces megatron-core's mixer, which needs mamba-ssm and Triton; it is called in the same way."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        conv_kernel: int,
        chunk_size: int,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,  # arguments that differ between the library's releases
    ) -> None:
        super().__init__(config)
        tp = pg_collection.tp.size()
        assert config.mamba_num_heads is not None
        self.layer_number = layer_number
        self.chunk_size = chunk_size
        self.num_heads = config.mamba_num_heads // tp
        self.num_groups = config.mamba_num_groups // tp
        self.head_dim = config.mamba_head_dim
        self.state_dim = config.mamba_state_dim
        inner = self.num_heads * self.head_dim
        bc = self.num_groups * self.state_dim
        self.split_sizes = [inner, inner + 2 * bc, self.num_heads]  # z, [x | B | C], dt
        self.conv_split_sizes = [inner, bc, bc]
        shared = {"config": config, "bias": False, "skip_bias_add": False, "tp_group": pg_collection.tp}
        self.in_proj = submodules.in_proj(
            d_model, sum(self.split_sizes) * tp, gather_output=False, init_method=config.init_method, **shared
        )
        self.out_proj = submodules.out_proj(
            inner * tp, d_model, input_is_parallel=True, init_method=config.output_layer_init_method, **shared
        )
        dtype = config.params_dtype
        self.conv_weight_I1K = nn.Parameter(torch.empty(inner + 2 * bc, 1, conv_kernel, dtype=dtype))
        self.conv_bias_I = nn.Parameter(torch.empty(inner + 2 * bc, dtype=dtype))
        self.norm_weight_I = nn.Parameter(torch.empty(inner, dtype=dtype))
        # The recurrence's own parameters stay in float32, because decays multiply over the whole sequence.
        self.A_log_H = nn.Parameter(torch.empty(self.num_heads))
        self.D_H = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias_H = nn.Parameter(torch.empty(self.num_heads))

    def forward(
        self, u_SBU: Tensor, inference_context: Any = None, packed_seq_params: Any = None
    ) -> tuple[Tensor, None]:
        """u_SBU -> (output_SBU, no bias). With sequence parallelism S is this rank's part; between the projections it is whole.

        packed_seq_params: a `Packing`, whose documents each start from an empty window and a zero state, or None.
        """
        zxbcdt, _ = self.in_proj(u_SBU)
        z_SBI, xbc_SBI, dt_SBH = zxbcdt.split(self.split_sizes, dim=-1)
        dt_SBH = F.softplus(dt_SBH.float() + self.dt_bias_H)
        y_SBI = self._scan(xbc_SBI, dt_SBH, packed_seq_params)
        output, _ = self.out_proj(self._gated_norm(y_SBI, z_SBI))
        return output, None

    def _scan(self, xbc_SBI: Tensor, dt_SBH: Tensor, packing: Packing | None = None) -> Tensor:
        """Runs all tokens at once. Returns y_SBI, with the D term."""
        taps = self.conv_weight_I1K.shape[-1]
        window = F.pad(xbc_SBI, (0, 0, 0, 0, taps - 1, 0))
        convolved = causal_conv(window, self.conv_weight_I1K, self.conv_bias_I, packing)
        x_SBHP, B_SBGN, C_SBGN = self._heads(convolved)
        A_H = -self.A_log_H.exp()
        scan = kernels.triton_scan if kernels.of(x_SBHP.device).scan == "triton" else chunked_scan
        documents = packing.document_SB if packing is not None else None
        y_SBHP, _ = scan(x_SBHP, dt_SBH, A_H, B_SBGN, C_SBGN, self.chunk_size, documents)
        y_SBHP = torch.addcmul(y_SBHP.float(), x_SBHP.float(), self.D_H.unsqueeze(-1))
        return y_SBHP.flatten(-2)

    def _heads(self, xbc_SBI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, b, c = F.silu(xbc_SBI).split(self.conv_split_sizes, dim=-1)
        groups = (self.num_groups, self.state_dim)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def _gated_norm(self, y_SBI: Tensor, z_SBI: Tensor) -> Tensor:
        """RMS norm of y * silu(z) within each group, in float32, with one weight per channel."""
        gated = (y_SBI * F.silu(z_SBI.float())).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.config.layernorm_epsilon).flatten(-2)
        return self.norm_weight_I * normed.to(z_SBI.dtype)
