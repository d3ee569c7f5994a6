"""What a configuration costs before anything is made: memory of a rank, checkpoints, hours and money."""

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
    """Memory a rank, checkpoints, hours and money, before anything is submitted."""
    cost = memory_and_cost(chosen, num_arms, rounds)
    layout = ", ".join(f"{axis} {size}" for axis, size in cost["layout"].items())
    print(
        f"model {chosen.model.name}: {cost['parameters'] / 1e6:,.1f} M parameters; a rank of an arm ({layout}) holds:"
    )
    Console(width=120).print(live_view.footprints(cost["bytes_per_rank"]))
    recipe = chosen.recipe
    print(
        f"an arm trains {cost['adapter_parameters'] / 1e6:,.2f} M parameters and keeps two checkpoints of "
        f"{cost['checkpoint_bytes'] / 1e6:,.1f} MB, one every {recipe.checkpoint_every} of {recipe.num_steps} steps"
    )
    print(live_view.forecast(cost["forecast"]))


def memory_and_cost(chosen: settings.Settings, num_arms: int, rounds: Iterable[Round] = ()) -> dict[str, Any]:
    """What `show_cost` shows, as plain values: bytes, hours, money."""
    config, lora = chosen.to_dict(), chosen.recipe.lora
    model = config["model"]
    checkpoint = model_size.checkpoint_bytes(model, lora.rank, lora.targets)
    expected = forecast.forecast(chosen, num_arms, rounds)
    return {
        "parameters": model_size.num_parameters(model),
        "adapter_parameters": checkpoint // 12,
        "layout": config["parallelism"],
        "bytes_per_rank": {work: asdict(each) | {"peak": each.peak} for work, each in footprint.of_arm(config).items()},
        "gpu_memory_bytes": int(chosen.cluster.capacity.gpu_memory_gib * 2**30),
        "checkpoint_bytes": checkpoint,
        "forecast": asdict(expected) | {"hours": expected.hours} if expected else None,
    }
