"""Composed configuration -> typed `Settings`: the one door of hydra and omegaconf.

`hydra_conf/` (or the copy frozen into a campaign) is composed by Hydra as plain YAML and merged once into the dataclasses below, so
that an unknown key, a wrong type or a value out of range is named here, before anything is submitted. Behind this border the
rest of the pipeline sees dataclasses; a substrate process gets the same values as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.records import Axis, Policy, Setting

SOURCE = Path(__file__).resolve().parent.parent / "hydra_conf"
"""Beside the package: in the checkout, and in the frozen code of a campaign."""

POSITIVE = (
    "recipe.learning_rate", "recipe.num_steps", "recipe.batch_size", "recipe.micro_batch_size", "recipe.checkpoint_every",
    "tasks.num_train_per_family", "tasks.num_dev_per_family", "tasks.num_fresh_per_family", "tasks.max_new_tokens",
    "tasks.decode_batch_size", "cluster.cpus_per_task", "cluster.time_limit_minutes", "cluster.stall_minutes", "cluster.shm_size_gib",
)  # fmt: skip
NOT_NEGATIVE = (
    "cluster.gpus_per_node", "cluster.mem_gb", "cluster.signal_lead_seconds", "cluster.arms_at_once",
    "cluster.capacity.gpu_memory_gib", "cluster.capacity.train_tokens_per_second",
    "cluster.capacity.decode_tokens_per_second", "cluster.capacity.price_per_gpu_hour",
)  # fmt: skip


@dataclass
class Model:
    """Sizes of a Nemotron-H model; `pattern` has one letter a layer: M Mamba-2, E mixture of experts, * attention."""

    name: str
    pattern: str
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_query_groups: int
    attention_head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    mamba_num_groups: int
    mamba_conv_kernel: int
    mamba_chunk_size: int
    num_experts: int
    moe_top_k: int
    moe_ffn_size: int
    moe_shared_expert_ffn_size: int
    moe_router_scaling: float
    norm_eps: float
    max_sequence_length: int  # tokens
    dtype: str  # float32 or bfloat16
    weights: str  # path inside the image


@dataclass
class Lora:
    """`targets` are module names as the published checkpoint has them."""

    rank: int
    alpha: int
    dropout: float
    targets: list[str]


@dataclass
class Recipe:
    """How a trial trains; every field is explained in hydra_conf/recipe/ and checked again by the recipe in the image."""

    method: str
    num_steps: int
    batch_size: int  # sequences a step, over all data-parallel ranks
    micro_batch_size: int  # sequences a forward pass of one rank
    sequence_length: int  # tokens, at most
    learning_rate: float  # peak
    weight_decay: float
    clip_norm: float
    schedule: str
    warmup_steps: int
    min_lr_ratio: float
    checkpoint_every: int  # steps
    trace_style: str
    lora: Lora
    mix: dict[str, float]


@dataclass
class Parallelism:
    """Ranks along each axis; `judge_tp` is the tensor parallelism of decoding, `recompute` trades a third more work for memory."""

    tp: int
    pp: int
    ep: int
    cp: int
    dp: int
    judge_tp: int
    recompute: bool

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@dataclass
class Tasks:
    """Which puzzles at which level, how many, and the decoding limits."""

    level: str
    families: list[str]
    num_train_per_family: int
    num_dev_per_family: int
    num_fresh_per_family: int
    max_new_tokens: int
    decode_batch_size: int
    engine: str  # native, or vllm in the runtime that cluster.vllm_runtime names
    engine_version: str  # of vllm: a score is one of its engine and version


@dataclass
class Capacity:
    """What one device of the site holds and does, for forecasts: assumed until a round has measured it; 0 where nobody knows."""

    gpu_memory_gib: float
    train_tokens_per_second: float
    decode_tokens_per_second: float
    price_per_gpu_hour: float
    currency: str


@dataclass
class Cluster:
    """Where a round runs. Empty strings leave the site's default."""

    kind: str  # local or slurm
    scratch_dir: str  # node-local; empty: $TMPDIR or /tmp
    weights_dir: str  # published checkpoint of a model whose weights are not in the image
    stage_dir: str  # node-local folder for a copy of it; empty: read where it is
    gpus_per_node: int
    network: str  # of a sandbox: loopback, or fabric for arms of several nodes, which opens the host's network
    shm_size_gib: int  # of /dev/shm in a sandbox, through which ranks of a node talk
    cpus_per_task: int
    mem_gb: int  # 0: the site's default
    time_limit_minutes: int
    signal_lead_seconds: int  # USR2 this long before the limit
    stall_minutes: int  # no step for this long: the trial is killed
    arms_at_once: int  # 0: as many as fit
    partition: str
    account: str
    qos: str
    reservation: str
    constraint: str
    capacity: Capacity
    vllm_runtime: str  # virtual environment of tasks.engine=vllm, read-only in its sandbox
    setup: list[str] = field(default_factory=list)  # shell lines before the work: modules, network variables


@dataclass
class AxisSetting:
    name: str
    key: str
    kind: str
    low: str = ""
    high: str = ""
    choices: list[str] = field(default_factory=list)


@dataclass
class SettingEntry:
    key: str
    value: str


@dataclass
class PolicySetting:
    axes: list[AxisSetting]
    standing: list[SettingEntry] = field(default_factory=list)
    dead_ends: list[SettingEntry] = field(default_factory=list)


@dataclass
class Settings:
    """A whole round's configuration; `round` is empty where only the campaign's defaults were composed."""

    model: Model
    recipe: Recipe
    parallelism: Parallelism
    tasks: Tasks
    cluster: Cluster
    policy: PolicySetting
    seed: int
    round: str = ""
    arm: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    config = settings.to_dict()
    for key, value in overrides:
        value_of(settings, key)
        *path, last = key.split(".")
        reduce(getitem, path, config)[last] = value
    return typed(config)


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
    rules = [
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
        (set(recipe.mix) <= set(tasks.families), "recipe.mix", sorted(recipe.mix), f"shares of {tasks.families}"),
        (min(recipe.mix.values(), default=-1) >= 0 < sum(recipe.mix.values()), "recipe.mix", recipe.mix,
         "shares >= 0 that sum to more than 0"),
        *((value > 0, key, value, "a number > 0") for key in POSITIVE for value in [attrgetter(key)(settings)]),
        *((value >= 0, key, value, "a number >= 0") for key in NOT_NEGATIVE for value in [attrgetter(key)(settings)]),
        (0 < recipe.sequence_length <= settings.model.max_sequence_length, "recipe.sequence_length", recipe.sequence_length,
         f"1 to model.max_sequence_length = {settings.model.max_sequence_length}"),
        (0 <= recipe.lora.dropout < 1, "recipe.lora.dropout", recipe.lora.dropout, "0 <= dropout < 1"),
        (1 <= recipe.lora.rank <= 32, "recipe.lora.rank", recipe.lora.rank, "1 to 32, the competition's limit"),
    ]  # fmt: skip
    for holds, key, found, valid in rules:
        if not holds:
            raise ConfigError(f"{key} = {found}", f"Valid: {valid}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
