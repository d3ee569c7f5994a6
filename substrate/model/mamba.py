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
from torch.utils.checkpoint import checkpoint

from substrate.ops import kernels
from substrate.ops.fused import add_skip, conv_silu, gated_norm
from substrate.ops.scan import scan_of_channels
from substrate.ops.sequences import Packing


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
        self.is_recomputed = False  # what lies between the projections, in the backward pass
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
        if self.is_recomputed and torch.is_grad_enabled():
            normed = checkpoint(self._between, zxbcdt, packed_seq_params, use_reentrant=False, preserve_rng_state=False)
        else:
            normed = self._between(zxbcdt, packed_seq_params)
        output, _ = self.out_proj(normed)
        return output, None

    def _between(self, zxbcdt: Tensor, packing: Packing | None) -> Tensor:
        """Returns the input of the second projection from the output of the first: convolution, scan, gate and norm."""
        z_SBI, xbc_SBI, dt_SBH = zxbcdt.split(self.split_sizes, dim=-1)
        dt_SBH = F.softplus(dt_SBH.float() + self.dt_bias_H)
        y_SBI = self._scan(xbc_SBI, dt_SBH, packing)
        return gated_norm(y_SBI, z_SBI, self.norm_weight_I, self.config.layernorm_epsilon, self.num_groups)

    def _scan(self, xbc_SBI: Tensor, dt_SBH: Tensor, packing: Packing | None = None) -> Tensor:
        """Runs all tokens at once. Returns y_SBI, with the D term."""
        activated = conv_silu(xbc_SBI, self.conv_weight_I1K[:, 0], self.conv_bias_I, packing)
        A_H = -self.A_log_H.exp()
        documents = packing.document_SB if packing is not None else None
        if kernels.of(xbc_SBI.device).scan == "torch":
            sizes = self.num_heads, self.head_dim, self.num_groups
            return scan_of_channels(activated, dt_SBH, A_H, self.D_H, sizes, self.chunk_size, documents)
        x_SBHP, B_SBGN, C_SBGN = self._heads(activated)
        y_SBHP, _ = kernels.triton_scan(x_SBHP, dt_SBH, A_H, B_SBGN, C_SBGN, self.chunk_size, documents)
        return add_skip(y_SBHP, x_SBHP, self.D_H).flatten(-2)

    def _heads(self, xbc_SBI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, b, c = xbc_SBI.split(self.conv_split_sizes, dim=-1)
        groups = (self.num_groups, self.state_dim)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), b.unflatten(-1, groups), c.unflatten(-1, groups)
