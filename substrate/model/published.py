"""Names, shapes and types of the tensors in a published Nemotron-H checkpoint, derived from its configuration.

    backbone.embeddings.weight                          backbone.layers.1.mixer.experts.7.up_proj.weight

Names are those of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B. The rest of this package uses the same names.
"""

import math
from collections.abc import Iterator

import torch

from substrate.model.config import ModelConfig

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def published_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns name -> (shape, safetensors dtype) of every tensor of the whole model, in the order of the layers.

    The recurrence's own parameters and the router's bias are float32 whatever the model's type.
    """
    hidden, dtype = config.hidden_size, SAFETENSORS_DTYPES[config.torch_dtype]
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    tensors["backbone.embeddings.weight"] = ((config.vocab_size, hidden), dtype)
    mixers = {"M": _mamba, "*": _attention, "E": _moe}
    for number, letter in enumerate(config.pattern):
        prefix = f"backbone.layers.{number}."
        tensors[f"{prefix}norm.weight"] = ((hidden,), dtype)
        for name, shape, kept in mixers[letter](config):
            tensors[f"{prefix}mixer.{name}"] = (shape, kept or dtype)
    tensors["backbone.norm_f.weight"] = ((hidden,), dtype)
    tensors["lm_head.weight"] = ((config.vocab_size, hidden), dtype)
    return tensors


def _mamba(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    inner, bc, heads = config.mamba_inner_size, config.mamba_bc_size, config.mamba_num_heads
    channels = inner + 2 * bc
    yield "in_proj.weight", (inner + channels + heads, config.hidden_size), None
    yield "conv1d.weight", (channels, 1, config.mamba_conv_kernel), None
    yield "conv1d.bias", (channels,), None
    for name in ("A_log", "D", "dt_bias"):
        yield name, (heads,), "F32"
    yield "norm.weight", (inner,), None
    yield "out_proj.weight", (config.hidden_size, inner), None


def _attention(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_query_groups * config.attention_head_dim
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{name}_proj.weight", (rows, config.hidden_size), None
    yield "o_proj.weight", (config.hidden_size, queries), None


def _moe(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    yield "gate.weight", (config.num_experts, config.hidden_size), None
    yield "gate.e_score_correction_bias", (config.num_experts,), "F32"
    sizes = {f"experts.{number}": config.moe_ffn_size for number in range(config.num_experts)}
    for name, size in {**sizes, "shared_experts": config.moe_shared_expert_ffn_size}.items():
        yield f"{name}.up_proj.weight", (size, config.hidden_size), None
        yield f"{name}.down_proj.weight", (config.hidden_size, size), None


def num_published_parameters(config: ModelConfig) -> int:
    """Returns the number of elements of all tensors: 31.578 billion for Nemotron-3-Nano-30B-A3B."""
    return sum(math.prod(shape) for shape, _ in published_tensors(config).values())
