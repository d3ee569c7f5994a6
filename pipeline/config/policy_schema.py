"""The keys of hydra_conf/policy/ and hydra_conf/worker/ as dataclasses: axes, who proposes, how an improvement is confirmed, what the last
decision wrote, and the agents that run arms.

An axis may give its range relative to the reference, as `factors` of the reference's value. `with_ranges` replaces them by the range that
they mean, so that the dataclasses, and with them every frozen file, have absolute values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from pipeline.campaign.errors import ConfigError

AGENTS = ("none", "llm")
SERVED = "served"
"""The `worker.endpoint.url` of the round's own model server, whose address nobody knows before its job runs."""
OWN_FLAGS = (
    "api-key", "host", "port", "uds", "served-model-name", "tensor-parallel-size", "enable-auto-tool-choice", "tool-call-parser",
    "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "model", "config",
)  # fmt: skip
"""Flags of `vllm serve` that follow from other settings, or that would open the server to others."""
AGENT_ROLES = ("anchor", "replicate", "axis")
"""Roles of the arms that an agent may run. An anchor or replicate repeats a recipe, so its agent may edit nothing."""


@dataclass
class AxisSetting:
    """One axis, as records.Axis. A file may have `factors` in place of `low` and `high` (`with_ranges`)."""

    name: str
    key: str
    kind: str
    low: str = ""
    high: str = ""
    choices: list[str] = field(default_factory=list)


@dataclass
class SettingEntry:
    """One setting: a dotted configuration key and its value as text."""

    key: str
    value: str


@dataclass
class QuietEntry:
    """An axis, and in how many looks in a row it gained nothing."""

    axis: str
    looks: int


@dataclass
class ContrastEntry:
    """One registered experiment, as records.Contrast."""

    family: str
    key: str
    expects: str


@dataclass
class RepairEntry:
    """A family with new dev items, and the first round that uses them."""

    family: str
    round: str


@dataclass
class ModelEndpoint:
    """An OpenAI-compatible endpoint of a language model. It never holds a key, only the place of one."""

    url: str = ""  # whole address, such as https://api.example.com/v1/chat/completions
    model: str = ""  # the endpoint's name for it
    api_key_env: str = ""  # environment variable that holds the key; empty: none. Never the key itself
    api_key_file: str = ""  # or a file that holds it
    timeout_seconds: int = 120  # for a whole call
    seed: int = 0  # sent to the endpoint, or used by Optuna's sampler
    leave_out: list[str] = field(default_factory=list)  # of what is sent: temperature, seed, response_format ...
    add: dict[str, Any] = field(default_factory=dict)  # to the request: max_completion_tokens, reasoning_effort ...


@dataclass
class Proposals(ModelEndpoint):
    """Who proposes settings for axis arms, and whether the answer counts (docs/proposals.md)."""

    kind: str = "none"  # none, llm (an OpenAI-compatible endpoint) or optuna
    mode: str = "shadow"  # shadow: logged only; active: what is accepted takes axis slots


@dataclass
class AgentBudget:
    """What the agent of one arm may spend. Article 16 has the most of each."""

    steps: int = 40  # answers of the model
    tokens: int = 400_000  # of all requests and answers, reasoning included
    answer_tokens: int = 4096  # of one answer
    money: float = 0.0  # in the endpoint's currency, by the two prices; 0: not limited
    attempts: int = 3  # starts of the full run, of which one completes
    gpu_seconds: int = 1800  # of everything that runs in the fork; where the site has no GPUs, rank-seconds
    wall_seconds: int = 3600  # of the whole session, training included


@dataclass
class ModelServer:
    """The server of `worker.endpoint.url=served`: vLLM of `cluster.vllm_runtime`, in a job of `cluster.agent` (docs/agents.md)."""

    weights_dir: str = ""  # published checkpoint to serve; empty: the campaign's own base weights (cluster.weights_dir)
    tool_call_parser: str = ""  # vLLM's name for the form in which this model calls tools
    arguments: list[str] = field(default_factory=list)  # further words of `vllm serve`
    wait_seconds: int = 3600  # that an arm waits for the server, and the server for its own first answer
    restarts: int = 3  # of a server that ends by itself


@dataclass
class Worker:
    """Who runs an arm: the recipe alone (`none`), or an agent that may edit its fork first (`llm`; docs/agents.md)."""

    agent: str = "none"
    roles: list[str] = field(default_factory=lambda: ["axis"])  # of the arms that an agent runs
    endpoint: ModelEndpoint = field(default_factory=ModelEndpoint)
    price_per_million_prompt_tokens: float = 0.0
    price_per_million_answer_tokens: float = 0.0
    budget: AgentBudget = field(default_factory=AgentBudget)
    scenarios: list[str] = field(default_factory=list)  # of the scripted model, by arm index; empty: the endpoint
    server: ModelServer = field(default_factory=ModelServer)

    @property
    def is_served(self) -> bool:
        """Whether the round serves its agents' model itself."""
        return self.agent == "llm" and self.endpoint.url == SERVED and not self.scenarios

    def has_jobs(self, role: str) -> bool:
        """Whether a round has jobs of a role of `requests.ROLES`: all have all but the server of the agents' model."""
        return role != "agent" or self.is_served

    def runs(self, role: str) -> bool:
        """Whether an agent runs the arms of a role."""
        return self.agent == "llm" and role in self.roles


