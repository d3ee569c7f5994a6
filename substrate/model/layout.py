"""Where every tensor of a sharded model is in the published checkpoint: its name, and the part of it that a rank holds.

Initialisation, loading, saving and adapters all use this one description, so they cannot disagree about a shard. A
`Placement` means: stack the named tensors along dim 0, put the rows in `order`, cut dim `dim` into as many equal pieces
as `group` has ranks; piece `rank` is what the module holds. Two orders are not the identity (here for 2 ranks):

    in_proj      z | x | B | C | dt              ->  z0 x0 B0 C0 dt0 | z1 x1 B1 C1 dt1    every part is cut by itself
    linear_qkv   q_proj; k_proj; v_proj stacked  ->  q q k v | q q k v                    one block per query group

A shard that was cut without the first order would load at another number of ranks without an error, and be wrong.

Names are those of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B: prefix `backbone.`, one tensor for each routed expert.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from substrate.model.config import ModelConfig


@dataclass(frozen=True)
class Placement:
    """One tensor of a module on this rank, and where it belongs in the whole tensors."""

    module: nn.Module
    attribute: str
    names: tuple[str, ...]  # whole tensors, stacked along dim 0 in this order
    sizes: tuple[int, ...]  # rows of each of them
    group: dist.ProcessGroup  # the ranks over which it is cut
    dim: int | None  # the dimension that is cut; None: every rank holds all of it
    order: Tensor | None = None  # int64 rows of the stack in the order in which they are cut; None: as stacked
    routed: bool = False  # whether it is a routed expert's, whose replicas are on the ranks with the same expert only

    @property
    def tensor(self) -> Tensor:
        """The module's own tensor: a parameter, or the router's bias buffer."""
        return getattr(self.module, self.attribute)

    def of(self, tensor: Tensor, prefix: str) -> "Placement":
        """Returns the placement of another tensor of the same shape, such as an optimizer's moment, with prefixed names."""
        holder: Any = SimpleNamespace(**{self.attribute: tensor})
        return replace(self, module=holder, names=tuple(prefix + name for name in self.names))

    def shape(self, index: int) -> tuple[int, ...]:
        """Returns the shape of the whole tensor `names[index]`."""
        rest = list(self.tensor.shape[1:])
        if self.dim == 1:
            rest[0] *= self.group.size()
        return (self.sizes[index], *rest)

    def local(self, whole: Tensor) -> Tensor:
        """Returns this rank's part of the stacked whole tensors."""
        if self.dim is None:
            return whole
        if self.order is not None:
            whole = whole[self.order]
        return whole.chunk(self.group.size(), self.dim)[self.group.rank()]

    def pieces(self) -> Iterator[tuple[int, slice, slice, slice]]:
        """Yields the pieces of this rank's part: (index into `names`, its rows, its columns, the local rows they become).

        Each piece is contiguous on both sides, so that a file can be read by slices.
        """
        rank, size = self.group.rank(), self.group.size()
        columns, rows = slice(None), torch.arange(sum(self.sizes))
        if self.dim == 1:
            width = self.tensor.shape[1]
            columns = slice(rank * width, (rank + 1) * width)
        elif self.dim == 0:
            rows = (rows if self.order is None else self.order).chunk(size)[rank]
        ends = torch.tensor(self.sizes).cumsum(0)
        owners = torch.searchsorted(ends, rows, right=True)
        breaks = ((rows.diff() != 1) | (owners.diff() != 0)).nonzero().flatten() + 1
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            name = int(owners[start])
            first = int(rows[start]) - (int(ends[name]) - self.sizes[name])
            yield name, slice(first, first + stop - start), columns, slice(start, stop)

    def whole(self) -> tuple[Tensor, ...]:
        """Gathers the whole tensors, one per name, on every rank and on the module's device. A collective call."""
        stacked = self.tensor.detach()
        if self.dim is not None and self.group.size() > 1:
            parts = [torch.empty_like(stacked) for _ in range(self.group.size())]
            dist.all_gather(parts, stacked.contiguous(), group=self.group)
            stacked = torch.cat(parts, self.dim)
        if self.order is not None:
            stacked = torch.empty_like(stacked).index_copy_(0, self.order.to(stacked.device), stacked)
        return stacked.split(self.sizes)

    def local_parts(self) -> Tensor:
        """Returns for each local row the index of its name in `names` (int64)."""
        parts = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        return self.local(parts) if self.dim == 0 else parts


