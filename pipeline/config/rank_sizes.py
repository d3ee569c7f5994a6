"""Compute the bytes of one rank's parts: weights, adapter, caches, and the activations and working memory of each kind of layer.

The activations are those of a frozen model with adapters. The formulas follow Mamba-2 (arXiv:2405.21060) with chunks of L tokens, and
sequence parallelism and recomputation as in arXiv:2205.05198. Private helpers count per token of a micro-batch and per layer.
footprint.py adds the parts up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.config.model_size import Model, lora_shapes, mamba_sizes

FLOAT = 4  # bytes
LOGITS_BYTES = 2**28  # largest piece of the logits that a rank computes at once: substrate/model/losses.py


@dataclass(frozen=True)
class Rank:
    """A model and the place of one rank in a layout; `stage` counts pipeline stages from 0."""

    model: Model
    tp: int
    ep: int
    pp: int
    stage: int
    scan: str = "torch"  # kernel of the Mamba layers: torch, or triton (mamba-ssm), which keeps no decays and no states

    @property
    def element(self) -> int:
        """Bytes of one weight or activation."""
        return 2 if self.model["dtype"] == "bfloat16" else FLOAT

    @property
    def layers(self) -> str:
        """The letters of the layers on this rank's stage."""
        size = len(self.model["pattern"]) // self.pp
        return str(self.model["pattern"][self.stage * size : (self.stage + 1) * size])

    @property
    def is_last(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def head_widths(self) -> tuple[int, int]:
        """(width of the queries, width of the keys or values) on this rank; more ranks than groups replicate the groups."""
        groups = max(1, self.model["num_query_groups"] // self.tp)
        width = self.model["attention_head_dim"]
        return self.model["num_attention_heads"] * width // self.tp, groups * width

    @property
    def experts(self) -> tuple[int, int]:
        """(routed experts on this rank, hidden units of each on this rank)."""
        return self.model["num_experts"] // self.ep, self.model["moe_ffn_size"] // (self.tp if self.ep == 1 else 1)


def cache_bytes(rank: Rank) -> int:
    """Return the bytes of one sequence's cache: keys and values at its maximal length, and the scans' windows and states."""
    model = rank.model
    inner, channels = _mamba_widths(rank)
    _, key_width = rank.head_widths
    attention = 2 * key_width * model["max_sequence_length"] * rank.element
    mamba = (model["mamba_conv_kernel"] - 1) * channels * rank.element + inner * model["mamba_state_dim"] * FLOAT
    return rank.layers.count("*") * attention + rank.layers.count("M") * mamba


def weights_bytes(rank: Rank) -> int:
    """Return the bytes of the base weights on this rank, the routers' buffers included."""
    model, hidden = rank.model, rank.model["hidden_size"]
    vocabulary = model["vocab_size"] // rank.tp * hidden
    elements = (vocabulary if rank.stage == 0 else 0) + (vocabulary + hidden if rank.is_last else 0)
    floats = 0  # elements that are float32 whatever the model's type
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
    """Return (elements of the factors, elements of the masks, number of factors) on this rank.

    size: rank of LoRA. is_full: count changes of whole weight matrices (substrate/model/full.py) instead of low-rank factors. Raises
    ConfigError for an unknown target.
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
                if is_full or len(weights) > 1:  # the rows of a fused weight belong to several modules
                    masks += times * width_out * (1 if is_full else size * active)
                number += times * (1 if is_full else 2)
    return factors, masks, number


def _modules(rank: Rank) -> dict[str, list[tuple[tuple[str, ...], int, int, int]]]:
    """List by layer kind: (targets in one matrix, its inputs on this rank, its outputs on this rank, matrices per layer)."""
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


def saved_bytes(rank: Rank, kind: str, tokens: int, lora: Mapping[str, Any], *, is_selective: bool = False) -> int:
    """Return the bytes that one layer saves for its backward pass, for a micro-batch of `tokens` tokens.

    is_selective: what lies between the projections of a Mamba layer is not saved (substrate/model/mamba.py).
    """
    model, element, targets = rank.model, rank.element, set(lora["targets"])
    hidden, is_full = model["hidden_size"], lora.get("is_full", False)
    size = 0 if is_full else lora["rank"]
    outside = hidden * element // rank.tp + FLOAT  # the norm's input, and its scale
    inside, fixed = 0.0, 0
    for weights, width_in, width_out, copies in _modules(rank)[kind]:
        active = len(targets & set(weights))
        routed = weights[0].startswith("experts.")
        share = _expert_rows(rank) / copies if routed else 1
        if active:
            # Inputs and low-rank products, or in float32 the changed weight instead of these (substrate/ops/low_rank.py).
            rows = tokens * share
            is_merged = is_full or (element == FLOAT and rows * (width_in + width_out) > width_in * width_out)
            inside += copies * share * element * (width_in + (0 if is_merged else active * size))
            fixed += copies * width_out * width_in * element if is_merged else 0
    if kind == "M":
        inside += _projected(rank) if is_selective else _projected(rank) + _between_saved(rank)
    elif kind == "*":
        query, key = rank.head_widths
        inside += element * (2 * query + 2 * key) + FLOAT * model["num_attention_heads"] // rank.tp
    else:
        num_experts, units = rank.experts
        top_k = model["moe_top_k"]
        inside += element * model["moe_shared_expert_ffn_size"] // rank.tp + element * units * _expert_rows(rank)
        # Scores, and of each chosen expert its weights, number, place and row; the library's dispatcher also keeps its map.
        inside += (9 * model["num_experts"] if rank.ep > 1 else FLOAT * model["num_experts"]) * _gathered(rank)
        inside += 40 * top_k * _gathered(rank)
    return int(tokens * (outside + inside) + fixed)


def cast_bytes(rank: Rank, size: int, targets: Sequence[str]) -> int:
    """Return the bytes of the factors as the products take them: B scaled, and of a fused weight for each block, and A where it is cast."""
    total = 0
    for kind, modules in _modules(rank).items():
        for weights, width_in, width_out, copies in modules:
            active = len(set(weights) & set(targets))
            times = copies * (rank.layers.count(kind) if kind else int(rank.is_last))
            wide = width_out + (width_in if rank.element < FLOAT else 0)
            total += times * active * size * wide * rank.element
    return total


def between_bytes(rank: Rank, tokens: int) -> int:
    """Return the bytes that a Mamba layer keeps and needs between its projections, while they are computed again."""
    return int(tokens * _between_saved(rank)) + transient_bytes(rank, "M", tokens)


def _projected(rank: Rank) -> int:
    """Return z, [x | B | C] and dt of a token, the output of a Mamba layer's first projection."""
    inner, channels = _mamba_widths(rank)
    return rank.element * (inner + channels + rank.model["mamba_num_heads"] // rank.tp)


def _between_saved(rank: Rank) -> int:
    """Return what the convolution, the scan and the gated norm save; in torch the L x L blocks of decays are the largest part."""
    model, element = rank.model, rank.element
    inner, channels = _mamba_widths(rank)
    heads, groups = model["mamba_num_heads"] // rank.tp, model["mamba_num_groups"] // rank.tp
    if rank.scan == "triton":
        # The convolution before its SiLU, [x | B | C] after it, y, a copy of z; y with the D term for the norm; steps and decays.
        return element * (2 * channels + 2 * inner) + FLOAT * (inner + 3 * heads + groups)
    chunk, state = model["mamba_chunk_size"], model["mamba_state_dim"]
    blocks = heads * chunk + 2 * groups * state + 2 * inner * state // chunk  # decays, B and C, states
    rows = 4 * inner + 4 * heads + groups  # input and output of the scan and of the norm; steps and decays; scales
    return FLOAT * (blocks + rows) + element * channels  # the convolution before its SiLU


def transient_bytes(rank: Rank, kind: str, tokens: int) -> int:
    """Return the bytes that one layer's backward pass needs beyond the saved ones. The formula was fitted to measurements with torch's scan."""
    if kind != "M":
        return 3 * FLOAT * rank.model["hidden_size"] * tokens
    inner, _ = _mamba_widths(rank)
    heads, chunk = rank.model["mamba_num_heads"] // rank.tp, rank.model["mamba_chunk_size"]
    if rank.scan == "triton":  # states of the chunks and their gradients, products of B and C, gradients of x and y
        products = rank.model["mamba_num_groups"] // rank.tp * chunk
        return FLOAT * tokens * (products + 3 * inner + 3 * inner * rank.model["mamba_state_dim"] // chunk)
    return FLOAT * tokens * (heads * chunk + 2 * inner + 5 * inner * rank.model["mamba_state_dim"] // (2 * chunk))


def logits_bytes(rank: Rank, tokens: int) -> int:
    """Return the bytes of one piece of the logits in float32."""
    return min(LOGITS_BYTES, FLOAT * tokens * rank.model["vocab_size"] // rank.tp)


def _mamba_widths(rank: Rank) -> tuple[int, int]:
    """Return (inner width, channels of the convolution [x | B | C]) on this rank."""
    inner, projected = mamba_sizes(rank.model)
    return inner // rank.tp, (projected - inner - rank.model["mamba_num_heads"]) // rank.tp


def _gathered(rank: Rank) -> float:
    """Return how many micro-batches a rank gathers before the experts: those of all ranks that share the experts."""
    return max(1.0, rank.ep / rank.tp)


def _expert_rows(rank: Rank) -> float:
    """Return the rows per token of the micro-batch that this rank's experts get, with balanced routing."""
    return float(rank.model["moe_top_k"] * _gathered(rank) / rank.ep)
