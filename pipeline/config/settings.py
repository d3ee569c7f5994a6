"""Compose the Hydra configuration into typed `Settings`. Only this module imports hydra and omegaconf.

Hydra composes `hydra_conf/`, or the copy that a campaign froze, and this module merges the result into the dataclasses of schema.py.
An unknown key, a wrong type or a value out of range is therefore reported before anything is submitted. The rest of the pipeline uses
the dataclasses; a process of the substrate gets the same values as JSON.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import CODE_ROOT
from pipeline.campaign.records import Policy, Setting
from pipeline.config import credentials, decoding, override_errors, policy_schema, request_rules, requests
from pipeline.config.footprint import RECOMPUTE
from pipeline.config.model_size import MOMENTS
from pipeline.config.schema import Settings

SOURCE = CODE_ROOT / "hydra_conf"
"""The configuration beside this package, in the checkout or in the frozen code of a campaign."""
DAY_SECONDS = 86400
POSITIVE = (
    "recipe.learning_rate", "recipe.num_steps", "recipe.batch_size", "recipe.micro_batch_tokens", "recipe.checkpoint_every",
    "tasks.num_train_per_family", "tasks.num_dev_per_family", "tasks.num_fresh_per_family", "tasks.max_new_tokens",
    "tasks.decode_batch_size", "external.timeout_seconds",
    "cluster.stall_minutes", "cluster.shm_size_gib",
)  # fmt: skip
PROPOSERS = ("none", "llm", "optuna")
NOT_NEGATIVE = (
    "cluster.ranks_per_node", "cluster.signal_lead_seconds", "cluster.arms_at_once",
    "cluster.checkpoint_minutes", "cluster.file_wait_seconds",
    "cluster.capacity.gpu_memory_gib", "cluster.capacity.train_tokens_per_second",
    "cluster.capacity.start_seconds",
    "tasks.expected.row_tokens", "tasks.expected.completion_tokens", "cluster.capacity.price_per_gpu_hour", "external.rows", "external.submissions",
    "external.wait_seconds", "external.give_up_days", "external.shift", "external.temperature",
)  # fmt: skip


def compose(overrides: Sequence[str] = (), source: Path = SOURCE, campaign_dir: Path | None = None) -> Settings:
    """Compose `campaign.yaml` of `source` with Hydra overrides, such as "recipe.num_steps=10".

    campaign_dir: a campaign whose rounds can then be named, as in "+round=r0002". Raises ConfigError for an unknown group, option or
    key, or a value that does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    override_errors.check_site_files(source)
    try:
        with initialize_config_dir(str(source), version_base="1.3"):
            composed = hydra_compose("campaign", overrides=[*search_path(campaign_dir), *overrides])
        return typed(composed, source)
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
    ) as error:  # a ValueError is Hydra's, for a number as a group's option
        known = [] if not overrides else _keys(compose(source=source).to_dict())
        raise override_errors.of_hydra(error, overrides, source, known) from error


def _keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted key of every setting."""
    keys = []
    for key, value in config.items():
        keys += _keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys


def search_path(campaign_dir: Path | None) -> list[str]:
    """Return the override with which Hydra finds the rounds of a campaign, as a list to put before the others; [] for None."""
    if not campaign_dir:
        return []
    quoted = str(campaign_dir).replace('"', r"\"")  # by Hydra's grammar
    return [f'hydra.searchpath=["file://{quoted}/hydra"]']


def typed(config: Any, source: Path = SOURCE) -> Settings:
    """Merge a plain configuration into the dataclasses, with the values that `auto` stands for.

    Raises ConfigError for an unknown key, a wrong type or a value out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    plain: Any = {}
    try:
        # Resolve interpolations first: the merge checks the types of the values that it gets.
        plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
        if "reasons" in plain:
            raise override_errors.unknown("reasons", source)
        if isinstance(plain.get("parallelism"), dict):
            plain["parallelism"] = _with_words(plain["parallelism"])
        if isinstance(plain.get("policy"), dict):
            plain["policy"] = policy_schema.with_ranges(plain["policy"], plain)
        asked = decoding.take_auto(plain)
        settings = _merged(plain)
        _check(settings)
        return decoding.settle(settings, asked, plain, _merged)
    except OmegaConfBaseException as error:
        raise override_errors.of_omegaconf(error, plain, source) from error


def _merged(plain: Mapping[str, Any]) -> Settings:
    """Return the dataclasses with these values and the requests of jobs that follow from them. Raises OmegaConf's errors."""
    from omegaconf import OmegaConf

    values = dict(plain)
    if isinstance(plain.get("cluster"), dict):
        layout = plain.get("parallelism")
        values["cluster"] = requests.resolved(plain["cluster"], layout if isinstance(layout, dict) else {})
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), values))
    assert isinstance(settings, Settings)
    return settings


def _with_words(layout: dict[str, Any]) -> dict[str, Any]:
    """Take `recompute: true` as full and `false` as none, as configurations were written before there were words."""
    words = {True: "full", False: "none"}
    given = layout.get("recompute")
    return {**layout, "recompute": words[given]} if isinstance(given, bool) else layout