def layout(model: Any) -> Iterator[Placement]:
    """Yields every tensor of this rank's stage of a model from `build_model`, in the order of the layers."""
    config: ModelConfig = model.architecture
    tp, pp = model.pg_collection.tp, model.pg_collection.pp
    vocab = (config.vocab_size,)
    if model.pre_process:
        yield Placement(model.embedding.word_embeddings, "weight", ("backbone.embeddings.weight",), vocab, tp, 0)
    mixers = {"M": _mamba, "*": _attention, "E": _moe}
    first = pp.rank() * len(model.decoder.layers)
    for number, layer in enumerate(model.decoder.layers, start=first):
        yield from mixers[config.pattern[number]](config, model.pg_collection, layer, f"backbone.layers.{number}.")
    if model.post_process:
        width = (config.hidden_size,)
        yield Placement(model.decoder.final_norm, "weight", ("backbone.norm_f.weight",), width, tp, None)
        yield Placement(model.output_layer, "weight", ("lm_head.weight",), vocab, tp, 0)


def named_generator(seed: int, name: str) -> torch.Generator:
    """Returns a CPU generator that depends on the seed and a tensor's name only, not on ranks or earlier draws."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _mamba(config: ModelConfig, groups: Any, layer: Any, prefix: str) -> Iterator[Placement]:
    tp, mixer = groups.tp, layer.mixer
    inner, bc, heads = config.mamba_inner_size, config.mamba_bc_size, config.mamba_num_heads
    yield Placement(layer.norm, "weight", (f"{prefix}norm.weight",), (config.hidden_size,), tp, None)
    for module, attribute, name, parts in [
        (mixer.in_proj, "weight", "in_proj.weight", (inner, inner, bc, bc, heads)),  # z, x, B, C, dt
        (mixer, "conv_weight_I1K", "conv1d.weight", (inner, bc, bc)),
        (mixer, "conv_bias_I", "conv1d.bias", (inner, bc, bc)),
        (mixer, "A_log_H", "A_log", (heads,)),
        (mixer, "D_H", "D", (heads,)),
        (mixer, "dt_bias_H", "dt_bias", (heads,)),
        (mixer, "norm_weight_I", "norm.weight", (inner,)),
    ]:
        order = _interleave(parts, tp.size()) if len(parts) > 1 else None
        yield Placement(module, attribute, (f"{prefix}mixer.{name}",), (sum(parts),), tp, 0, order)
    yield Placement(mixer.out_proj, "weight", (f"{prefix}mixer.out_proj.weight",), (config.hidden_size,), tp, 1)


def _attention(config: ModelConfig, groups: Any, layer: Any, prefix: str) -> Iterator[Placement]:
    tp, attention = groups.tp, layer.self_attention
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_query_groups * config.attention_head_dim
    names = tuple(f"{prefix}mixer.{part}_proj.weight" for part in "qkv")
    order = _interleave((queries, keys, keys), config.num_query_groups)
    yield Placement(layer.input_layernorm, "weight", (f"{prefix}norm.weight",), (config.hidden_size,), tp, None)
    yield Placement(attention.linear_qkv, "weight", names, (queries, keys, keys), tp, 0, order)
    yield Placement(attention.linear_proj, "weight", (f"{prefix}mixer.o_proj.weight",), (config.hidden_size,), tp, 1)


def _moe(config: ModelConfig, groups: Any, layer: Any, prefix: str) -> Iterator[Placement]:
    hidden, tp, moe = (config.hidden_size,), groups.tp, layer.mlp
    gate = f"{prefix}mixer.gate."
    yield Placement(layer.pre_mlp_layernorm, "weight", (f"{prefix}norm.weight",), hidden, tp, None)
    yield Placement(moe.router, "weight", (f"{gate}weight",), (config.num_experts,), tp, None)
    yield Placement(moe.router, "expert_bias", (f"{gate}e_score_correction_bias",), (config.num_experts,), tp, None)
    always = [("shared_experts", moe.shared_experts, config.moe_shared_expert_ffn_size, tp)]
    chosen = [
        (f"experts.{number}", expert, config.moe_ffn_size, groups.expt_tp)
        for number, expert in zip(moe.local_expert_indices, moe.experts.local_experts, strict=True)
    ]
    for name, mlp, size, group in always + chosen:
        routed = mlp is not moe.shared_experts
        up, down = (f"{prefix}mixer.{name}.{part}_proj.weight" for part in ("up", "down"))
        yield Placement(mlp.linear_fc1, "weight", (up,), (size,), group, 0, routed=routed)
        yield Placement(mlp.linear_fc2, "weight", (down,), hidden, group, 1, routed=routed)


def _interleave(parts: tuple[int, ...], num_pieces: int) -> Tensor:
    """Orders the rows of stacked parts so that each of `num_pieces` pieces has an equal share of every part."""
    shares = [rows.chunk(num_pieces) for rows in torch.arange(sum(parts)).split(parts)]
    return torch.cat([share[piece] for piece in range(num_pieces) for share in shares])
