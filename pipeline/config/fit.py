"""Whether a composed configuration fits together: sizes, layout, axes and memory."""

from __future__ import annotations

from pipeline.config import footprint, model_size, settings


def check_plan_fits(chosen: settings.Settings) -> None:
    """Sizes as `check_sizes`, and memory, before anything is made. Raises ConfigError."""
    check_sizes(chosen)
    footprint.check_memory(chosen.to_dict())


def check_sizes(chosen: settings.Settings) -> None:
    """Model, layout, adapter targets and axes against one another. Raises ConfigError."""
    config = chosen.to_dict()
    gpus = chosen.cluster.gpus_per_node if chosen.cluster.kind == "slurm" else None
    model_size.check_layout(config["model"], config["parallelism"], gpus)
    model_size.adapter_shapes(config["model"], chosen.recipe.lora.rank, chosen.recipe.lora.targets)
    for axis in chosen.policy.axes:
        settings.value_of(chosen, axis.key)


def gpus_of_arm(chosen: settings.Settings) -> int:
    """Whose hours an arm takes; none on a site without GPUs."""
    return chosen.parallelism.world_size if chosen.cluster.gpus_per_node else 0
