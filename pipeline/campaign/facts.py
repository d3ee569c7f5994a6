"""Read and verify what `init` and `round` froze: the campaign's facts, its code, its constitution and the plans of its rounds.

Every stage calls these functions first. They accept `campaign.yaml` only where it equals the `init` record of the sealed log, and
code, constitution and configuration only by digest. `round` logs a plan before it writes the plan's file, and writes the file before
it submits anything.
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
    """Return the facts in `campaign.yaml`. Raises NotFound without a campaign, IntegrityError where the sealed log has other facts."""
    if not campaign.frozen.exists():
        raise NotFound(
            f"{campaign.folder} is not a campaign", "Name a campaign's folder; `python -m pipeline round DIR` makes one"
        )
    try:
        facts: dict[str, Any] = parse_yaml(campaign.frozen.read_text())
        logged = next(record["facts"] for record in Log(campaign.log).records() if record["event"] == "init")
    except (UnicodeDecodeError, yaml.YAMLError, StopIteration, KeyError) as error:
        raise IntegrityError(
            f"{campaign.frozen} or {campaign.log} is damaged ({error!r})", "Restore both files from a copy"
        ) from error
    if facts != logged:
        raise IntegrityError(
            f"{campaign.frozen} differs from the sealed init record in {campaign.log.name}", "Restore it from a copy"
        )
    return facts


def verified_code(campaign: Campaign, facts: Mapping[str, Any]) -> Path:
    """Return the folder of the frozen code. Raises IntegrityError with both digests where it is not what `init` froze."""
    folder = campaign.code_dir / facts["code_digest"][:16]
    digest = files.tree_digest(folder) if folder.is_dir() else "of no folder"
    if digest != facts["code_digest"]:
        raise IntegrityError(
            f"{folder} has digest {digest[:16]}, but the campaign froze {facts['code_digest'][:16]}",
            "Restore it from a copy",
        )
    return folder


def runtime_digest() -> str:
    """Return a digest of the Python version and of every installed package, by the file digests in its RECORD."""
    parts = [f"python {platform.python_version()}"]
    for package in importlib.metadata.distributions():
        record = hashlib.sha256((package.read_text("RECORD") or "").encode()).hexdigest()
        parts.append(f"{package.metadata['Name']} {package.version} {record}")
    return canonical.digest(sorted(parts))


def read_plan(folder: Round, expected_digest: str | None = None) -> tuple[Plan, str]:
    """Return a round's frozen plan and its digest.

    Raises NotFound before the plan is frozen, and IntegrityError where the plan is not the logged one or has not `expected_digest`,
    or where the configuration beside it is not the one that the plan names.
    """
    frozen = folder.frozen_plan()
    digest = canonical.digest(frozen.to_json())
    if expected_digest is not None and digest != expected_digest:
        raise IntegrityError(
            f"{folder.plan} has digest {digest[:16]}, but the job was submitted for {expected_digest[:16]}",
            "Restore the plan from a copy",
        )
    records = Log(folder.campaign.log).records()
    logged = [
        record["plan_digest"] for record in records if record["event"] == "plan" and record["round"] == folder.name
    ]
    if digest not in logged:
        raise IntegrityError(
            f"{folder.plan} differs from the plan of {folder.name} in {folder.campaign.log.name}",
            "Restore it from a copy",
        )
    if not folder.config.exists() or files.file_digest(folder.config) != frozen.config_digest:
        raise IntegrityError(
            f"{folder.config} is not the configuration that {folder.plan.name} was frozen with",
            "Restore it from a copy",
        )
    return frozen, digest


def load_constitution(expected_digest: str | None = None, folder: Path = HERE) -> Constitution:
    """Read and verify the constitution in `folder`.

    Raises IntegrityError where the file does not match `DIGEST` or `expected_digest`, and where the environment seems to name
    another constitution.
    """
    path = folder / "constitution.yaml"
    try:
        if path.is_symlink():
            raise IntegrityError(f"{path} is a symbolic link", "Put the plain file there")
        content = path.read_bytes()
        stated = (folder / "DIGEST").read_text().strip()
    except OSError as error:
        raise IntegrityError(f"cannot read the constitution in {folder}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    for expected, where in ((stated, f"{folder / 'DIGEST'}"), (expected_digest, "the campaign's frozen digest")):
        if expected is not None and digest != expected:
            raise IntegrityError(
                f"{path} has digest {digest[:16]}, {where} says {expected[:16]}",
                "Restore the file; a changed constitution needs a new campaign and its sha256 in constitution/DIGEST",
            )
    _check_environment(digest)
    return Constitution(digest, parse_yaml(content)["articles"])


def _check_environment(digest: str) -> None:
    """The environment never chooses a constitution; raise where it tries to, so that nobody believes that it worked."""
    for name in os.environ:
        if "CONSTITUTION" in name.upper():
            raise IntegrityError(
                f"the environment names a constitution ({name})",
                f"Unset {name}: a campaign keeps the constitution that it froze",
            )
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        other = Path(folder, "constitution", "constitution.yaml")
        if other.is_file() and hashlib.sha256(other.read_bytes()).hexdigest() != digest:
            raise IntegrityError(
                f"PYTHONPATH leads to {other}, which is not the campaign's constitution {digest[:16]}",
                f"Take {folder} out of PYTHONPATH",
            )


def parse_yaml(content: str | bytes) -> Any:
    """Parse plain YAML. Raises yaml.YAMLError. libyaml, where it is installed, takes 2 ms for a campaign's facts instead of 30."""
    return yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Return block-style YAML with the keys in their order."""
    return str(yaml.safe_dump(dict(content), sort_keys=False))
