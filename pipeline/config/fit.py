"""Check that the parts of a composed configuration fit together: model, experiment, layout, what jobs ask for, adapter targets, axes and memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.records import Setting
from pipeline.config import footprint, model_size, settings
from pipeline.config.requests import ROLES

DEFAULT_EXPERIMENT = "demo"
"""What hydra_conf/campaign.yaml chooses where no word does."""
OTHER_SIZE = 16
"""A model with so many times more or fewer parameters than the one that an experiment is made for needs a learning rate of its own.

The best rate of Adam falls about as one over the width of the layers (Yang and others, Tensor Programs V, 2022), and parameters grow as its square,
so beyond this ratio it lies outside of the factor of 4 in which axes look for it.
"""
SESSION_SECONDS = 300
"""What an agent's job takes beside its session: mounting and compiling before it, and a minute in which the loop may say how it ended."""


@functools.cache
def models_of_experiments() -> Mapping[str, model_size.Model]:
    """Name -> the model that each file of hydra_conf/experiment chooses."""
    names = sorted(path.stem for path in (settings.SOURCE / "experiment").glob("*.yaml"))
    return {name: settings.compose([f"experiment={name}"]).to_dict()["model"] for name in names}


def check_experiment(chosen: settings.Settings, overrides: Sequence[str]) -> None:
    """Refuse a model that was chosen beside an experiment for a model of another size, unless a learning rate was chosen too.

    overrides: the words that composed `chosen`. Raises ConfigError, whose cure names the experiments for models of this size.
    """
    words = [word.lstrip("+") for word in overrides]
    is_own_model = any(word.startswith(("model=", "model.")) for word in words)
    if not is_own_model or any(word.startswith("recipe.learning_rate=") for word in words):
        return
    known = {name: model_size.num_parameters(model) for name, model in models_of_experiments().items()}
    name = next(
        (word.partition("=")[2] for word in reversed(words) if word.startswith("experiment=")), DEFAULT_EXPERIMENT
    )
    size = model_size.num_parameters(chosen.to_dict()["model"])
    if name not in known or not _are_far(size, known[name]):
        return
    fitting = [f"experiment={each}" for each, other in known.items() if not _are_far(size, other)]
    others = f"Choose {' or '.join(fitting)}, made for this size, or your own" if fitting else "Choose your own"
    raise ConfigError(
        f"the model {chosen.model.name} has {size / 1e6:,.1f} million parameters, but experiment={name} is made for "
        f"{known[name] / 1e6:,.1f} million: its recipe.learning_rate = {chosen.recipe.learning_rate:g} and its axes do not fit",
        f"{others} recipe.learning_rate=..., and with it policy/axes, tasks and the length of training",
    )


def _are_far(size: int, other: int) -> bool:
    return max(size, other) > OTHER_SIZE * min(size, other)


def check_plan_fits(chosen: settings.Settings) -> None:
    """Check sizes and memory before `init` or `round` makes anything. Raises ConfigError for the first part that does not fit."""
    check_sizes(chosen)
    footprint.check_memory(chosen.to_dict())


def with_recompute(chosen: settings.Settings, arms: Iterable[Sequence[Setting]]) -> settings.Settings:
    """Return a copy in which `parallelism.recompute` is no longer auto, but what the arm that needs most of it takes.

    arms: the overrides of each arm. One choice serves them all, so that their speeds compare. It changes no number that they compute.
    """
    if chosen.parallelism.recompute != "auto":
        return chosen
    changed = [settings.with_overrides(chosen, overrides).to_dict() for overrides in arms]
    most = max((footprint.recompute_of(each)[0] for each in changed), key=footprint.RECOMPUTE.index)
    return replace(chosen, parallelism=replace(chosen.parallelism, recompute=most))


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
    for role in filter(chosen.worker.has_jobs, ROLES):
        minutes = cluster.request(role).time_limit_minutes
        if 60 * minutes <= cluster.signal_lead_seconds:
            raise ConfigError(
                f"cluster.{role}.time_limit_minutes = {minutes}, but a job is told to stop {cluster.signal_lead_seconds} s before its limit",
                "Raise that limit, or lower cluster.signal_lead_seconds",
            )
    check_session(chosen)
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


def check_session(chosen: settings.Settings) -> None:
    """Check that an agent's session fits into its arm's job. Raises ConfigError.

    A session that is cut off begins anew in the next job, with what is left of its budget, and would be cut off there too. The judging after
    it need not fit, because an adapter that is sealed is judged on from where it was.
    """
    if chosen.worker.agent == "none":
        return
    wait = chosen.worker.server.wait_seconds if chosen.worker.is_served else 0
    minutes, lead = chosen.cluster.request("worker").time_limit_minutes, chosen.cluster.signal_lead_seconds
    needed = chosen.worker.budget.wall_seconds + wait + SESSION_SECONDS
    if needed > 60 * minutes - lead:
        waited = f" after up to worker.server.wait_seconds = {wait}" if wait else ""
        raise ConfigError(
            f"worker.budget.wall_seconds = {chosen.worker.budget.wall_seconds}{waited}, but an arm's job is told to stop {60 * minutes - lead} s "
            "after its start, and a session that is cut off begins anew",
            f"Set cluster.time_limit_minutes={-(-(needed + lead) // 60)} or more, or lower worker.budget.wall_seconds",
        )


def gpus_of_arm(chosen: settings.Settings) -> int:
    """Return the number of GPUs that one arm occupies; 0 on a site without GPUs."""
    return chosen.parallelism.world_size if chosen.cluster.gpus_per_node else 0


def unit_of(chosen: settings.Settings) -> str:
    """Return what seconds of an arm's processes are multiplied by: its GPUs, or its ranks on a site without GPUs."""
    return "GPU-seconds" if chosen.cluster.gpus_per_node else "rank-seconds"
