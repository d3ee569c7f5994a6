"""A campaign's frozen facts and how a round joins them: what `init`, `round`, the workers and the meta job all check first.

`campaign.yaml` is believed only where it equals the sealed `init` record; code, constitution and configuration only by digest. A
plan is logged before its file is written, and its file before anything is submitted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.campaign import canonical, files
from pipeline.campaign.constitution import HERE, Constitution
from pipeline.campaign.errors import IntegrityError, NotFound
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.campaign.records import Plan


def facts_of(campaign: Campaign) -> dict[str, Any]:
    """The frozen facts of a campaign, checked against the constitution and code on disk. Raises IntegrityError, NotFound."""
    if not campaign.frozen.exists():
        raise NotFound(f"{campaign.folder} is not a campaign", "`python -m pipeline round DIR` makes one")
    try:
        facts: dict[str, Any] = parse_yaml(campaign.frozen.read_text())
        logged = next(record["facts"] for record in Log(campaign.log).records() if record["event"] == "init")
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
    found = files.tree_digest(folder) if folder.is_dir() else "nothing"
    if found != facts["code_digest"]:
        raise IntegrityError(
            f"{folder} has digest {found[:16]}, frozen was {facts['code_digest'][:16]}", "Restore it from a copy"
        )
    return folder


def runtime_digest() -> str:
    """Digest of the Python and every installed package: their RECORD files hold the sha256 of each of their files."""
    parts = [f"python {platform.python_version()}"]
    for package in importlib.metadata.distributions():
        record = hashlib.sha256((package.read_text("RECORD") or "").encode()).hexdigest()
        parts.append(f"{package.metadata['Name']} {package.version} {record}")
    return canonical.digest(sorted(parts))


def read_plan(folder: Round, expected_digest: str | None = None) -> tuple[Plan, str]:
    """A frozen plan and its digest. Raises NotFound before it is frozen, IntegrityError when it is not what was logged or expected."""
    frozen = folder.frozen_plan()
    digest = canonical.digest(frozen.to_json())
    if expected_digest is not None and digest != expected_digest:
        raise IntegrityError(
            f"{folder.plan} has digest {digest[:16]}, the job was given {expected_digest[:16]}", "Restore the plan"
        )
    records = Log(folder.campaign.log).records()
    logged = [
        record["plan_digest"] for record in records if record["event"] == "plan" and record["round"] == folder.name
    ]
    if digest not in logged:
        raise IntegrityError(
            f"{folder.plan} differs from the plan of {folder.name} in {folder.campaign.log.name}", "Restore it"
        )
    if not folder.config.exists() or files.file_digest(folder.config) != frozen.config_digest:
        raise IntegrityError(
            f"{folder.config} is not the configuration that {folder.plan.name} was frozen with", "Restore it"
        )
    return frozen, digest


def load_constitution(expected_digest: str | None = None, folder: Path = HERE) -> Constitution:
    """Read and verify. Raises IntegrityError when the file does not match `DIGEST` or what the campaign froze, and where the
    environment holds what somebody may take for another constitution."""
    path = folder / "constitution.yaml"
    try:
        if path.is_symlink():
            raise IntegrityError(f"{path} is a symbolic link", "The constitution is a plain file")
        content = path.read_bytes()
        stated = (folder / "DIGEST").read_text().strip()
    except OSError as error:
        raise IntegrityError(f"cannot read the constitution in {folder}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    for expected, where in ((stated, f"{folder / 'DIGEST'}"), (expected_digest, "the campaign's frozen digest")):
        if expected is not None and found != expected:
            raise IntegrityError(
                f"{path} has digest {found[:16]}, {where} says {expected[:16]}",
                "A changed constitution needs a new campaign (and its new sha256 in constitution/DIGEST)",
            )
    _check_environment(found)
    return Constitution(found, parse_yaml(content)["articles"])


def _check_environment(digest: str) -> None:
    """Nothing there is ever read as a constitution; who tries is told, rather than left to believe that it took effect."""
    for name in os.environ:
        if "CONSTITUTION" in name.upper():
            raise IntegrityError(
                f"the environment names a constitution ({name})", f"Unset {name}: a campaign has the one that it froze"
            )
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        other = Path(folder, "constitution", "constitution.yaml")
        if other.is_file() and hashlib.sha256(other.read_bytes()).hexdigest() != digest:
            raise IntegrityError(
                f"{other} in PYTHONPATH is another constitution than the campaign's, {digest[:16]}",
                "Take it out of PYTHONPATH",
            )


def parse_yaml(content: str | bytes) -> Any:
    """Plain YAML, by libyaml where it is there: every command reads a campaign's facts, 30 ms in Python and 2 so. Raises yaml.YAMLError."""
    return yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Block-style YAML, keys in the order given."""
    return str(yaml.safe_dump(dict(content), sort_keys=False))
