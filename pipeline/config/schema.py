"""The configuration as dataclasses: the keys of hydra_conf/ with their types and units. settings.py fills and checks them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.config.policy_schema import PolicySetting, Worker
from pipeline.config.requests import Request


@dataclass
class Model:
    """Sizes of a Nemotron-H model; `pattern` has one letter per layer: M Mamba-2, E mixture of experts, * attention."""

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
    """The adapter's sizes. `targets` are module names of the published checkpoint, as in `model_size.lora_shapes`."""

    rank: int
    alpha: int
    dropout: float
    targets: list[str]


@dataclass
class Selection:
    """Which state of a training run becomes its adapter; hydra_conf/recipe/ explains the choices."""

    choice: str
    last_k: int
    family_weights: dict[str, float]


@dataclass
class Recipe:
    """How a trial trains; every field is explained in hydra_conf/recipe/ and checked again by the recipe in the image."""

    method: str
    num_steps: int
    batch_size: int  # sequences per step, over all data-parallel ranks
    micro_batch_tokens: int  # most tokens in a forward pass of one rank
    sequence_length: int  # tokens, at most
    learning_rate: float  # peak
    optimizer: str
    weight_decay: float
    clip_norm: float
    schedule: str
    warmup_steps: int
    min_lr_ratio: float
    checkpoint_every: int  # steps
    trace_style: str
    loss_weighting: str
    epochs: float
    curriculum: str
    real_share: float
    holdout_per_family: int
    selection: Selection
    lora: Lora
    mix: dict[str, float]
    options: dict[str, float]  # the method's own numbers
    slice_share: float = 0.0

    @property
    def drawn(self) -> tuple[int, int]:
        """(times that completions are drawn in training, how many each time); (0, 0) for a method that draws none."""
        own = {name: int(value) for name, value in self.options.items()}
        if "samples_per_prompt" not in own:
            return 0, 0
        if updates := own.get("updates_per_rollout"):
            return -(-(self.num_steps - own["sft_steps"]) // updates), self.batch_size * updates
        return 1, own["num_prompts"] * own["samples_per_prompt"]


@dataclass
class Parallelism:
    """Number of ranks along each axis. `judge_tp` is the tensor parallelism of decoding, in files also `auto`.

    `recompute`: what the backward pass computes again, none, selective, full or auto, the first that fits (`footprint.recompute_of`).
    """

    tp: int
    pp: int
    ep: int
    cp: int
    dp: int
    judge_tp: int
    recompute: str

    @property
    def world_size(self) -> int:
        """Number of ranks of one arm; ep divides the same ranks."""
        return self.tp * self.pp * self.cp * self.dp

    def replicas(self, devices: int) -> int:
        """How many replicas of the model decode on so many devices of a node: one for each judge_tp of them."""
        return max(1, devices // self.judge_tp)


@dataclass
class Expected:
    """How long rows and completions are expected to be, for forecasts until a round has measured them. 0 tokens: as long as they may be."""

    row_tokens: float = 0.0
    completion_tokens: float = 0.0  # of a completion that ends by itself
    share_at_limit: float = 0.0  # of completions that reach max_new_tokens

    def lengths(self, number: int, limit: int, longest: int) -> list[int]:
        """The tokens of so many completions: `longest` of them reach the limit, spread evenly among the others."""
        usual = min(limit, round(self.completion_tokens) or limit)
        ends = {(2 * each + 1) * number // (2 * longest) for each in range(longest)}
        return [limit if each in ends else usual for each in range(number)]


@dataclass
class Tasks:
    """Which puzzles at which level (small or full), how many of each, and the limits of decoding."""

    level: str
    families: list[str]
    train_csv: str  # the competition's rows, for the image; empty: only generated puzzles
    registered: list[str]  # files of evaluation prompts ({"item_id", "prompt"} a line) that no real row may repeat
    num_train_per_family: int
    num_dev_per_family: int
    num_fresh_per_family: int
    max_new_tokens: int
    decode_batch_size: int
    engine: str  # native, or vllm in the runtime that cluster.vllm_runtime names; in files also auto
    engine_version: str  # of vllm: only scores of one engine and version are comparable
    expected: Expected = field(default_factory=Expected)
    dev_slices: dict[str, Any] = field(default_factory=dict)  # low and high of features, by family


@dataclass
class Capacity:
    """Memory, speed and price of one device, for forecasts. They are assumptions until a round has measured them; 0: unknown."""

    gpu_memory_gib: float
    train_tokens_per_second: float
    decode_tokens_per_second: dict[int, float]  # by the number of sequences that are decoded at once
    price_per_gpu_hour: float
    currency: str
    scaling: float = 1.0  # share of its rate that a GPU keeps at each doubling of an arm's GPUs
    scan: str = "auto"  # kernel of the Mamba layers in training: torch, triton, or auto (`footprint.scan_of`)
    start_seconds: float = 0.0  # from the start of a process to its first step

    @property
    def has_rates(self) -> bool:
        return bool(self.train_tokens_per_second and self.decode_tokens_per_second)

    def speed_up(self, devices: int) -> float:
        """How much faster so many devices are than one."""
        return devices * self.scaling ** math.log2(devices)


@dataclass
class Cluster(Request):
    """Where a round runs, and as a `Request` what the job of an arm asks for. An empty string leaves a setting to the site's default."""

    kind: str  # local or slurm
    scratch_dir: str  # node-local; empty: $TMPDIR or /tmp
    weights_dir: str  # published checkpoint of a model whose weights are not in the image
    stage_dir: str  # node-local folder for a copy of it; empty: read it in weights_dir
    ranks_per_node: int  # of an arm; 0: all of them, or as many as a node has GPUs
    network: str  # of a sandbox: loopback, or fabric (the host's network) for arms of several nodes
    shm_size_gib: int  # of /dev/shm in a sandbox, through which ranks of a node talk
    signal_lead_seconds: int  # USR2 this long before the limit
    stall_minutes: int  # a trial without progress for this long is killed
    arms_at_once: int  # 0: as many as fit
    capacity: Capacity
    vllm_runtime: str  # virtual environment of tasks.engine=vllm, read-only in its sandbox
    reference: Request  # of the job that judges the reference
    judge: Request  # of the job that judges what is left when the meta job runs
    agent: Request  # of the job that serves the agents' model (worker.endpoint.url=served)
    meta: Request  # of the meta job
    checkpoint_minutes: float = 0.0  # a trial saves its state at least so often; 0: by recipe.checkpoint_every alone
    file_wait_seconds: float = 0.0  # for what another machine wrote and this one does not see yet
    setup: list[str] = field(default_factory=list)  # shell lines before the work: modules, network variables
    kernels: str = "auto"  # what computes between matrix products: auto, eager or compiled (substrate/ops/kernels.py)
    runtime: list[str] = field(default_factory=list)  # words before `-m pipeline` in a stage; empty: this Python

    def request(self, role: str) -> Request:
        """What the jobs of a role ask for: worker, reference, judge, agent or meta."""
        own: Request = self if role == "worker" else getattr(self, role)
        return Request(**{each.name: getattr(own, each.name) for each in fields(Request)})


@dataclass
class External:
    """The external target: who else scores chosen adapters. hydra_conf/external/ explains every field; no round may change one."""

    kind: str = "none"  # none, local, kaggle, command or manual
    rows: int = 0  # hidden rows of the board: the local board makes so many; of another target, the known number, for the power of the board test
    submissions: int = 0  # arms of each round that are sent
    push: str = "meta"  # who sends: the meta job, or (login) `board push` on a login node, from outbox/
    wait_seconds: int = 0  # for scores after sending; the next meta stage asks for later ones
    give_up_days: int = 0  # UTC days after its sending for which stages wait for a public score; 0: without end. Each still asks once later
    timeout_seconds: int = 600  # for one call of a client or scorer
    shift: int = 0  # local: each item is the longest of 1 + shift draws
    real_share: float = 0.0  # local: share of the rows taken from the held-out real rows
    temperature: float = 0.0  # local: of its decoding, which gives the inference noise
    competition: str = ""  # kaggle: the last part of the competition's address
    score: str = "public"  # kaggle: public, or private, which is shown after the deadline
    command: list[str] = field(default_factory=list)  # command: argv with {adapter}, {archive}, {number}, {message}
    poll_command: list[str] = field(default_factory=list)  # command: argv that asks again; empty: `command` is repeated

    @property
    def generated_rows(self) -> int:
        """Rows of the local board that a generator makes; the others are held-out real rows."""
        return self.rows - round(self.rows * self.real_share)


@dataclass
class Chain:
    """Whether rounds follow one another: with `auto`, each meta job submits the next one, up to `rounds` (0: the constitution's number).

    `anchor_file`, `anchor_git`: a file and a git repository elsewhere that get every signed head of the log (docs/seal.md); empty: none.
    """

    auto: bool
    rounds: int
    anchor_file: str = ""
    anchor_git: str = ""


@dataclass
class Settings:
    """The whole configuration of a round; `round` is empty where only the campaign's defaults were composed.

    reasons: key -> why it has its value, of those that were `auto` when this was composed (decoding.py). They are no part of a frozen file.
    """

    model: Model
    recipe: Recipe
    parallelism: Parallelism
    tasks: Tasks
    cluster: Cluster
    campaign: Chain
    policy: PolicySetting
    seed: int
    external: External = field(default_factory=External)
    worker: Worker = field(default_factory=Worker)
    round: str = ""
    arm: str = ""
    reasons: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def devices_of(self, role: str) -> int:
        """GPUs of a node that a job of this role has, or cores of ranks where the site has no GPUs; of an arm those of its first node."""
        if not self.cluster.gpus_per_node:
            return self.parallelism.world_size
        return self.cluster.gpus if role == "worker" else self.cluster.request(role).gpus

    def judging_devices(self, role: str) -> int:
        """How many of these devices decode: those of all replicas."""
        return self.parallelism.replicas(self.devices_of(role)) * self.parallelism.judge_tp

    def items_of(self, item_set: str) -> int:
        """How many items a set has: dev or fresh."""
        tasks = self.tasks
        return len(tasks.families) * {"dev": tasks.num_dev_per_family, "fresh": tasks.num_fresh_per_family}[item_set]

    @property
    def serving_gpus(self) -> int:
        """GPUs of the job that serves the agents' model; 0 where none does."""
        return self.cluster.agent.gpus if self.worker.is_served else 0

    @property
    def num_nodes(self) -> int:
        """Number of nodes of one arm."""
        per_node = self.cluster.ranks_per_node or self.cluster.gpus or self.parallelism.world_size
        return max(1, self.parallelism.world_size // max(1, per_node))

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "reasons"}
