"""The cost of a configuration, known before anything is built: memory of a rank, checkpoints, hours and money."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from pipeline.campaign.layout import Round
from pipeline.cluster import forecast
from pipeline.config import footprint, model_size, settings
from pipeline.reporting import live_view


def show_cost(chosen: settings.Settings, num_arms: int, rounds: Iterable[Round] = ()) -> None:
    """Print the memory of a rank, the checkpoints, the hours and the money. `rounds` are those that may have measured speeds."""
    cost = memory_and_cost(chosen, num_arms, rounds)
    layout = ", ".join(f"{axis} {size}" for axis, size in cost["layout"].items())
    print(
        f"The model {chosen.model.name} has {cost['parameters'] / 1e6:,.1f} million parameters. One rank of an arm ({layout}) holds:"
    )
    Console(width=120).print(live_view.footprints(cost["bytes_per_rank"]))
    recipe = chosen.recipe
    print(
        f"An arm trains {cost['adapter_parameters'] / 1e6:,.2f} million parameters for {recipe.num_steps} steps. It writes a checkpoint of "
        f"{cost['checkpoint_bytes'] / 1e6:,.1f} MB every {recipe.checkpoint_every} steps and keeps the last two."
    )
    print(live_view.forecast(cost["forecast"]))


def memory_and_cost(chosen: settings.Settings, num_arms: int, rounds: Iterable[Round] = ()) -> dict[str, Any]:
    """The values that `show_cost` prints: bytes, device-hours and money. `forecast` is None where no speed is known."""
    config, lora = chosen.to_dict(), chosen.recipe.lora
    model = config["model"]
    checkpoint = model_size.checkpoint_bytes(model, lora.rank, lora.targets)
    expected = forecast.forecast(chosen, num_arms, rounds)
    return {
        "parameters": model_size.num_parameters(model),
        "adapter_parameters": checkpoint // 12,
        "layout": config["parallelism"],
        "bytes_per_rank": {work: asdict(held) | {"peak": held.peak} for work, held in footprint.of_arm(config).items()},
        "gpu_memory_bytes": int(chosen.cluster.capacity.gpu_memory_gib * 2**30),
        "checkpoint_bytes": checkpoint,
        "forecast": asdict(expected) | {"hours": expected.hours} if expected else None,
    }