def load(path: Path) -> Settings:
    """Read a frozen `config.yaml`. Raises ConfigError as `typed`."""
    text = path.read_text()
    return copy.deepcopy(_written[text] if text in _written else _of_text(text))


_written: dict[str, Settings] = {}
"""Settings by the text that `remembered` made of them."""


def remembered(settings: Settings) -> str:
    """As `to_yaml`, for a text that this process will read again: `load` then need not parse it. A text reads as the settings it is made of."""
    text = to_yaml(settings)
    _written[text] = copy.deepcopy(settings)
    return text


@functools.lru_cache(maxsize=8)
def _of_text(text: str) -> Settings:
    """Parse a configuration. Results are cached, because a command reads one file several times and each takes a tenth of a second."""
    from omegaconf import OmegaConf

    return typed(OmegaConf.create(text))


def to_yaml(settings: Settings) -> str:
    """Return the settings as the text of a `config.yaml`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(settings.to_dict()))


def with_overrides(settings: Settings, overrides: Iterable[Setting]) -> Settings:
    """Return a copy with the values of some dotted keys replaced, and check it. Raises ConfigError for a bad key or value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Merge only the changed keys: merging everything took 40 ms for each of eight arms.
    changed = copy.deepcopy(settings)
    for key, value in overrides:
        is_list = isinstance(_at(settings, key), list)
        if value == "???":  # OmegaConf's mark for a missing value
            raise ConfigError(f"{key} = ??? is not a value", "The files in hydra_conf/ explain which values are valid")
        *path, last = key.split(".")
        parsed: Any = value.split(",") if is_list else value
        nested: Any = functools.reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), parsed)
        try:
            nested = OmegaConf.to_container(OmegaConf.create(nested), resolve=True)
            merged = OmegaConf.merge(_part(key.rpartition(".")[0].partition(".")[0]), nested)
        except OmegaConfBaseException as error:
            raise override_errors.of_omegaconf(error, nested, SOURCE) from error
        place: Any = functools.reduce(
            lambda at, name: at[name] if isinstance(at, dict) else getattr(at, name), path, changed
        )
        chosen = OmegaConf.select(merged, key)
        chosen = OmegaConf.to_object(chosen) if is_list else chosen
        if isinstance(place, dict):
            place[last] = chosen
        else:
            setattr(place, last, chosen)
    _check(changed)
    return changed


@functools.cache
def _part(name: str) -> Any:
    """One part of the settings, such as the recipe, with types and without values; all parts for "". A merge copies what it is given."""
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(OmegaConf.structured(Settings), [name]) if name else OmegaConf.structured(Settings)


def policy_of(settings: Settings) -> Policy:
    """Return the `policy` part of the settings as a record."""
    return Policy.from_hydra(asdict(settings.policy))


def value_of(settings: Settings, key: str) -> str:
    """Return the value under a dotted key as text, a list with commas. Raises ConfigError for a key that does not exist."""
    value = _at(settings, key)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _at(settings: Settings, key: str) -> Any:
    """Return the value under a dotted key. Raises ConfigError for a key that does not exist."""
    try:
        return functools.reduce(getitem, key.split("."), settings.to_dict())
    except (KeyError, TypeError):
        raise ConfigError(f"{key} is not a configuration key", "The files in hydra_conf/ list every key") from None


