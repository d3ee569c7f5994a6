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
    gpus = chosen.cluster.gpus_per_node if chosen.cluster.kind == "slurm" else None
    model_size.check_layout(config["model"], config["parallelism"], gpus)
    if chosen.cluster.kind == "slurm":
        check_requests(chosen)
    model_size.matched_modules(config["model"], chosen.recipe.lora.targets)
    for axis in chosen.policy.axes:
        settings.value_of(chosen, axis.key)


def check_requests(chosen: settings.Settings) -> None:
    """Check that each job asks for the time and the GPUs that it needs, and that the meta job may judge what it has to. Raises ConfigError."""
    cluster, judge_tp, target = chosen.cluster, chosen.parallelism.judge_tp, chosen.external
    has_board = target.kind == "local"
    for role in ROLES:
        minutes = cluster.request(role).time_limit_minutes
        if 60 * minutes <= cluster.signal_lead_seconds:
            raise ConfigError(
                f"cluster.{role}.time_limit_minutes = {minutes}, but a job is told to stop {cluster.signal_lead_seconds} s before its limit",
                "Raise that limit, or lower cluster.signal_lead_seconds",
            )
    if not cluster.gpus_per_node:
        for role in ("reference", "meta"):
            if gpus := cluster.request(role).gpus_per_node:
                raise ConfigError(
                    f"cluster.{role}.gpus_per_node = {gpus}, but arms have no GPU (cluster.gpus_per_node = 0)",
                    "Give both GPUs or neither, because scores of two kinds of devices cannot be compared",
                )
    elif cluster.ranks_per_node not in (0, cluster.gpus_per_node):
        raise ConfigError(
            f"cluster.ranks_per_node = {cluster.ranks_per_node}, but an arm asks for {cluster.gpus_per_node} GPUs of a node",
            "Set cluster.ranks_per_node=0, which is one rank for each GPU, or ask for as many GPUs as ranks",
        )
    elif cluster.gpus_per_node < judge_tp:
        raise ConfigError(
            f"judging takes parallelism.judge_tp = {judge_tp} GPUs of one node, but cluster.gpus_per_node = {cluster.gpus_per_node}",
            "Lower parallelism.judge_tp, or ask for more GPUs of a node",
        )
    elif (gpus := cluster.reference.gpus_per_node) < judge_tp:
        raise ConfigError(
            f"cluster.reference.gpus_per_node = {gpus}, but judging the reference takes parallelism.judge_tp = {judge_tp} GPUs",
            f"Set cluster.reference.gpus_per_node={judge_tp} or more, or leave it null for an arm's {cluster.gpus_per_node}",
        )
    elif (gpus := cluster.meta.gpus_per_node) < judge_tp and (gpus or has_board):
        why = (
            "external=local is judged by the meta job"
            if has_board
            else "a meta job with GPUs judges what the reference's job left"
        )
        raise ConfigError(
            f"cluster.meta.gpus_per_node = {gpus}, but {why}, which takes parallelism.judge_tp = {judge_tp} GPUs",
            f"Set cluster.meta.gpus_per_node={judge_tp}, and for the judging cluster.meta.cpus_per_task, mem and time_limit_minutes"
            + ("; or choose another external target" if has_board else "; or 0"),
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
