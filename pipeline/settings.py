"""Composed configuration -> typed `Settings`: the one door of hydra and omegaconf.

`hydra_conf/` (or the copy frozen into a campaign) is composed by Hydra as plain YAML and merged once into the dataclasses below, so
that an unknown key, a wrong type or a value out of range is named here, before anything is submitted. Behind this border the
rest of the pipeline sees dataclasses; a substrate process gets the same values as JSON.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any, cast

from pipeline.errors import ConfigError
from pipeline.records import Axis, Policy, Setting
from pipeline.schema import Settings

SOURCE = Path(__file__).resolve().parent.parent / "hydra_conf"
"""Beside the package: in the checkout, and in the frozen code of a campaign."""

POSITIVE = (
    "recipe.learning_rate", "recipe.num_steps", "recipe.batch_size", "recipe.micro_batch_size", "recipe.checkpoint_every",
    "tasks.num_train_per_family", "tasks.num_dev_per_family", "tasks.num_fresh_per_family", "tasks.max_new_tokens",
    "tasks.decode_batch_size", "cluster.cpus_per_task", "cluster.time_limit_minutes", "cluster.stall_minutes", "cluster.shm_size_gib",
)  # fmt: skip
NOT_NEGATIVE = (
    "cluster.gpus_per_node", "cluster.ranks_per_node", "cluster.mem_gb", "cluster.signal_lead_seconds", "cluster.arms_at_once",
    "cluster.capacity.gpu_memory_gib", "cluster.capacity.train_tokens_per_second",
    "cluster.capacity.decode_tokens_per_second", "cluster.capacity.price_per_gpu_hour",
)  # fmt: skip


def compose(overrides: Iterable[str] = (), source: Path = SOURCE, campaign_dir: Path | None = None) -> Settings:
    """Compose `campaign.yaml` of `source` under Hydra overrides; rounds written in `campaign_dir` are found as `+round=r0002`.

    Raises ConfigError with Hydra's own sentence: an unknown group, option, key or a value that does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(source), version_base="1.3"):
            return typed(hydra_compose("campaign", overrides=[*search_path(campaign_dir), *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            _one_line(error), "See hydra_conf/ for what there is, or `python -m pipeline round --help`"
        ) from error
    except ValueError as error:  # Hydra's own, for a group that is given a number, and names no group
        raise ConfigError(f"{' '.join(overrides)}: {_one_line(error)}", "See hydra_conf/ for what there is") from error


def search_path(campaign_dir: Path | None) -> list[str]:
    """The override that lets Hydra find the rounds written in a campaign, as a list to put before the others."""
    if not campaign_dir:
        return []
    quoted = str(campaign_dir).replace('"', r"\"")  # as Hydra's grammar quotes
    return [f'hydra.searchpath=["file://{quoted}/hydra"]']


def typed(config: Any) -> Settings:
    """Merge plain configuration into the dataclasses. Raises ConfigError for an unknown key or a wrong type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(
            OmegaConf.create(config), resolve=True
        )  # first, for types are checked where they merge
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error), "Compare with the files in hydra_conf/") from error
    assert isinstance(settings, Settings)
    _check(settings)
    return settings


def load(path: Path) -> Settings:
    """Read a frozen `config.yaml`."""
    from omegaconf import OmegaConf

    return typed(OmegaConf.load(path))


def to_yaml(settings: Settings) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(settings.to_dict()))


def with_overrides(settings: Settings, overrides: Iterable[Setting]) -> Settings:
    """Settings with dotted keys replaced, typed and checked again. Raises ConfigError for a key that does not exist."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Only what changes is merged into the types: all of it took 40 ms, for each of eight arms.
    changed = copy.deepcopy(settings)
    for key, value in overrides:
        value_of(settings, key)
        if value == "???":  # OmegaConf's own sign for a value that is missing
            raise ConfigError(f"{key} = ??? is no value", "Compare with the files in hydra_conf/")
        *path, last = key.split(".")
        only: Any = reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), cast(Any, value))
        try:
            only = OmegaConf.to_container(OmegaConf.create(only), resolve=True)  # first, as in `typed`
            merged = OmegaConf.merge(OmegaConf.structured(Settings), only)
        except OmegaConfBaseException as error:
            raise ConfigError(_one_line(error), "Compare with the files in hydra_conf/") from error
        place: Any = reduce(lambda at, name: at[name] if isinstance(at, dict) else getattr(at, name), path, changed)
        if isinstance(place, dict):
            place[last] = OmegaConf.select(merged, key)
        else:
            setattr(place, last, OmegaConf.select(merged, key))
    _check(changed)
    return changed


