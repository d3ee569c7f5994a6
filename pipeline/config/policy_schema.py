"""The keys of hydra_conf/policy/ as dataclasses: axes, who proposes, how an improvement is confirmed, and what the last decision wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AxisSetting:
    """One axis, as records.Axis."""

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
class Proposals:
    """Who proposes settings for axis arms, and whether the answer counts (docs/proposals.md)."""

    kind: str = "none"  # none, llm (an OpenAI-compatible endpoint) or optuna
    mode: str = "shadow"  # shadow: logged only; active: what is accepted takes axis slots
    url: str = ""  # whole address, such as https://api.example.com/v1/chat/completions
    model: str = ""  # the endpoint's name for it
    api_key_env: str = ""  # environment variable that holds the key; empty: none. Never the key itself
    api_key_file: str = ""  # or a file that holds it
    timeout_seconds: int = 120  # for a whole call
    seed: int = 0  # sent to the endpoint, or used by Optuna's sampler
    leave_out: list[str] = field(default_factory=list)  # of what is sent: temperature, seed, response_format ...
    add: dict[str, Any] = field(default_factory=dict)  # to the request: max_completion_tokens, reasoning_effort ...


@dataclass
class PolicySetting:
    """A person chooses axes, confirmation, rounds and proposals; the last decision wrote the rest (`records.Policy`).

    `confirmation`: how an improvement is confirmed (`claims.assess_claims`). `rounds`: the number of rounds that the error rates are for
    (0: the constitution's number). Both are frozen at `init`.
    """

    axes: list[AxisSetting]
    confirmation: str = "running"
    rounds: int = 0
    standing: list[SettingEntry] = field(default_factory=list)
    dead_ends: list[SettingEntry] = field(default_factory=list)
    set_aside: list[SettingEntry] = field(default_factory=list)
    quiet: list[QuietEntry] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    replicates: int = 0
    contrasts: list[ContrastEntry] = field(default_factory=list)
    has_control: bool = False
    control: list[SettingEntry] = field(default_factory=list)
    repaired: list[RepairEntry] = field(default_factory=list)
    proposals: Proposals = field(default_factory=Proposals)