def _check(settings: Settings) -> None:
    """Raise ConfigError for the first value that has the right type and is invalid."""
    for key in ("recipe.mix", "recipe.options", "recipe.selection.family_weights"):
        for name, value in attrgetter(key)(settings).items():  # OmegaConf takes a list there
            if not isinstance(value, float):
                raise ConfigError(f"{key}.{name} = {value}", "Valid: a number")
    recipe, tasks, cluster = settings.recipe, settings.tasks, settings.cluster
    sizes = [
        (f"parallelism.{axis}", getattr(settings.parallelism, axis))
        for axis in ("tp", "pp", "ep", "cp", "dp", "judge_tp")
    ]
    rules = [
        *((size >= 1, key, size, "an integer of at least 1") for key, size in sizes),
        *((value >= 0, key, value, "a number >= 0") for key in NOT_NEGATIVE for value in [attrgetter(key)(settings)]),
        *request_rules.of_floats(settings.to_dict()),
        (settings.model.dtype in ("float32", "bfloat16"), "model.dtype", settings.model.dtype, "float32 or bfloat16"),
        (cluster.kernels in ("auto", "eager", "compiled"), "cluster.kernels", cluster.kernels, "auto, eager or compiled"),
        (tasks.engine in ("native", "vllm"), "tasks.engine", tasks.engine, "auto, native or vllm"),
        (tasks.engine == "native" or bool(tasks.engine_version), "tasks.engine_version", "empty",
         "the version of vLLM in the runtime, because a score depends on it"),
        (tasks.engine == "native" or bool(cluster.vllm_runtime), "cluster.vllm_runtime", "empty",
         "the folder of a virtual environment with vLLM, for tasks.engine=vllm"),
        (settings.parallelism.recompute in ("auto", *RECOMPUTE), "parallelism.recompute", settings.parallelism.recompute,
         f"auto, {', '.join(RECOMPUTE)}"),
        (cluster.capacity.scan in ("auto", "torch", "triton"), "cluster.capacity.scan", cluster.capacity.scan, "auto, torch or triton"),
        (cluster.kind in ("local", "slurm"), "cluster.kind", cluster.kind, "local or slurm"),
        (cluster.network in ("loopback", "fabric"), "cluster.network", cluster.network, "loopback or fabric"),
        (not recipe.real_share or bool(tasks.train_csv), "recipe.real_share", recipe.real_share,
         "0 without tasks.train_csv, from which the image gets its real rows"),
        *request_rules.of_puzzles(recipe, tasks),
        (set(recipe.mix) <= set(tasks.families), "recipe.mix", sorted(recipe.mix), f"shares of {tasks.families}"),
        (min(recipe.mix.values(), default=-1) >= 0 < sum(recipe.mix.values()), "recipe.mix", recipe.mix,
         "shares >= 0 that sum to more than 0"),
        (settings.num_nodes == 1 or cluster.network == "fabric", "cluster.network", cluster.network,
         f"fabric, because an arm of {settings.parallelism.world_size} ranks takes {settings.num_nodes} nodes here; or a layout (parallelism=...) "
         f"of at most {cluster.gpus} ranks, which fits into a node"),
        (cluster.network == "loopback" or cluster.gpus == cluster.gpus_per_node or cluster.kind == "local", "cluster.network", cluster.network,
         f"loopback, because an arm takes {cluster.gpus} of a node's {cluster.gpus_per_node} GPUs, and fabric is the network of the jobs beside it"),
        *(request_rules.of_whole_nodes(cluster.sbatch) if settings.num_nodes > 1 else ()),
        (settings.num_nodes == 1 or cluster.kind == "slurm", "cluster.ranks_per_node", cluster.ranks_per_node,
         "0 on one machine: only Slurm starts an arm on several nodes"),
        (settings.policy.rounds >= 0, "policy.rounds", settings.policy.rounds,
         "1 or more (with policy.confirmation=final_round 2 or more), or 0 for the constitution's number"),
        (settings.campaign.rounds >= 0, "campaign.rounds", settings.campaign.rounds, "0 (the constitution's budget) or more"),
        *((value > 0, key, value, "a number > 0") for key in POSITIVE for value in [attrgetter(key)(settings)]),
        (0 < recipe.sequence_length <= settings.model.max_sequence_length, "recipe.sequence_length", recipe.sequence_length,
         f"1 to model.max_sequence_length = {settings.model.max_sequence_length}. An experiment brings a length for its own model: choose the "
         f"experiment of the model {settings.model.name}, or leave model=... out"),
        (recipe.optimizer in MOMENTS, "recipe.optimizer", recipe.optimizer, ", ".join(MOMENTS)),
        (0 <= recipe.lora.dropout < 1, "recipe.lora.dropout", recipe.lora.dropout, "0 <= dropout < 1"),
        *request_rules.of_external(settings.external, settings.tasks),
        *credentials.of_endpoint(settings.policy.proposals, "policy.proposals.", cluster.kind == "slurm"),
        *credentials.of_endpoint(settings.worker.endpoint, "worker.endpoint.", cluster.kind == "slurm"),
        *policy_schema.rules_of_worker(settings.worker, settings.num_nodes), *request_rules.rules_of_server(settings.worker, cluster),
        request_rules.of_setup(cluster.setup),
        *(rule for role in filter(settings.worker.has_jobs, requests.ROLES) for rule in request_rules.of_request(cluster.request(role), role)),
        (settings.policy.proposals.kind in PROPOSERS, "policy.proposals.kind", settings.policy.proposals.kind, ", ".join(PROPOSERS)),
        (settings.policy.proposals.mode in ("shadow", "active"), "policy.proposals.mode", settings.policy.proposals.mode,
         "shadow (logged only) or active"),
        (0 < settings.policy.proposals.timeout_seconds <= DAY_SECONDS, "policy.proposals.timeout_seconds",
         settings.policy.proposals.timeout_seconds, "a number > 0, at most a day"),
        (settings.external.timeout_seconds <= DAY_SECONDS, "external.timeout_seconds", settings.external.timeout_seconds, "at most a day"),
        *((slots >= 1 and rate > 0, f"cluster.capacity.decode_tokens_per_second.{slots}", rate, "a rate > 0 by a number of sequences")
          for slots, rate in cluster.capacity.decode_tokens_per_second.items()),
        (0 < cluster.capacity.scaling <= 1, "cluster.capacity.scaling", cluster.capacity.scaling, "0 < scaling <= 1"),
        (0 <= tasks.expected.share_at_limit <= 1, "tasks.expected.share_at_limit", tasks.expected.share_at_limit, "0 to 1"),
        (1 <= recipe.lora.rank <= 32, "recipe.lora.rank", recipe.lora.rank, "1 to 32, the competition's limit"),
    ]  # fmt: skip
    for holds, key, value, valid in rules:
        if not holds:
            raise ConfigError(f"{key} = {credentials.printable(str(value))}", f"Valid: {valid}")
