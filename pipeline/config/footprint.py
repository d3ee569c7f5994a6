"""Bytes on the fullest rank of a layout: what a training step holds at its peak, and what decoding holds.

    weights + adapter + its gradients + AdamW's two moments     for ever
    + activations that wait for the backward pass               a pipeline's first stage holds pp micro-batches of them
    + logits, and the layer that is in work                     at the moment that is worst

Closed forms from the configuration alone, for the substrate's own torch kernels; fused kernels need less. Weights, adapter and
optimizer are exact, the peak is within 10 % (tests/config/test_footprint.py builds and runs it). What a device's allocator, its libraries and
the communicators take comes on top: `DEVICE_RESERVE_BYTES`. rank_sizes.py has the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.config.model_size import Model
from pipeline.config.rank_sizes import (
    FLOAT,
    Rank,
    adapter_elements,
    cache_bytes,
    logits_bytes,
    saved_bytes,
    transient_bytes,
    weights_bytes,
)

PROMPT_TOKENS = 16384  # of one pass over prompts: substrate/inference/decode.py
DEVICE_RESERVE_BYTES = 3 * 2**30  # CUDA context, NCCL buffers, the allocator's fragments (assumed)
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
CURES = {
    "training": "parallelism.recompute=true, a smaller recipe.micro_batch_size, a larger tp or ep",
    "decoding": "a smaller tasks.decode_batch_size, a larger parallelism.judge_tp",
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank; `peak` is their sum."""

    weights: int
    adapter: int  # float32 factors and the mask that keeps blocks apart
    gradients: int
    optimizer: int
    activations: int
    working: int  # logits, or the layer that is in work

    @property
    def peak(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {in_units(size)}" for name, size in asdict(self).items() if size)
        return f"{in_units(self.peak)} ({parts})"


def in_units(size: int) -> str:
    """3221225472 -> "3.00 GiB", with three digits."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if size >= UNITS[unit]), "KiB")
    return f"{size / UNITS[unit]:#.3g} {unit}".replace(". ", " ")


def of_arm(config: Mapping[str, Any]) -> dict[str, Footprint]:
    """What an arm holds a rank, "training" and "decoding". config: a whole configuration as plain dictionaries."""
    model, recipe = config["model"], config["recipe"]
    return {
        "training": training(model, config["parallelism"], recipe),
        "decoding": decoding(model, config["parallelism"]["judge_tp"], config["tasks"], recipe["lora"]),
    }


def check_memory(config: Mapping[str, Any]) -> None:
    """Raises ConfigError when a rank's peak is more than the site's GPUs hold; nothing is checked where that is not known."""
    limit = config["cluster"]["capacity"]["gpu_memory_gib"] * 2**30
    for work, needed in of_arm(config).items() if limit else ():
        if needed.peak + DEVICE_RESERVE_BYTES > limit:
            raise ConfigError(
                f"{work} needs {needed} a GPU, and a reserve of {in_units(DEVICE_RESERVE_BYTES)}; "
                f"cluster.capacity.gpu_memory_gib = {limit / 2**30:g}",
                CURES[work],
            )


def training(model: Model, layout: Mapping[str, Any], recipe: Mapping[str, Any]) -> Footprint:
    """Of the fullest stage, for a LoRA recipe. layout and recipe: the keys of hydra_conf/parallelism and hydra_conf/recipe."""
    stages = [Rank(model, layout["tp"], layout["ep"], layout["pp"], stage) for stage in range(layout["pp"])]
    return max((_training(rank, layout, recipe) for rank in stages), key=lambda each: each.peak)


def _training(rank: Rank, layout: Mapping[str, Any], recipe: Mapping[str, Any]) -> Footprint:
    lora = {**recipe["lora"], "is_full": recipe["method"] == "sft_full"}
    factors, masks, num_factors = adapter_elements(rank, lora["rank"], lora["targets"], is_full=lora["is_full"])
    # A choice of states keeps one; a policy has its reference, and itself beside it while that is scored.
    copies = (recipe["selection"]["choice"] != "last") + 2 * (recipe["method"] == "grpo")
    tokens = recipe["micro_batch_size"] * recipe["sequence_length"]
    passes = max(1, recipe["batch_size"] // (recipe["micro_batch_size"] * layout["dp"]))
    in_flight = min(rank.pp - rank.stage, passes)
    boundary = rank.element * rank.model["hidden_size"] * tokens // rank.tp
    saved = {kind: saved_bytes(rank, kind, tokens, lora) for kind in set(rank.layers)}
    logits = logits_bytes(rank, tokens) if rank.is_last else 0
    if layout["recompute"]:
        activations = in_flight * boundary * (len(rank.layers) + 1)
        working = max(logits, *(saved[kind] + transient_bytes(rank, kind, tokens) for kind in saved))
    else:
        activations = in_flight * (sum(saved[kind] for kind in rank.layers) + 2 * boundary)
        working = logits
    # Between steps, where a recipe samples from the model: the caches of all slots.
    activations = max(activations, int(recipe["options"].get("decode_batch_size", 0)) * cache_bytes(rank))
    return Footprint(
        weights_bytes(rank), FLOAT * (factors + masks), FLOAT * factors, FLOAT * ((2 + copies) * factors + num_factors), activations, working,
    )  # fmt: skip


def decoding(model: Model, judge_tp: int, tasks: Mapping[str, Any], lora: Mapping[str, Any]) -> Footprint:
    """Of one rank that decodes; `activations` are the caches of all slots, `working` a pass over prompts."""
    rank = Rank(model, judge_tp, 1, 1, 0)
    factors, masks, _ = adapter_elements(rank, lora["rank"], lora["targets"])
    none = {"rank": 0, "targets": ()}
    slots = tasks["decode_batch_size"]
    a_pass = max(
        transient_bytes(rank, kind, PROMPT_TOKENS) + saved_bytes(rank, kind, PROMPT_TOKENS, none)
        for kind in set(rank.layers)
    )
    logits = 3 * FLOAT * slots * model["vocab_size"]  # gathered, as float32, and a copy
    return Footprint(
        weights_bytes(rank), FLOAT * (factors + masks), 0, 0, slots * cache_bytes(rank), max(a_pass, logits)
    )
