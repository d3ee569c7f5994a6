"""Composed configuration -> typed `Settings`: the one door of hydra and omegaconf.

`hydra_conf/` (or the copy frozen into a campaign) is composed by Hydra as plain YAML and merged once into the dataclasses below, so
that an unknown key, a wrong type or a value out of range is named here, before anything is submitted. Behind this border the
rest of the pipeline sees dataclasses; a substrate process gets the same values as JSON.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any, cast

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import CODE_ROOT
from pipeline.campaign.records import NUM_ARMS, Policy, Setting
from pipeline.config.schema import Settings

SOURCE = CODE_ROOT / "hydra_conf"
"""Beside the package: in the checkout, and in the frozen code of a campaign."""
DAY_SECONDS = 86400
POSITIVE = (
    "recipe.learning_rate", "recipe.num_steps", "recipe.batch_size", "recipe.micro_batch_size", "recipe.checkpoint_every",
    "tasks.num_train_per_family", "tasks.num_dev_per_family", "tasks.num_fresh_per_family", "tasks.max_new_tokens",
    "tasks.decode_batch_size", "external.timeout_seconds",
    "cluster.cpus_per_task", "cluster.time_limit_minutes", "cluster.stall_minutes", "cluster.shm_size_gib",
)  # fmt: skip
PROPOSERS = ("none", "llm", "optuna")
NOT_NEGATIVE = (
    "cluster.gpus_per_node", "cluster.ranks_per_node", "cluster.mem_gb", "cluster.signal_lead_seconds", "cluster.arms_at_once",
    "cluster.capacity.gpu_memory_gib", "cluster.capacity.train_tokens_per_second",
    "cluster.capacity.decode_tokens_per_second", "cluster.capacity.price_per_gpu_hour", "external.rows", "external.submissions",
    "external.wait_seconds", "external.shift", "external.temperature",
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
        raise ConfigError(*_told(error, source)) from error
    except ValueError as error:  # Hydra's own, for a group that is given a number, and names no group
        raise ConfigError(f"{' '.join(overrides)}: {_one_line(error)}", "See hydra_conf/ for what there is") from error


def _told(error: Exception, source: Path) -> tuple[str, str]:
    """Hydra's sentence and the cure; for a key that there is not, its neighbours instead of the advice to add it."""
    missing = re.match(r"Could not override '([^']+)'", str(error))
    if not missing:
        return _one_line(error).partition("Config search path:")[
            0
        ].rstrip(), "See hydra_conf/ for what there is, or `python -m pipeline round --help`"
    near = difflib.get_close_matches(missing[1], _keys(compose(source=source).to_dict()), n=3, cutoff=0.5)
    cure = f"Near it: {', '.join(near)}" if near else "hydra_conf/ has every key with its meaning"
    return f"there is no setting {missing[1]}", cure


def _keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of every setting."""
    found = []
    for key, value in config.items():
        found += _keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return found


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
    return copy.deepcopy(_of_text(path.read_text()))


@functools.lru_cache(maxsize=8)
def _of_text(text: str) -> Settings:
    """What a command reads several times takes a tenth of a second each time."""
    from omegaconf import OmegaConf

    return typed(OmegaConf.create(text))


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
        only: Any = functools.reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), cast(Any, value))
        try:
            only = OmegaConf.to_container(OmegaConf.create(only), resolve=True)  # first, as in `typed`
            merged = OmegaConf.merge(OmegaConf.structured(Settings), only)
        except OmegaConfBaseException as error:
            raise ConfigError(_one_line(error), "Compare with the files in hydra_conf/") from error
        place: Any = functools.reduce(
            lambda at, name: at[name] if isinstance(at, dict) else getattr(at, name), path, changed
        )
        if isinstance(place, dict):
            place[last] = OmegaConf.select(merged, key)
        else:
            setattr(place, last, OmegaConf.select(merged, key))
    _check(changed)
    return changed


def policy_of(settings: Settings) -> Policy:
    """The policy as a record."""
    return Policy.from_hydra(asdict(settings.policy))


def value_of(settings: Settings, key: str) -> str:
    """The value under a dotted key, as text. Raises ConfigError for a key that does not exist."""
    try:
        return str(functools.reduce(getitem, key.split("."), settings.to_dict()))
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
        *_external(settings),
        (settings.policy.proposals.kind in PROPOSERS, "policy.proposals.kind", settings.policy.proposals.kind, ", ".join(PROPOSERS)),
        (settings.policy.proposals.mode in ("shadow", "active"), "policy.proposals.mode", settings.policy.proposals.mode,
         "shadow (logged only) or active"),
        (0 < settings.policy.proposals.timeout_seconds <= DAY_SECONDS, "policy.proposals.timeout_seconds",
         settings.policy.proposals.timeout_seconds, "a number > 0, at most a day"),
        (settings.external.timeout_seconds <= DAY_SECONDS, "external.timeout_seconds", settings.external.timeout_seconds, "at most a day"),
        (1 <= recipe.lora.rank <= 32, "recipe.lora.rank", recipe.lora.rank, "1 to 32, the competition's limit"),
    ]  # fmt: skip
    for holds, key, found, valid in rules:
        if not holds:
            raise ConfigError(f"{key} = {found}", f"Valid: {valid}")


def _external(settings: Settings) -> list[tuple[bool, str, object, str]]:
    """Rules of the external target: (holds, key, found, valid)."""
    target = settings.external
    kind, is_local = target.kind, target.kind == "local"
    kinds = ("none", "local", "kaggle", "command", "manual")
    return [
        (kind in kinds, "external.kind", kind, ", ".join(kinds)),
        (target.push in ("meta", "login"), "external.push", target.push, "meta or login"),
        (kind in ("kaggle", "command") or target.push == "meta", "external.push", target.push, f"meta, with external={kind}"),
        (target.score in ("public", "private"), "external.score", target.score, "public or private"),
        (0 <= target.submissions <= NUM_ARMS, "external.submissions", target.submissions, f"0 to {NUM_ARMS}"),
        (kind == "none" or target.submissions > 0, "external.submissions", target.submissions, f"at least 1, with external={kind}"),
        (kind == "none" or target.rows >= len(settings.tasks.families), "external.rows", target.rows,
         f"with external={kind} at least one of each of the {len(settings.tasks.families)} families"),
        (not is_local or not 0 < target.generated_rows < len(settings.tasks.families), "external.real_share", target.real_share,
         "a share that leaves no generated row, or one of each family"),
        (not is_local or target.shift < 100, "external.shift", target.shift, "0 to 99"),
        (0 <= target.real_share <= 1, "external.real_share", target.real_share, "0 to 1"),
        (not target.real_share or (is_local and bool(settings.tasks.train_csv)), "external.real_share", target.real_share,
         "0 without external=local and tasks.train_csv, from which the held-out real rows are"),
        (kind != "kaggle" or bool(target.competition), "external.competition", "empty", "the last part of the competition's address"),
        (kind != "command" or bool(target.command), "external.command", "empty", "the site's scorer and its arguments"),
    ]  # fmt: skip


def _floats(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float of a configuration, by its dotted key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _floats(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, float):
        yield key, values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
