"""Check that the parts of a composed configuration fit together: model, layout, adapter targets, axes and memory."""

from __future__ import annotations

from pipeline.config import footprint, model_size, settings


def check_plan_fits(chosen: settings.Settings) -> None:
    """Check sizes and memory before `init` or `round` makes anything. Raises ConfigError for the first part that does not fit."""
    check_sizes(chosen)
    footprint.check_memory(chosen.to_dict())


def check_sizes(chosen: settings.Settings) -> None:
    """Check model, layout, adapter targets and axes against one another. Raises ConfigError for the first that does not fit."""
    config = chosen.to_dict()
    gpus = chosen.cluster.gpus_per_node if chosen.cluster.kind == "slurm" else None
    model_size.check_layout(config["model"], config["parallelism"], gpus)
    model_size.matched_modules(config["model"], chosen.recipe.lora.targets)
    for axis in chosen.policy.axes:
        settings.value_of(chosen, axis.key)


def gpus_of_arm(chosen: settings.Settings) -> int:
    """Return the number of GPUs that one arm occupies; 0 on a site without GPUs."""
    return chosen.parallelism.world_size if chosen.cluster.gpus_per_node else 0
