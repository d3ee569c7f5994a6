"""Compute how many bytes the fullest rank of a layout needs, at the peak of a training step and while it decodes.

    weights + adapter + its gradients + the optimizer's moments  all the time
    + activations that wait for the backward pass               the first pipeline stage holds those of pp micro-batches
    + logits, or the layer that is being computed               whichever is larger

The formulas need the configuration alone, and know the scan's kernel (`scan_of`). Weights, adapter and optimizer are exact, and with torch's
scan the peak is within 10 % of what tests/config/test_footprint.py measures. `DEVICE_RESERVE_BYTES` stands for what the allocator, CUDA
libraries and communicators take in addition. rank_sizes.py computes the parts.

Where `parallelism.recompute` is auto, the plan takes the least recomputation that fits (`recompute_of`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.config.model_size import MOMENTS, Model, lora_shapes, matched_modules
from pipeline.config.rank_sizes import (
    FLOAT,
    Rank,
    adapter_elements,
    between_bytes,
    cache_bytes,
    cast_bytes,
    logits_bytes,
    saved_bytes,
    transient_bytes,
    weights_bytes,
)

PROMPT_TOKENS = 16384  # in one forward pass over prompts: substrate/inference/decode.py
DEVICE_RESERVE_BYTES = 3 * 2**30  # CUDA context, NCCL buffers, the allocator's fragments (assumed)
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
RECOMPUTE = ("none", "selective", "full")
"""What the backward pass may compute again, from the least: substrate/model/hybrid.py."""
SCAN_PACKAGE = "mamba_ssm"
CURES = {
    "training": "parallelism.recompute=full, smaller recipe.micro_batch_tokens and recipe.sequence_length, a larger tp or ep",
    "decoding": "a smaller tasks.decode_batch_size, a larger parallelism.judge_tp",
}


@dataclass(frozen=True)
class Footprint:
    """Bytes that one rank needs, by what they hold; `peak` is their sum."""

    weights: int
    adapter: int  # float32 factors, the mask that keeps blocks apart, and merged weights
    gradients: int
    optimizer: int
    activations: int
    working: int  # logits, or the layer that is being computed

    @property
    def peak(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {in_units(size)}" for name, size in asdict(self).items() if size)
        return f"{in_units(self.peak)} ({parts})"


def in_units(size: int) -> str:
    """Format a number of bytes with three digits: 3221225472 as "3.00 GiB"."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if size >= UNITS[unit]), "KiB")
    return f"{size / UNITS[unit]:#.3g} {unit}".replace(". ", " ")


def of_arm(config: Mapping[str, Any], *, at_least: bool = False) -> dict[str, Footprint]:
    """Return what each rank of an arm needs for "training" and for "decoding".

    config: a whole configuration as plain dictionaries (`Settings.to_dict`). at_least: with all that `recompute: auto` may recompute, and not
    what it takes here. Only that grows with what the configuration asks for: where more is asked for, auto may take less memory.
    """
    model, recipe, layout = config["model"], config["recipe"], config["parallelism"]
    mode = "full" if at_least and layout["recompute"] == "auto" else recompute_of(config)[0]
    return {
        "training": training(model, {**layout, "recompute": mode}, recipe, scan_of(config)[0]),
        "decoding": decoding(model, layout["judge_tp"], config["tasks"], recipe["lora"]),
    }