@dataclass
class PolicySetting:
    """A person chooses axes, choice, confirmation, rounds and proposals; the last decision wrote the rest (`records.Policy`).

    `choice`: what is kept (`decision.promotion`). `confirmation`: how an improvement is confirmed (`claims.assess_claims`). `rounds`: the
    number of rounds that the error rates are for (0: the constitution's number). All three are frozen at `init`.
    """

    axes: list[AxisSetting]
    choice: str = "value"
    confirmation: str = "running"
    rounds: int = 0
    standing: list[SettingEntry] = field(default_factory=list)
    dead_ends: list[SettingEntry] = field(default_factory=list)
    set_aside: list[SettingEntry] = field(default_factory=list)
    tried: list[SettingEntry] = field(default_factory=list)
    quiet: list[QuietEntry] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    replicates: int = 0
    contrasts: list[ContrastEntry] = field(default_factory=list)
    has_control: bool = False
    control: list[SettingEntry] = field(default_factory=list)
    repaired: list[RepairEntry] = field(default_factory=list)
    proposals: Proposals = field(default_factory=Proposals)


def with_ranges(policy: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the policy with `low` and `high` in place of the `factors` of an axis, as exact decimals.

    config: the whole configuration, in which an axis's key is looked up. Raises ConfigError for factors that give no range.
    """
    axes = policy.get("axes")
    if not isinstance(axes, list):
        return dict(policy)  # the types are checked by whoever merges it
    return {**policy, "axes": [_with_range(axis, config) if _is_relative(axis) else axis for axis in axes]}


def _is_relative(axis: Any) -> bool:
    return isinstance(axis, Mapping) and "factors" in axis


def _with_range(axis: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return one axis with a range in place of its factors."""
    name, key, factors = axis.get("name"), str(axis.get("key")), axis["factors"]
    if "low" in axis or "high" in axis or "choices" in axis or not isinstance(factors, list) or len(factors) != 2:
        raise ConfigError(
            f"the axis {name} has factors = {factors}",
            'Give two factors, such as ["0.25", "4"], and neither low, high nor choices beside them',
        )
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    try:
        low, high = (Decimal(str(value)) * Decimal(str(factor)) for factor in factors)
    except InvalidOperation:
        raise ConfigError(
            f"the axis {name} has factors {factors} of {key} = {value}", "Factors need a key whose value is a number"
        ) from None
    ends = {"low": format(low.normalize(), "f"), "high": format(high.normalize(), "f")}
    return {key: entry for key, entry in axis.items() if key != "factors"} | ends


def rules_of_worker(worker: Worker, num_nodes: int) -> list[tuple[bool, str, object, str]]:
    """Return the rules of an agent's settings as (whether it holds, key, value, what is valid). num_nodes: of an arm."""
    budget, is_agent = worker.budget, worker.agent == "llm"
    counted = ("steps", "tokens", "answer_tokens", "attempts", "gpu_seconds", "wall_seconds")
    prices = ("price_per_million_prompt_tokens", "price_per_million_answer_tokens")
    return [
        (worker.agent in AGENTS, "worker.agent", worker.agent, " or ".join(AGENTS)),
        (not is_agent or bool(worker.roles), "worker.roles", worker.roles, f"roles among {', '.join(AGENT_ROLES)}"),
        (set(worker.roles) <= set(AGENT_ROLES), "worker.roles", worker.roles, f"roles among {', '.join(AGENT_ROLES)}"),
        (not is_agent or num_nodes == 1, "worker.agent", worker.agent,
         f"none, because an arm takes {num_nodes} nodes, and an agent's arm takes one; or a layout (parallelism=...) that fits a node"),
        (not is_agent or bool(worker.scenarios or worker.endpoint.url), "worker.endpoint.url", "empty",
         "the address of the model, served for a server of the round's own, or worker=scripted for a model that plays written scenarios"),
        (0 < worker.endpoint.timeout_seconds <= 86400, "worker.endpoint.timeout_seconds", worker.endpoint.timeout_seconds,
         "a number > 0, at most a day"),
        *((getattr(budget, name) > 0, f"worker.budget.{name}", getattr(budget, name), "a number > 0") for name in counted),
        (budget.money >= 0, "worker.budget.money", budget.money, "0 (no limit) or more"),
        *((getattr(worker, name) >= 0, f"worker.{name}", getattr(worker, name), "a price >= 0") for name in prices),
        (not budget.money or any(getattr(worker, name) for name in prices), "worker.budget.money", budget.money,
         "0 without worker.price_per_million_prompt_tokens or worker.price_per_million_answer_tokens, by which money is counted"),
    ]  # fmt: skip
