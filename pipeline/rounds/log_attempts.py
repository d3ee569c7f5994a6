"""What the workers left, taken into the sealed log when a round is judged: of every attempt its digests, and every file of it by name.

    attempt   round r0001, arm a3, attempt 0, status, image_digest ... adapter_digest, plan_digest, files {path: sha256}

Only meta writes the log. The record lets an outsider see, without HDF5, what an arm ran and was judged with, and what its completions
are; it stands in the log before the seed of the round's fresh items is revealed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.campaign import files
from pipeline.campaign.errors import IntegrityError, NotFound
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.campaign.log import Log
from pipeline.execution import results

DIGESTS = ("image_digest", "runtime_digest", "constitution_digest", "config_digest", "adapter_digest")
REFERENCE = "reference"


def log_attempts(campaign: Campaign, folder: Round) -> None:
    """Every ended attempt of this round and of r0000, and the reference's judging on this round's items."""
    log = Log(campaign.log)
    for of_round in (campaign.round("r0000"), folder):
        for arm in (each.name for each in of_round.frozen_plan().arms):
            for attempt in of_round.attempts(arm):
                record = record_of(campaign, attempt)
                if record:
                    about = {"round": of_round.name, "arm": arm, "attempt": attempt.number}
                    log.append_news("attempt", about, **record)
    record = reference_record(campaign, folder)
    if record:
        log.append_news("attempt", {"round": folder.name, "arm": REFERENCE, "attempt": 0}, **record)


def record_of(campaign: Campaign, attempt: Attempt) -> dict[str, Any]:
    """Empty for an attempt that has not ended, or whose result cannot be read: the outcome says so."""
    try:
        found = results.read_attributes(attempt.result)
    except IntegrityError:
        return {}
    completions = sorted(attempt.completions_dir.glob("*.jsonl"))
    named = [attempt.result, attempt.claim, attempt.sealed, attempt.data_card, attempt.probe, *completions]
    return {**_facts(found, attempt.claim), "files": digests(campaign, named)}


def reference_record(campaign: Campaign, folder: Round) -> dict[str, Any]:
    """The reference's adapter judged on a round's fresh items, by meta or the job beside the arms."""
    path = folder.folder / "reference.h5"
    try:
        found = results.read_attributes(path)
    except IntegrityError:
        return {}
    completions = sorted((folder.meta_dir / "completions").glob("*.jsonl"))
    return {**_facts(found, None), "files": digests(campaign, [path, *completions])}


def digests(campaign: Campaign, paths: Iterable[Path]) -> dict[str, str]:
    """Of those that are there: path below the campaign -> sha256."""
    return {str(path.relative_to(campaign.folder)): files.file_digest(path) for path in paths if path.is_file()}


def _facts(found: Mapping[str, Any], claim: Path | None) -> dict[str, Any]:
    """Hours are whole seconds here: a record holds no float."""
    try:
        plan_digest = read_json(claim).get("plan_digest", "") if claim else ""
    except (NotFound, IntegrityError):
        plan_digest = ""  # nothing that was claimed ran without one; the audit says that it is missing
    kept = {name: found[name] for name in (*DIGESTS, "status", "exit_class", "role", "seed")}
    return {**kept, "gpu_seconds": int(found["gpu_seconds"]), "plan_digest": plan_digest}