def scan_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return (kernel of the Mamba layers' scan in training, why): triton where jobs have GPUs and mamba-ssm, else torch."""
    cluster = config["cluster"]
    given = cluster["capacity"]["scan"]
    if given != "auto":
        return given, "cluster.capacity.scan says so"
    if not cluster["gpus_per_node"]:
        return "torch", "arms have no GPUs"
    if cluster["runtime"]:
        return "torch", (
            "what the container of cluster.runtime has is not known here; cluster.capacity.scan=triton says that it has mamba-ssm, "
            "with which training keeps far less"
        )
    if importlib.util.find_spec(SCAN_PACKAGE):
        return "triton", "this Python has mamba-ssm"
    return "torch", "this Python has no mamba-ssm, with which training would keep far less"


def recompute_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return (what training recomputes: none, selective or full; what memory says about it).

    `parallelism.recompute` = auto takes the first of these that fits into `cluster.capacity.gpu_memory_gib`. Where that is not known, arms
    on GPUs recompute everything and arms on cores nothing.
    """
    layout, cluster = config["parallelism"], config["cluster"]
    given, gibibytes = layout["recompute"], cluster["capacity"]["gpu_memory_gib"]
    if not gibibytes:
        mode = given if given != "auto" else "full" if cluster["gpus_per_node"] else "none"
        return mode, "cluster.capacity.gpu_memory_gib = 0: how much memory a device has is not known"
    scan, tried = scan_of(config)[0], []
    for mode in RECOMPUTE:
        needed = training(config["model"], {**layout, "recompute": mode}, config["recipe"], scan).peak
        tried.append(f"{mode} needs {in_units(needed)}")
        fits = needed + DEVICE_RESERVE_BYTES <= gibibytes * 2**30
        if mode == given or (given == "auto" and fits):
            break
    return mode, f"{', '.join(tried)} of {gibibytes:g} GiB, of which {in_units(DEVICE_RESERVE_BYTES)} are reserved"


def check_memory(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where a rank needs more memory than a GPU of the site has; a site with `gpu_memory_gib` 0 is not checked."""
    limit = config["cluster"]["capacity"]["gpu_memory_gib"] * 2**30
    for work, needed in of_arm(config).items() if limit else ():
        if needed.peak + DEVICE_RESERVE_BYTES > limit:
            raise ConfigError(
                f"{work} needs {needed} on each GPU and a reserve of {in_units(DEVICE_RESERVE_BYTES)}, but "
                f"cluster.capacity.gpu_memory_gib = {limit / 2**30:g}",
                f"What lowers it: {CURES[work]}. If the site's GPUs have more memory, say so there (an H200: 139)",
            )


def training(model: Model, layout: Mapping[str, Any], recipe: Mapping[str, Any], scan: str = "torch") -> Footprint:
    """Return the footprint of the pipeline stage that needs most.

    layout, recipe: as in hydra_conf/parallelism and hydra_conf/recipe, `recompute` one of RECOMPUTE. scan: torch or triton.
    """
    stages = [Rank(model, layout["tp"], layout["ep"], layout["pp"], stage, scan) for stage in range(layout["pp"])]
    return max((_training(rank, layout, recipe) for rank in stages), key=lambda footprint: footprint.peak)


def _training(rank: Rank, layout: Mapping[str, Any], recipe: Mapping[str, Any]) -> Footprint:
    lora = {**recipe["lora"], "is_full": is_full(recipe)}
    factors, masks, num_factors = adapter_elements(rank, lora["rank"], lora["targets"], is_full=is_full(recipe))
    # Choosing among states keeps the best one; grpo keeps the reference policy, and its own factors while it scores that one.
    copies = (recipe["selection"]["choice"] != "last") + 2 * (recipe["method"] == "grpo")
    longest, budget = longest_row(rank.model, recipe), recipe["micro_batch_tokens"]
    tokens = max(longest, budget)  # a row that is longer than the budget has a pass of its own
    passes = -(-recipe["batch_size"] // (max(1, budget // longest) * layout["dp"]))  # of the longest rows
    in_flight = min(rank.pp - rank.stage, passes)
    boundary = rank.element * rank.model["hidden_size"] * tokens // rank.tp
    is_selective = layout["recompute"] == "selective"
    saved = {kind: saved_bytes(rank, kind, tokens, lora, is_selective=is_selective) for kind in set(rank.layers)}
    logits = logits_bytes(rank, tokens) if rank.is_last else 0
    if layout["recompute"] == "full":
        activations = in_flight * boundary * (len(rank.layers) + 1)
        working = max(logits, *(saved[kind] + transient_bytes(rank, kind, tokens) for kind in saved))
    else:
        activations = in_flight * (sum(saved[kind] for kind in rank.layers) + 2 * boundary)
        working = max(logits, between_bytes(rank, tokens) if is_selective and "M" in saved else 0)
    if not lora["is_full"]:
        activations += cast_bytes(rank, lora["rank"], lora["targets"])
    # A recipe that samples from the model decodes between steps, when no activations wait.
    if slots := int(recipe["options"].get("decode_batch_size", 0)):
        activations, working = max((activations, working), _of_slots(rank, slots), key=sum)
    optimizer = FLOAT * ((MOMENTS[recipe["optimizer"]] + copies) * factors + num_factors)
    return Footprint(weights_bytes(rank), FLOAT * (factors + masks), FLOAT * factors, optimizer, activations, working)


def is_full(recipe: Mapping[str, Any]) -> bool:
    """Whether whole weights of the targets are trained, and not low-rank factors."""
    return bool(recipe["method"] == "sft_full")


def trained_parameters(model: Model, recipe: Mapping[str, Any]) -> int:
    """Return how many numbers a recipe trains: low-rank factors of its targets, or their whole matrices."""
    shapes, lora = lora_shapes(model), recipe["lora"]
    return sum(
        found.modules * (wide_in * wide_out if is_full(recipe) else lora["rank"] * (wide_in + wide_out))
        for target, found in matched_modules(model, lora["targets"]).items()
        for _, wide_in, wide_out in [shapes[target]]
    )


def checkpoint_bytes(model: Model, recipe: Mapping[str, Any]) -> int:
    """Return the size of a training checkpoint in bytes: what is trained in float32, its moments, and the copies that the recipe keeps.

    A factor of a fused matrix is stored whole, also where not all of its modules are targets.
    """
    lora = recipe["lora"]
    elements, _, _ = adapter_elements(Rank(model, 1, 1, 1, 0), lora["rank"], lora["targets"], is_full=is_full(recipe))
    copies = (recipe["selection"]["choice"] != "last") + (
        recipe["method"] == "grpo"
    )  # the choice so far; the reference
    return FLOAT * (1 + MOMENTS[recipe["optimizer"]] + copies) * elements


def longest_row(model: Model, recipe: Mapping[str, Any]) -> int:
    """Return the most tokens that a row may have in training.

    `sequence_length` bounds the training file's rows, and the completions that rft keeps. grpo learns from every completion that it draws, after
    a prompt of that file.
    """
    longest = int(recipe["sequence_length"])
    drawn = int(recipe["options"]["max_new_tokens"]) if recipe["method"] == "grpo" else 0
    return max(longest, min(longest + drawn, model["max_sequence_length"]))


def _of_slots(rank: Rank, slots: int) -> tuple[int, int]:
    """Return (bytes of the caches of all slots, bytes of a pass over prompts or of the logits, whichever is larger) while a rank decodes."""
    no_lora = {"rank": 0, "targets": ()}
    prompt_pass = max(
        transient_bytes(rank, kind, PROMPT_TOKENS) + saved_bytes(rank, kind, PROMPT_TOKENS, no_lora)
        for kind in set(rank.layers)
    )
    logits = 3 * FLOAT * slots * rank.model["vocab_size"]  # gathered, as float32, and a copy
    return slots * cache_bytes(rank), max(prompt_pass, logits)


def decoding(model: Model, judge_tp: int, tasks: Mapping[str, Any], lora: Mapping[str, Any]) -> Footprint:
    """Return the footprint of one rank that decodes. `activations` are the caches of all slots, `working` a pass over prompts.

    In float32 the adapter is added to copies of the weights (substrate/inference/projections.py), which `adapter` has too.
    """
    rank = Rank(model, judge_tp, 1, 1, 0)
    factors, masks, _ = adapter_elements(rank, lora["rank"], lora["targets"])
    merged = adapter_elements(rank, 0, lora["targets"], is_full=True)[0] if rank.element == FLOAT else 0
    caches, working = _of_slots(rank, tasks["decode_batch_size"])
    return Footprint(weights_bytes(rank), FLOAT * (factors + masks + merged), 0, 0, caches, working)
