"""What one rank of a layout holds of a model, in bytes: weights, adapter, caches, and what each kind of layer keeps and needs.

Activations are those that a frozen model with adapters keeps; sizes by Mamba-2 (arXiv:2405.21060) with chunks of L tokens, and by
sequence parallelism and recomputation as in arXiv:2205.05198. Per token of a micro-batch and layer unless a name says otherwise.
footprint.py adds them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.config.model_size import Model, lora_shapes, mamba_sizes

FLOAT = 4  # bytes
LOGITS_BYTES = 2**28  # one piece of the logits on a rank: substrate/model/losses.py


@dataclass(frozen=True)
class Rank:
    """A model and the place of one rank in a layout."""

    model: Model
    tp: int
    ep: int
    pp: int
    stage: int

    @property
    def element(self) -> int:
        return 2 if self.model["dtype"] == "bfloat16" else FLOAT

    @property
    def layers(self) -> str:
        size = len(self.model["pattern"]) // self.pp
        return str(self.model["pattern"][self.stage * size : (self.stage + 1) * size])

    @property
    def is_last(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def head_widths(self) -> tuple[int, int]:
        """Widths of the queries, and of keys or values, here; beyond their number groups are replicated."""
        groups = max(1, self.model["num_query_groups"] // self.tp)
        width = self.model["attention_head_dim"]
        return self.model["num_attention_heads"] * width // self.tp, groups * width

    @property
    def experts(self) -> tuple[int, int]:
        """(routed experts here, hidden units of each here)."""
        return self.model["num_experts"] // self.ep, self.model["moe_ffn_size"] // (self.tp if self.ep == 1 else 1)


def cache_bytes(rank: Rank) -> int:
    """Of one sequence while it is decoded: keys and values of its longest form, windows and states of the scans."""
    model = rank.model
    inner, channels = _mamba_widths(rank)
    _, key_width = rank.head_widths
    attention = 2 * key_width * model["max_sequence_length"] * rank.element
    mamba = (model["mamba_conv_kernel"] - 1) * channels * rank.element + inner * model["mamba_state_dim"] * FLOAT
    return rank.layers.count("*") * attention + rank.layers.count("M") * mamba


def weights_bytes(rank: Rank) -> int:
    """The base on this rank, buffers of the routers included."""
    model, hidden = rank.model, rank.model["hidden_size"]
    vocabulary = model["vocab_size"] // rank.tp * hidden
    elements = (vocabulary if rank.stage == 0 else 0) + (vocabulary + hidden if rank.is_last else 0)
    floats = 0  # kept in float32 whatever the model's type
    for kind in rank.layers:
        elements += hidden
        if kind == "M":
            inner, channels = _mamba_widths(rank)
            heads = model["mamba_num_heads"] // rank.tp
            elements += (
                hidden * (inner + channels + heads)
                + channels * (model["mamba_conv_kernel"] + 1)
                + inner
                + inner * hidden
            )
            floats += 3 * heads
        elif kind == "*":
            query, key = rank.head_widths
            elements += hidden * (2 * query + 2 * key)
        else:
            num_experts, units = rank.experts
            elements += model["num_experts"] * hidden + num_experts * 2 * hidden * units
            elements += 2 * hidden * model["moe_shared_expert_ffn_size"] // rank.tp
            floats += 2 * model["num_experts"]  # correction bias, and the library's count of tokens
    return elements * rank.element + floats * FLOAT


def adapter_elements(rank: Rank, size: int, targets: Sequence[str], *, is_full: bool = False) -> tuple[int, int, int]:
    """(elements of the factors, of the masks, number of factors) on this rank. Raises ConfigError for an unknown target.

    is_full: of the changes of whole weights (substrate/model/full.py), one a matrix.
    """
    known = lora_shapes(rank.model)
    if unknown := [target for target in targets if target not in known]:
        raise ConfigError(f"LoRA target {unknown[0]!r} is not known", f"Valid: {', '.join(known)}")
    factors = masks = number = 0
    for kind, modules in _modules(rank).items():
        for weights, width_in, width_out, copies in modules:
            active = len(set(weights) & set(targets))
            if active:
                times = copies * (rank.layers.count(kind) if kind else int(rank.is_last))
                factors += times * (width_in * width_out if is_full else size * (active * width_in + width_out))
                masks += times * width_out * (1 if is_full else size * active)
                number += times * (1 if is_full else 2)
    return factors, masks, number


def _modules(rank: Rank) -> dict[str, list[tuple[tuple[str, ...], int, int, int]]]:
    """By layer kind: (targets in one matrix, its inputs here, its outputs here, matrices a layer)."""
    model, hidden = rank.model, rank.model["hidden_size"]
    inner, channels = _mamba_widths(rank)
    query, key = rank.head_widths
    num_experts, units = rank.experts
    shared = model["moe_shared_expert_ffn_size"] // rank.tp
    return {
        "*": [(("q_proj", "k_proj", "v_proj"), hidden, query + 2 * key, 1), (("o_proj",), query, hidden, 1)],
        "M": [(("in_proj",), hidden, inner + channels + model["mamba_num_heads"] // rank.tp, 1), (("out_proj",), inner, hidden, 1)],
        "E": [(("shared_experts.up_proj",), hidden, shared, 1), (("shared_experts.down_proj",), shared, hidden, 1),
              (("experts.up_proj",), hidden, units, num_experts), (("experts.down_proj",), units, hidden, num_experts)],
        "": [(("lm_head",), hidden, model["vocab_size"] // rank.tp, 1)],
    }  # fmt: skip


def saved_bytes(rank: Rank, kind: str, tokens: int, lora: Mapping[str, Any]) -> int:
    """What one layer keeps for its backward pass, of `tokens` tokens of a micro-batch."""
    model, element, targets = rank.model, rank.element, set(lora["targets"])
    hidden, is_full = model["hidden_size"], lora.get("is_full", False)
    size = 0 if is_full else lora["rank"]
    outside = hidden * FLOAT // rank.tp + FLOAT  # what the norm sees, in float32, and its scale
    inside, fixed = 0.0, 0
    for weights, width_in, width_out, copies in _modules(rank)[kind]:
        active = len(targets & set(weights))
        routed = weights[0].startswith("experts.")
        share = _expert_rows(rank) / copies if routed else 1
        if (
            active
        ):  # inputs, low-rank products, and the wide B in float32 and in the model's type; or the changed weight
            inside += copies * share * (element * (width_in + active * size))
            fixed += copies * width_out * int(width_in * element if is_full else active * size * 2 * FLOAT)
    if kind == "M":
        inside += _mamba_saved(rank)
    elif kind == "*":
        query, key = rank.head_widths
        inside += element * (2 * query + 2 * key) + FLOAT * model["num_attention_heads"] // rank.tp
    else:
        num_experts, units = rank.experts
        top_k = model["moe_top_k"]
        inside += element * model["moe_shared_expert_ffn_size"] // rank.tp + 2 * element * units * _expert_rows(rank)
        inside += (9 * model["num_experts"] + 24 * top_k) * _gathered(rank)
    return int(tokens * (outside + inside) + fixed)


def _mamba_saved(rank: Rank) -> int:
    """Of the convolution and of the chunked scan, whose L x L blocks of decays are the largest."""
    model, element = rank.model, rank.element
    inner, channels = _mamba_widths(rank)
    heads, groups = model["mamba_num_heads"] // rank.tp, model["mamba_num_groups"] // rank.tp
    chunk, state = model["mamba_chunk_size"], model["mamba_state_dim"]
    blocks = 2 * heads * chunk + 2 * heads * state + groups * chunk + 2 * groups * state + 2 * inner * state // chunk
    gate = 2 * FLOAT * inner if element == FLOAT else 4 * FLOAT * inner  # z, in the model's type and gated
    projected = element * (inner + channels + heads) if element == FLOAT else 0
    return FLOAT * (blocks + 5 * inner + 7 * heads + groups) + gate + projected + element * channels


def transient_bytes(rank: Rank, kind: str, tokens: int) -> int:
    """What the backward pass of one layer holds beyond what the forward pass saved; measured, not derived."""
    if kind != "M":
        return 3 * FLOAT * rank.model["hidden_size"] * tokens
    inner, _ = _mamba_widths(rank)
    heads, chunk = rank.model["mamba_num_heads"] // rank.tp, rank.model["mamba_chunk_size"]
    return FLOAT * tokens * (heads * chunk + inner + 5 * inner * rank.model["mamba_state_dim"] // (2 * chunk))


def logits_bytes(rank: Rank, tokens: int) -> int:
    """Of one piece, float32, and its softmax."""
    return min(LOGITS_BYTES, FLOAT * tokens * rank.model["vocab_size"] // rank.tp)


def _mamba_widths(rank: Rank) -> tuple[int, int]:
    """(inner width, channels of the convolution [x | B | C]) here."""
    inner, projected = mamba_sizes(rank.model)
    return inner // rank.tp, (projected - inner - rank.model["mamba_num_heads"]) // rank.tp


def _gathered(rank: Rank) -> float:
    """Micro-batches whose tokens come together on a rank before the experts: those of all ranks that share them."""
    return max(1.0, rank.ep / rank.tp)


def _expert_rows(rank: Rank) -> float:
    """Rows that the experts here see a token of the micro-batch, with balanced routing."""
    return float(rank.model["moe_top_k"] * _gathered(rank) / rank.ep)
