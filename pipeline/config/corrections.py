"""What a frozen round's jobs ask of Slurm, where a person corrected it before Slurm took any of them.

A round is frozen before Slurm sees it, so a partition that does not exist is frozen too. What jobs ask of the site decides nothing: no arm,
item or score follows from it. So the sealed plan and configuration stay as they are, and `slurm_request.json` beside them has the corrected
requests of every role; a record of the log names its digest. All that computes, and the GPUs, which article 4 counts, cannot be corrected.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.errors import ConfigError
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Round
from pipeline.config import settings
from pipeline.config.requests import ROLES, Request

NAMES = tuple(each.name for each in fields(Request) if each.name not in ("gpus_per_node", "gpus"))
"""The keys of a request that a correction may change."""


def of_round(folder: Round) -> settings.Settings:
    """Return the frozen configuration of a round with the corrected requests. The jobs of r0000 are submitted as those of r0001."""
    chosen = settings.load(folder.config)
    asked = folder if folder.number else folder.campaign.round("r0001")
    if not asked.slurm_request.exists():
        return chosen
    requests = {role: Request(**content) for role, content in read_json(asked.slurm_request).items()}
    cluster = chosen.cluster
    for name in NAMES:
        setattr(cluster, name, getattr(requests["worker"], name))
    cluster.reference, cluster.judge, cluster.agent, cluster.meta = (requests[role] for role in ROLES[1:])
    return chosen


def changes(folder: Round, chosen: settings.Settings) -> dict[str, str]:
    """Return each key of `cluster` that differs from what the round asks for now, with its new value as text.

    chosen: the configuration with the corrections. Raises ConfigError for a key that no correction may change, and for a longer time.
    """
    before, now = _flat(of_round(folder).to_dict()["cluster"]), _flat(chosen.to_dict()["cluster"])
    changed = [key for key in now if now[key] != before[key]]
    if wrong := [key for key in changed if key.rpartition(".")[2] not in NAMES]:
        raise ConfigError(
            f"round {folder.name} is frozen for another cluster: with {_pairs(before, wrong)}, now came {_pairs(now, wrong)}",
            f"Leave these out. A round that was never submitted takes other {', '.join(NAMES)}, also by role (cluster.meta.partition); "
            "the next round may run elsewhere",
        )
    counted = settings.load(folder.config).cluster.time_limit_minutes
    if chosen.cluster.time_limit_minutes > counted:
        raise ConfigError(
            f"cluster.time_limit_minutes = {chosen.cluster.time_limit_minutes}, but article 4 counted {counted} minutes for an arm of {folder.name}",
            f"Valid: at most {counted}",
        )
    return {key: str(now[key]) for key in changed}


def encoded(chosen: settings.Settings) -> bytes:
    """Return the bytes of `slurm_request.json`: role -> its request."""
    return canonical.encoded({role: asdict(chosen.cluster.request(role)) for role in ROLES})


def merged(earlier: list[str], given: list[str]) -> list[str]:
    """Return the overrides of a frozen round with those that a person gives now. Another site (cluster=mysite) drops the words of the old one."""
    words = copy.copy(earlier)
    for item in given:
        key = _key(item)
        if "." not in key and item not in words:
            words = [word for word in words if not _key(word).startswith(f"{key}.")]
        words = [*(word for word in words if _key(word) != key), item]
    return words


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _flat(cluster: Mapping[str, Any]) -> dict[str, Any]:
    shared = {f"cluster.{name}": value for name, value in cluster.items() if name not in ROLES}
    return shared | {f"cluster.{role}.{name}": value for role in ROLES[1:] for name, value in cluster[role].items()}


def _pairs(values: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={values[key]}" for key in keys[:4])
