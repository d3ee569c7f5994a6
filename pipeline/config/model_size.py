"""Count a model's parameters and check its parallel layout, from `hydra_conf/model/*.yaml` alone.

The counts follow the published architecture (Nemotron-H, arXiv 2504.03624), and a test compares them with the model that the substrate
builds. The layout rules are Megatron's: tensor parallelism splits heads, groups and vocabulary, expert parallelism splits the experts
over all other ranks, and the pipeline splits the layers evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.campaign.errors import ConfigError

Model = Mapping[str, Any]
"""The keys of hydra_conf/model; `pattern` has one letter per layer."""
LAYERS = {"M": "mamba", "E": "moe", "*": "attention"}
MOMENTS = {"adamw": 2, "adam": 2, "adamax": 2, "adan": 4, "adagrad": 1, "rmsprop": 1, "sgd": 1}
"""Tensors of a parameter's shape that each optimizer of `recipe.optimizer` keeps."""


class Matched(NamedTuple):
    """What a LoRA target matches in a model."""

    kind: str  # of layer: a value of LAYERS, or "output" for lm_head
    layers: int
    modules: int  # a layer of routed experts has one for each expert


def mamba_sizes(model: Model) -> tuple[int, int]:
    """Return (inner width, width of in_proj's output [z | x | B | C | dt])."""
    inner = model["mamba_num_heads"] * model["mamba_head_dim"]
    states = 2 * model["mamba_num_groups"] * model["mamba_state_dim"]
    return inner, 2 * inner + states + model["mamba_num_heads"]


def num_layer_parameters(model: Model, kind: str) -> int:
    """Return the number of parameters of one layer of this kind (a key of LAYERS), its norm included."""
    hidden = model["hidden_size"]
    if kind == "M":
        inner, projected = mamba_sizes(model)
        conv_channels = projected - inner - model["mamba_num_heads"]
        conv = conv_channels * (model["mamba_conv_kernel"] + 1)  # weight and bias
        per_head = 3 * model["mamba_num_heads"]  # A_log, D, dt_bias
        return hidden + hidden * projected + conv + per_head + inner + inner * hidden
    if kind == "*":
        query = model["num_attention_heads"] * model["attention_head_dim"]
        key_value = 2 * model["num_query_groups"] * model["attention_head_dim"]
        return hidden + hidden * (query + key_value) + query * hidden
    router = model["num_experts"] * (hidden + 1)  # weight and correction bias
    experts = model["num_experts"] * 2 * hidden * model["moe_ffn_size"]
    return hidden + router + experts + 2 * hidden * model["moe_shared_expert_ffn_size"]


def num_parameters(model: Model) -> int:
    """Return the number of all parameters, the routers' correction biases included and the embeddings untied."""
    layers = sum(num_layer_parameters(model, kind) for kind in model["pattern"])
    return layers + 2 * model["vocab_size"] * model["hidden_size"] + model["hidden_size"]


def lora_shapes(model: Model) -> dict[str, tuple[str, int, int]]:
    """Map each LoRA target, by its published module name, to (layer kind, input width, output width). lm_head has the kind ""."""
    hidden = model["hidden_size"]
    inner, projected = mamba_sizes(model)
    query = model["num_attention_heads"] * model["attention_head_dim"]
    key_value = model["num_query_groups"] * model["attention_head_dim"]
    shared, routed = model["moe_shared_expert_ffn_size"], model["moe_ffn_size"]
    return {
        "q_proj": ("*", hidden, query),
        "k_proj": ("*", hidden, key_value),
        "v_proj": ("*", hidden, key_value),
        "o_proj": ("*", query, hidden),
        "in_proj": ("M", hidden, projected),
        "out_proj": ("M", inner, hidden),
        "shared_experts.up_proj": ("E", hidden, shared),
        "shared_experts.down_proj": ("E", shared, hidden),
        "experts.up_proj": ("E", hidden, routed),
        "experts.down_proj": ("E", routed, hidden),
        "lm_head": ("", hidden, model["vocab_size"]),
    }


def peft_modules(model: Model, targets: list[str]) -> list[str]:
    """Return `target_modules` of an adapter file, sorted. PEFT matches the ends of names, so each routed expert has its own entry."""
    names = []
    for target in targets:
        experts = range(model["num_experts"]) if target.startswith("experts.") else ()
        names += [target.replace("experts.", f"experts.{number}.") for number in experts] or [target]
    return sorted(names)


def matched_modules(model: Model, targets: Sequence[str]) -> dict[str, Matched]:
    """Count the modules that each LoRA target matches. Raises ConfigError for a target that is not known, matches nothing or comes twice."""
    shapes, counts = lora_shapes(model), {}
    if not targets:
        raise ConfigError("recipe.lora.targets is empty, so nothing would be trained", f"Valid: {', '.join(shapes)}")
    for target in targets:
        if target not in shapes:
            raise ConfigError(f"LoRA target {target!r} is not known", f"Valid: {', '.join(shapes)}")
        if target in counts:
            raise ConfigError(f"LoRA target {target} comes twice in recipe.lora.targets", "Name it once")
        kind = shapes[target][0]
        layers = model["pattern"].count(kind) if kind else 1
        if not layers:
            valid = [name for name, (letter, _, _) in shapes.items() if not letter or letter in model["pattern"]]
            raise ConfigError(
                f"LoRA target {target} matches nothing, because model {model['name']} ({model['pattern']}) has no {LAYERS[kind]} layer",
                f"Take it out of recipe.lora.targets. Valid: {', '.join(valid)}",
            )
        per_layer = model["num_experts"] if target.startswith("experts.") else 1
        counts[target] = Matched(LAYERS.get(kind, "output"), layers, layers * per_layer)
    return counts


