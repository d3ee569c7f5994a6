"""Check that the parts of a composed configuration fit together: model, layout, what jobs ask for, adapter targets, axes and memory."""

from __future__ import annotations

from pipeline.campaign.errors import ConfigError
from pipeline.config import footprint, model_size, settings
from pipeline.config.requests import ROLES


def check_plan_fits(chosen: settings.Settings) -> None:
    """Check sizes and memory before `init` or `round` makes anything. Raises ConfigError for the first part that does not fit."""
    check_sizes(chosen)
    footprint.check_memory(chosen.to_dict())


def check_sizes(chosen: settings.Settings) -> None:
    """Check model, layout, requests, adapter targets and axes against one another. Raises ConfigError for the first that does not fit."""
    config = chosen.to_dict()
    if chosen.cluster.gpus > chosen.parallelism.world_size:
        raise ConfigError(
            f"cluster.worker.gpus = {chosen.cluster.gpus}, but an arm has {chosen.parallelism.world_size} ranks, one for each GPU",
            "Leave it null; cluster.worker.sbatch={exclusive: true} keeps other jobs away from the node",
        )
    gpus = chosen.cluster.gpus if chosen.cluster.kind == "slurm" else 0
    model_size.check_layout(config["model"], config["parallelism"], gpus)
    if chosen.cluster.kind == "slurm":
        check_requests(chosen)
    model_size.matched_modules(config["model"], chosen.recipe.lora.targets)
    for axis in chosen.policy.axes:
        settings.value_of(chosen, axis.key)


def check_requests(chosen: settings.Settings) -> None:
    """Check that each job asks for the time and the GPUs that it needs. Raises ConfigError."""
    cluster, judge_tp, target = chosen.cluster, chosen.parallelism.judge_tp, chosen.external
    for role in ROLES:
        minutes = cluster.request(role).time_limit_minutes
        if 60 * minutes <= cluster.signal_lead_seconds:
            raise ConfigError(
                f"cluster.{role}.time_limit_minutes = {minutes}, but a job is told to stop {cluster.signal_lead_seconds} s before its limit",
                "Raise that limit, or lower cluster.signal_lead_seconds",
            )
    for role in ("reference", "judge") if cluster.gpus_per_node else ():
        if (gpus := cluster.request(role).gpus) < judge_tp:
            raise ConfigError(
                f"cluster.{role}.gpus = {gpus}, but judging takes parallelism.judge_tp = {judge_tp} GPUs of one node",
                f"Lower parallelism.judge_tp, or set cluster.{role}.gpus={judge_tp} and a cluster.{role}.gpus_per_node that has them; null asks for "
                "as many as are needed",
            )
    if cluster.gpus_per_node and cluster.gpus < judge_tp:
        raise ConfigError(
            f"judging takes parallelism.judge_tp = {judge_tp} GPUs of one node, but an arm has {cluster.gpus} there",
            "Lower parallelism.judge_tp, or choose a layout with more ranks on a node",
        )
    if target.kind != "none" and target.wait_seconds >= 60 * cluster.meta.time_limit_minutes:
        raise ConfigError(
            f"external.wait_seconds = {target.wait_seconds}, but the meta job, which waits, ends after cluster.meta.time_limit_minutes = "
            f"{cluster.meta.time_limit_minutes}",
            "Wait for less long, since the next meta job takes up later scores, or raise the limit",
        )


def gpus_of_arm(chosen: settings.Settings) -> int:
    """Return the number of GPUs that one arm occupies; 0 on a site without GPUs."""
    return chosen.parallelism.world_size if chosen.cluster.gpus_per_node else 0