def policy_of(settings: Settings) -> Policy:
    """The policy as a record."""
    pairs = {
        name: tuple((s.key, s.value) for s in getattr(settings.policy, name)) for name in ("standing", "dead_ends")
    }
    axes = tuple(Axis(a.name, a.key, a.kind, a.low, a.high, tuple(a.choices)) for a in settings.policy.axes)
    return Policy(axes=axes, **pairs)


def value_of(settings: Settings, key: str) -> str:
    """The value under a dotted key, as text. Raises ConfigError for a key that does not exist."""
    try:
        return str(reduce(getitem, key.split("."), settings.to_dict()))
    except (KeyError, TypeError):
        raise ConfigError(f"{key} is not a configuration key", "Compare with the files in hydra_conf/") from None


def _check(settings: Settings) -> None:
    """Ranges that a type cannot say."""
    recipe, tasks, cluster = settings.recipe, settings.tasks, settings.cluster
    sizes = [
        (f"parallelism.{axis}", getattr(settings.parallelism, axis))
        for axis in ("tp", "pp", "ep", "cp", "dp", "judge_tp")
    ]
    rules = [
        *((size >= 1, key, size, "an integer of at least 1") for key, size in sizes),
        *((value >= 0, key, value, "a number >= 0") for key in NOT_NEGATIVE for value in [attrgetter(key)(settings)]),
        *((math.isfinite(value), key, value, "a finite number") for key, value in _floats(settings.to_dict())),
        (len(set(tasks.families)) == len(tasks.families), "tasks.families", tasks.families, "each family once"),
        (settings.model.dtype in ("float32", "bfloat16"), "model.dtype", settings.model.dtype, "float32 or bfloat16"),
        (tasks.level in ("small", "full"), "tasks.level", tasks.level, "small or full"),
        (tasks.engine in ("native", "vllm"), "tasks.engine", tasks.engine, "native or vllm"),
        (tasks.engine == "native" or bool(tasks.engine_version), "tasks.engine_version", "empty",
         "the version of vLLM that the runtime has: it is part of a score"),
        (tasks.engine == "native" or bool(cluster.vllm_runtime), "cluster.vllm_runtime", "empty",
         "a virtual environment with vLLM, for tasks.engine=vllm"),
        (bool(tasks.families), "tasks.families", tasks.families, "at least one family"),
        (cluster.kind in ("local", "slurm"), "cluster.kind", cluster.kind, "local or slurm"),
        (cluster.network in ("loopback", "fabric"), "cluster.network", cluster.network, "loopback or fabric"),
        (not recipe.real_share or bool(tasks.train_csv), "recipe.real_share", recipe.real_share,
         "0 without tasks.train_csv, from which the image has its real rows"),
        (set(recipe.mix) <= set(tasks.families), "recipe.mix", sorted(recipe.mix), f"shares of {tasks.families}"),
        (min(recipe.mix.values(), default=-1) >= 0 < sum(recipe.mix.values()), "recipe.mix", recipe.mix,
         "shares >= 0 that sum to more than 0"),
        (settings.num_nodes == 1 or cluster.network == "fabric", "cluster.network", cluster.network,
         f"fabric: an arm of {settings.parallelism.world_size} ranks takes {settings.num_nodes} nodes"),
        (settings.num_nodes == 1 or cluster.kind == "slurm", "cluster.ranks_per_node", cluster.ranks_per_node,
         "0 on one machine: several nodes are Slurm's"),
        (settings.campaign.rounds >= 0, "campaign.rounds", settings.campaign.rounds, "0 (the constitution's budget) or more"),
        *((value > 0, key, value, "a number > 0") for key in POSITIVE for value in [attrgetter(key)(settings)]),
        (0 < recipe.sequence_length <= settings.model.max_sequence_length, "recipe.sequence_length", recipe.sequence_length,
         f"1 to model.max_sequence_length = {settings.model.max_sequence_length}"),
        (0 <= recipe.lora.dropout < 1, "recipe.lora.dropout", recipe.lora.dropout, "0 <= dropout < 1"),
        (1 <= recipe.lora.rank <= 32, "recipe.lora.rank", recipe.lora.rank, "1 to 32, the competition's limit"),
    ]  # fmt: skip
    for holds, key, found, valid in rules:
        if not holds:
            raise ConfigError(f"{key} = {found}", f"Valid: {valid}")


def _floats(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float of a configuration, by its dotted key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _floats(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, float):
        yield key, values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
