"""A campaign's frozen facts and how a round joins them: what `init`, `round`, the workers and the meta job all check first.

`campaign.yaml` is believed only where it equals the sealed `init` record; code, constitution and configuration only by digest. A
plan is logged before its file is written, and its file before anything is submitted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline import canon, footprint, image, memory, seal, settings
from pipeline.errors import IntegrityError, NotFound
from pipeline.layout import Campaign, Round, parse_yaml, write_file
from pipeline.records import Plan, Policy


def check_plan_fits(chosen: settings.Settings) -> None:
    """Sizes as `check_sizes`, and memory, before anything is made. Raises ConfigError."""
    check_sizes(chosen)
    footprint.check_memory(chosen.to_dict())


def check_sizes(chosen: settings.Settings) -> None:
    """Model, layout, adapter targets and axes against one another. Raises ConfigError."""
    config = chosen.to_dict()
    gpus = chosen.cluster.gpus_per_node if chosen.cluster.kind == "slurm" else None
    memory.check_layout(config["model"], config["parallelism"], gpus)
    memory.adapter_shapes(config["model"], chosen.recipe.lora.rank, chosen.recipe.lora.targets)
    for axis in chosen.policy.axes:
        settings.value_of(chosen, axis.key)


def facts_of(campaign: Campaign) -> dict[str, Any]:
    """The frozen facts of a campaign, checked against the constitution and code on disk. Raises IntegrityError, NotFound."""
    if not campaign.frozen.exists():
        raise NotFound(f"{campaign.folder} is not a campaign", "`python -m pipeline round DIR` makes one")
    try:
        facts: dict[str, Any] = parse_yaml(campaign.frozen.read_text())
        logged = next(record["facts"] for record in seal.Log(campaign.log).records() if record["event"] == "init")
    except (UnicodeDecodeError, yaml.YAMLError, StopIteration, KeyError) as error:
        raise IntegrityError(f"{campaign.frozen} or {campaign.log} is damaged ({error!r})") from error
    if facts != logged:
        raise IntegrityError(
            f"{campaign.frozen} differs from the sealed init record in {campaign.log.name}", "Restore it"
        )
    return facts


def verified_code(campaign: Campaign, facts: Mapping[str, Any]) -> Path:
    """The frozen code, its digest checked. Raises IntegrityError naming what came and what was frozen."""
    folder = campaign.code_dir / facts["code_digest"][:16]
    found = image.tree_digest(folder) if folder.is_dir() else "nothing"
    if found != facts["code_digest"]:
        raise IntegrityError(
            f"{folder} has digest {found[:16]}, frozen was {facts['code_digest'][:16]}", "Restore it from a copy"
        )
    return folder


def freeze_plan(campaign: Campaign, frozen: Plan, config_yaml: str, basis: Mapping[str, Any]) -> str:
    """Log a plan, then write it and its configuration; returns the plan's digest. What is already there stays as it is.

    basis: what of the configuration the arms follow from (plan_basis), for whoever derives them again without reading YAML.
    """
    digest = seal.digest(frozen.to_json())
    seal.Log(campaign.log).append_once("basis", round=frozen.round, **basis)
    seal.Log(campaign.log).append_once("plan", round=frozen.round, plan_digest=digest, plan=frozen.to_json())
    folder = campaign.round(frozen.round)
    write_file(folder.config, config_yaml)
    write_file(folder.plan, seal.canonical(frozen.to_json()))
    return digest


def plan_basis(chosen: settings.Settings, policy: Policy, spent_gpu_seconds: int) -> dict[str, Any]:
    """Of a round's configuration what its arms, its items and its cost follow from, as text and integers.

    spent_gpu_seconds: of all attempts before this round.
    """
    keys = [axis.key for axis in policy.axes] + [contrast.key for contrast in policy.contrasts]
    tasks, recipe, gpus = chosen.tasks, chosen.recipe, gpus_of_arm(chosen)
    return {
        "config_digest": seal.digest_text(settings.to_yaml(chosen)),
        "seed": chosen.seed,
        "reference": {key: settings.value_of(chosen, key) for key in keys},
        "tasks": {
            "families": list(tasks.families),
            "level": tasks.level,
            "num_dev_per_family": tasks.num_dev_per_family,
            "num_fresh_per_family": tasks.num_fresh_per_family,
        },
        "proposals": {"kind": chosen.policy.proposals.kind, "mode": chosen.policy.proposals.mode},
        "external": chosen.external.kind,
        "tokens_per_arm": recipe.num_steps * recipe.batch_size * recipe.sequence_length,
        "gpus_per_arm": gpus,
        "time_limit_minutes": chosen.cluster.time_limit_minutes,
        "spent_gpu_seconds": spent_gpu_seconds,
    }


def gpus_of_arm(chosen: settings.Settings) -> int:
    """Whose hours an arm takes; none on a site without GPUs."""
    return chosen.parallelism.world_size if chosen.cluster.gpus_per_node else 0


def write_overrides(campaign: Campaign, round_name: str, content: Mapping[str, Any]) -> None:
    """One round's Hydra file. Everything in it is a string, a whole number or a list of these; no time, host or path."""
    write_file(campaign.overrides(round_name), canon.overrides_text(content))


def is_operational(override: str) -> bool:
    """Where a round runs may change between rounds; what it computes may not."""
    return override.lstrip("+~").startswith(("cluster=", "cluster.", "campaign."))


def runtime_digest() -> str:
    """Digest of the Python and every installed package: their RECORD files hold the sha256 of each of their files."""
    parts = [f"python {platform.python_version()}"]
    for package in importlib.metadata.distributions():
        record = hashlib.sha256((package.read_text("RECORD") or "").encode()).hexdigest()
        parts.append(f"{package.metadata['Name']} {package.version} {record}")
    return seal.digest(sorted(parts))


def read_plan(folder: Round, expected_digest: str | None = None) -> tuple[Plan, str]:
    """A frozen plan and its digest. Raises NotFound before it is frozen, IntegrityError when it is not what was logged or expected."""
    frozen = folder.frozen_plan()
    digest = seal.digest(frozen.to_json())
    if expected_digest is not None and digest != expected_digest:
        raise IntegrityError(
            f"{folder.plan} has digest {digest[:16]}, the job was given {expected_digest[:16]}", "Restore the plan"
        )
    records = seal.Log(folder.campaign.log).records()
    logged = [
        record["plan_digest"] for record in records if record["event"] == "plan" and record["round"] == folder.name
    ]
    if digest not in logged:
        raise IntegrityError(
            f"{folder.plan} differs from the plan of {folder.name} in {folder.campaign.log.name}", "Restore it"
        )
    if not folder.config.exists() or seal.file_digest(folder.config) != frozen.config_digest:
        raise IntegrityError(
            f"{folder.config} is not the configuration that {folder.plan.name} was frozen with", "Restore it"
        )
    return frozen, digest
