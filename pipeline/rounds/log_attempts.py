"""Log what the workers left when a round is judged: a record `attempt` for each attempt, with its digests and its files.

    attempt   round r0001, arm a3, attempt 0, status, image_digest ... adapter_digest, plan_digest, files {path: sha256}
    agent     round r0001, arm a3, attempt 0, report {outcome, manifest, diff, usage ...} of an arm that an agent ran

Workers do not write the log, so the meta stage does. From the record an outsider sees, without HDF5, what an arm ran with, what judged it
and what its completions are. It stands in the log before the seed of the round's fresh items is revealed.
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
    """Log every ended attempt of this round and of r0000, and how the reference was judged on this round's items."""
    log = Log(campaign.log)
    for of_round in (campaign.round("r0000"), folder):
        for arm in (arm.name for arm in of_round.frozen_plan().arms):
            for attempt in of_round.attempts(arm):
                record = record_of(campaign, attempt)
                if record:
                    about = {"round": of_round.name, "arm": arm, "attempt": attempt.number}
                    log.append_news("attempt", about, **record)
                if record and attempt.agent_report.exists():
                    log.append_news("agent", about, report=read_json(attempt.agent_report))
    record = reference_record(campaign, folder)
    if record:
        log.append_news("attempt", {"round": folder.name, "arm": REFERENCE, "attempt": 0}, **record)


def record_of(campaign: Campaign, attempt: Attempt) -> dict[str, Any]:
    """The fields of an attempt's record; empty if it has not ended or its result cannot be read, which the arm's outcome then says."""
    try:
        attributes = results.read_attributes(attempt.result)
    except IntegrityError:
        return {}
    completions = sorted(attempt.completions_dir.glob("*.jsonl"))
    paths = [attempt.result, attempt.claim, attempt.sealed, attempt.data_card, attempt.probe, *completions]
    paths += [attempt.agent_report, attempt.transcript, attempt.fork_diff]
    return {**_facts(attributes, attempt.claim), "files": digests(campaign, paths)}


def reference_record(campaign: Campaign, folder: Round) -> dict[str, Any]:
    """The fields of the record for the reference's adapter, judged on a round's fresh items; empty if `reference.h5` cannot be read."""
    path = folder.folder / "reference.h5"
    try:
        attributes = results.read_attributes(path)
    except IntegrityError:
        return {}
    completions = sorted((folder.meta_dir / "completions").glob("*.jsonl"))
    return {**_facts(attributes, None), "files": digests(campaign, [path, *completions])}


def digests(campaign: Campaign, paths: Iterable[Path]) -> dict[str, str]:
    """Path below the campaign -> sha256, for those of `paths` that exist."""
    return {str(path.relative_to(campaign.folder)): files.file_digest(path) for path in paths if path.is_file()}


def _facts(attributes: Mapping[str, Any], claim: Path | None) -> dict[str, Any]:
    """Digests, status, role and seed of an attempt. GPU time is in whole seconds, because a record holds no float."""
    try:
        plan_digest = read_json(claim).get("plan_digest", "") if claim else ""
    except (NotFound, IntegrityError):
        plan_digest = ""  # every worker writes one into its claim, so an audit reports that it is missing
    facts = {name: attributes[name] for name in (*DIGESTS, "status", "exit_class", "role", "seed")}
    whole = {name: int(attributes[name]) for name in ("gpu_seconds", "train_gpu_seconds", "train_steps")}
    return {**facts, **whole, "plan_digest": plan_digest}
