"""The cost of a configuration, known before anything is built: memory of a rank, checkpoints, hours and money."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from pipeline.campaign.layout import Round
from pipeline.cluster import forecast
from pipeline.config import decoding, fit, footprint, model_size, settings
from pipeline.config.decoding import Settled
from pipeline.reporting import terminal_tables


def show_cost(
    chosen: settings.Settings, num_arms: int, rounds: Iterable[Round] = (), settled: Settled | None = None
) -> None:
    """Print the memory of a rank, the checkpoints, how arms decode, the hours and the money.

    rounds: those that may have measured speeds. settled: what the campaign froze for `auto`; None where there is no campaign yet.
    """
    cost = memory_and_cost(chosen, num_arms, rounds)
    layout = ", ".join(f"{axis} {size}" for axis, size in cost["layout"].items())
    print(
        f"The model {chosen.model.name} has {cost['parameters'] / 1e6:,.1f} million parameters. One rank of an arm ({layout}) holds:"
    )
    Console(width=120).print(terminal_tables.footprints(cost["bytes_per_rank"]))
    recipe = chosen.recipe
    print(targets_in_words(chosen))
    print(recompute_in_words(chosen))
    print(
        f"An arm trains {cost['trained_parameters'] / 1e6:,.2f} million parameters for {recipe.num_steps} steps. {checkpoints_in_words(chosen, cost)}"
    )
    for line in decoding.in_words(chosen, decoding.settled_of(chosen) if settled is None else settled):
        print(line)
    has_gpus = bool(chosen.cluster.gpus_per_node)
    print(terminal_tables.forecast(cost["forecast"], has_gpus=has_gpus))
    if beside := agents_in_words(chosen):
        print(beside)
    if chosen.cluster.kind == "slurm" and not has_gpus and chosen.cluster.capacity.train_tokens_per_second:
        print(
            "note: cluster.gpus_per_node is 0, so arms compute on cores, but the rates of cluster.capacity may be those of a GPU"
        )
    if has_gpus:
        reserve = footprint.in_units(footprint.DEVICE_RESERVE_BYTES)
        print(f"\nThe layouts that ship, on nodes of {chosen.cluster.gpus_per_node} GPUs (parallelism=...), with GPU-hours of a round. Memory is of "
              f"a GPU, with all that `recompute: auto` may recompute, and includes a reserve of {reserve} for the driver and libraries, "
              "which `peak` above leaves out:")  # fmt: skip
        Console(width=160).print(terminal_tables.layouts(forecast.layouts(chosen, num_arms), num_arms))
        if shared := sharing_in_words(chosen):
            print(shared)


def agents_in_words(chosen: settings.Settings) -> str:
    """What of agents the forecast leaves out, and how much that may be; empty where no agent runs an arm."""
    worker = chosen.worker
    if worker.agent != "llm":
        return ""
    seconds, devices = worker.budget.wall_seconds, fit.gpus_of_arm(chosen) or chosen.parallelism.world_size
    kind = "GPU-hours" if chosen.cluster.gpus_per_node else "hours of a rank"
    return (
        f"This counts the full run of an arm, and not what its agent does before and beside it. A session may last {seconds:,} s "
        f"(worker.budget.wall_seconds), in which its arm holds what it was given: up to {devices * seconds / 3600:,.3g} {kind} of each arm "
        f"that an agent runs (worker.roles: {', '.join(worker.roles)})."
    )


def sharing_in_words(chosen: settings.Settings) -> str:
    """What keeps arms from sharing a node though its GPUs would do; empty for nothing. What the site adds to it, `doctor` says."""
    cluster = chosen.cluster
    if cluster.kind != "slurm" or not 0 < cluster.gpus < cluster.gpus_per_node:
        return ""
    if cluster.is_exclusive:
        return "An arm has its node alone, because cluster.sbatch.exclusive is set: the GPUs that it does not use stay idle."
    if not cluster.megabytes:
        return (
            "cluster.mem is empty, so an arm gets the memory that the site gives by default. Where that is all of a node, one arm takes a node, "
            "whatever the column `arms a node` says; where it is a few GB a core, reading the weights may fail. Set cluster.mem to what a "
            "node has, such as 900G: an arm asks for the share of its GPUs. `doctor` says how many arms a node of the site takes."
        )
    return ""


def checkpoints_in_words(chosen: settings.Settings, cost: dict[str, Any]) -> str:
    """When an arm writes checkpoints, and how large they are."""
    every, steps, minutes = chosen.recipe.checkpoint_every, chosen.recipe.num_steps, chosen.cluster.checkpoint_minutes
    due = [f"every {every} steps"] * (steps > every) + [f"at least every {minutes:g} minutes"] * bool(minutes)
    never = "" if steps > every else f" (its steps are over before recipe.checkpoint_every = {every})"
    size = f"{cost['checkpoint_bytes'] / 1e6:,.1f} MB"
    return f"It writes a checkpoint of {size} {', '.join([*due, 'when it is told to stop'])}{never}, and keeps the last two."


def targets_in_words(chosen: settings.Settings) -> str:
    """How many modules the LoRA targets match in each kind of layer: `LoRA targets match 14 modules: mamba 4 (in_proj 4); ...`."""
    matched = model_size.matched_modules(chosen.to_dict()["model"], chosen.recipe.lora.targets)
    kinds: dict[str, dict[str, int]] = {}
    for target, found in matched.items():
        kinds.setdefault(found.kind, {})[target] = found.modules
    parts = [
        f"{kind} {sum(counts.values())} ({', '.join(f'{target} {number}' for target, number in counts.items())})"
        for kind, counts in kinds.items()
    ]
    return f"LoRA targets match {sum(found.modules for found in matched.values())} modules: {'; '.join(parts)}."


def recompute_in_words(chosen: settings.Settings) -> str:
    """What training computes again in its backward pass, the kernel of its scan, and why: as the memory plan has chosen."""
    config = chosen.to_dict()
    (mode, why), (scan, reason) = footprint.recompute_of(config), footprint.scan_of(config)
    return f"Training recomputes {mode} ({why}), with the {scan} scan ({reason})."


def memory_and_cost(
    chosen: settings.Settings, num_arms: int, rounds: Iterable[Round] = (), settled: Settled | None = None
) -> dict[str, Any]:
    """The values that `show_cost` prints: bytes, device-hours and money. `forecast` is None where no speed is known."""
    config, lora = chosen.to_dict(), chosen.recipe.lora
    model = config["model"]
    expected = forecast.forecast(chosen, num_arms, rounds)
    return {
        "parameters": model_size.num_parameters(model),
        "adapter_parameters": sum(map(math.prod, model_size.adapter_shapes(model, lora.rank, lora.targets).values())),
        "lora_targets": {
            name: found._asdict() for name, found in model_size.matched_modules(model, lora.targets).items()
        },
        "layout": config["parallelism"],
        "decoding": decoding.in_words(chosen, decoding.settled_of(chosen) if settled is None else settled),
        "recompute": dict(zip(("choice", "why"), footprint.recompute_of(config), strict=True)),
        "scan": dict(zip(("choice", "why"), footprint.scan_of(config), strict=True)),
        "bytes_per_rank": {work: asdict(held) | {"peak": held.peak} for work, held in footprint.of_arm(config).items()},
        "gpu_memory_bytes": int(chosen.cluster.capacity.gpu_memory_gib * 2**30),
        "trained_parameters": footprint.trained_parameters(model, config["recipe"]),
        "checkpoint_bytes": footprint.checkpoint_bytes(model, config["recipe"]),
        "forecast": _with_sums(expected),
        "agents": agents_in_words(chosen),
        "layouts": [
            {name: value for name, value in vars(layout).items() if name != "expected"}
            | {"must_have": layout.must_have(num_arms), "forecast": _with_sums(layout.expected)}
            for layout in (forecast.layouts(chosen, num_arms) if chosen.cluster.gpus_per_node else ())
        ],
    }


def _with_sums(expected: forecast.Forecast | None) -> dict[str, Any] | None:
    """A forecast as plain values, with the hours of a round; None where there is none."""
    if expected is None:
        return None
    return asdict(expected) | {"hours": expected.hours, "first_round_hours": expected.first_round_hours}