def adapter_shapes(model: Model, rank: int, targets: list[str]) -> dict[str, tuple[int, int]]:
    """Return the name and shape of every tensor that an adapter must hold. Raises ConfigError for an unknown target."""
    shapes = lora_shapes(model)
    tensors = {}
    for target in targets:
        if target not in shapes:
            raise ConfigError(f"LoRA target {target!r} is not known", f"Valid: {', '.join(shapes)}")
        kind, width_in, width_out = shapes[target]
        layers = [f"backbone.layers.{layer}.mixer." for layer, letter in enumerate(model["pattern"]) if letter == kind]
        for prefix in layers if kind else [""]:
            for module in peft_modules(model, [target]):
                tensors[f"base_model.model.{prefix}{module}.lora_A.weight"] = (rank, width_in)
                tensors[f"base_model.model.{prefix}{module}.lora_B.weight"] = (width_out, rank)
    return tensors


def check_model(model: Model) -> None:
    """Raise ConfigError where the model's sizes contradict one another."""
    for key, size in model.items():
        if isinstance(size, int) and size < 1:
            raise ConfigError(f"model.{key} = {size}", "Valid: an integer > 0")
    unknown = sorted(set(model["pattern"]) - set(LAYERS))
    rules = [
        (not unknown and model["pattern"], "pattern", model["pattern"], f"letters {', '.join(LAYERS)}"),
        (model["num_attention_heads"] % model["num_query_groups"] == 0, "num_query_groups", model["num_query_groups"],
         f"a divisor of num_attention_heads = {model['num_attention_heads']}"),
        (model["mamba_num_heads"] % model["mamba_num_groups"] == 0, "mamba_num_groups", model["mamba_num_groups"],
         f"a divisor of mamba_num_heads = {model['mamba_num_heads']}"),
        (model["moe_top_k"] <= model["num_experts"], "moe_top_k", model["moe_top_k"], f"at most num_experts = {model['num_experts']}"),
    ]  # fmt: skip
    for holds, key, value, valid in rules:
        if not holds:
            raise ConfigError(f"model.{key} = {value}", f"Valid: {valid}")


def check_layout(model: Model, layout: Mapping[str, int], gpus: int = 0) -> int:
    """Return the world size (ranks) of a layout. Raises ConfigError, which names the axis that does not fit and the valid sizes.

    gpus: of one node, those that an arm takes; 0 where the ranks run on CPUs (gloo).
    """
    check_model(model)
    for axis in ("tp", "pp", "ep", "cp", "dp", "judge_tp"):
        if layout[axis] < 1:
            raise ConfigError(f"parallelism.{axis} = {layout[axis]}", "Valid: an integer >= 1")
    world_size = layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"]
    for axis in ("tp", "judge_tp"):
        valid = valid_tp(model)
        if layout[axis] not in valid:
            raise ConfigError(
                f"parallelism.{axis} = {layout[axis]} does not fit model {model['name']}", f"Valid: {valid}"
            )
    if model["num_experts"] % layout["ep"]:
        raise ConfigError(
            f"parallelism.ep = {layout['ep']} does not divide num_experts = {model['num_experts']}",
            f"Valid: {[n for n in range(1, model['num_experts'] + 1) if model['num_experts'] % n == 0]}",
        )
    if world_size % (layout["ep"] * layout["pp"]):
        raise ConfigError(
            f"parallelism.ep x pp = {layout['ep']} x {layout['pp']} does not divide the world of {world_size} ranks (tp x pp x cp x dp)",
            "Raise dp or lower ep",
        )
    if len(model["pattern"]) % layout["pp"]:
        raise ConfigError(f"parallelism.pp = {layout['pp']} does not divide {len(model['pattern'])} layers")
    if gpus and world_size % gpus:
        raise ConfigError(
            f"{world_size} ranks (tp x pp x cp x dp) fit into no node, and do not fill nodes of {gpus} GPUs",
            "Make tp x pp x cp x dp at most cluster.gpus_per_node, or a multiple of it",
        )
    return world_size


def valid_tp(model: Model) -> list[int]:
    """Return the tensor-parallel sizes that split every sharded size evenly; more ranks than KV groups replicate the groups."""
    split = (
        "num_attention_heads",
        "mamba_num_heads",
        "mamba_num_groups",
        "vocab_size",
        "moe_ffn_size",
        "moe_shared_expert_ffn_size",
    )
    groups = model["num_query_groups"]
    sizes = range(1, model["mamba_num_groups"] + 1)
    return [n for n in sizes if all(model[key] % n == 0 for key in split) and (groups % n == 0 or n % groups == 0)]
