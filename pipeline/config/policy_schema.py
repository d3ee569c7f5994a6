"""The keys of hydra_conf/policy/ as dataclasses: axes, who proposes, how an improvement is confirmed, and what the last decision wrote.

An axis may give its range relative to the reference, as `factors` of the reference's value. `with_ranges` replaces them by the range that
they mean, so that the dataclasses, and with them every frozen file, have absolute values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from pipeline.campaign.errors import ConfigError


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
