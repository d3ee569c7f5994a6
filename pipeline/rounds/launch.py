"""`round`: freeze the next round and start it. Freezing needs no cluster; starting reads only what was frozen.

Frozen before submission: configuration, plan, sbatch texts. Then one array of eight workers and one meta job go to Slurm and the
command returns; with cluster=local the same stages run here as child processes, as many arms at once as fit, and the command waits.
A round that was interrupted locally, or has too few scores to decide, goes on when it is called again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical, heads
from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.campaign.facts import facts_of, read_plan, verified_code
from pipeline.campaign.files import exclusive_lock, read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.cluster import local_runner, slurm_jobs, slurm_submit, stage_command
from pipeline.config import settings
from pipeline.execution import results
from pipeline.sandbox import image


def arrays(campaign: Campaign, folder: Round) -> list[list[stage_command.Stage]]:
    """The worker stages of a round: its eight arms, and r0000's two where they are not published yet."""
    waiting: list[list[stage_command.Stage]] = []
    for of_round in (folder, campaign.round("r0000")):
        frozen, digest = read_plan(of_round)
        missing = [arm for arm in frozen.arms if results.status_of(of_round.published(arm.name)) != "completed"]
        if of_round is folder or missing:
            arms = frozen.arms if of_round is folder else missing
            waiting.append(
                [("worker", str(campaign.folder), of_round.name, arm.name, "--plan", digest) for arm in arms]
            )
    return waiting


def submit(campaign: Campaign, folder: Round) -> dict[str, object]:
    """Hand a frozen round to Slurm; returns what `submitted.json` holds. Raises ConfigError when it was submitted before."""
    with held(folder):
        if folder.submitted.exists():
            ids = read_json(folder.submitted).get("array_job_ids", [])
            raise ConfigError(
                f"round {folder.name} is submitted already (jobs {', '.join(ids)})",
                f"`python -m pipeline status {campaign.folder}` shows it; `python -m pipeline meta {campaign.folder}` closes it when its "
                "arms are done",
            )
        code_dir, digest = verified(campaign, folder)
        Log(campaign.log).append_once("slurm_submission", round=folder.name, plan_digest=digest, kind="slurm")
        stages = arrays(campaign, folder)
        beside: stage_command.Stage = ("reference", str(campaign.folder), folder.name)
        meta = meta_stage(campaign, folder)
        ids = slurm_submit.submit(folder.slurm_dir, code_dir, stages, meta, resources(folder), beside)
        tasks = tasks_of(stages, ids) | {"reference": ids["reference_job_id"]}
        slurm_jobs.record_submission(folder, tasks, ids["meta_job_id"], "round")
        record = {**ids, "plan_digest": digest, "submitted_at": datetime.now(UTC).isoformat(timespec="seconds")}
        write_file(folder.submitted, canonical.encoded(record))
        return record


def run_here(campaign: Campaign, folder: Round, watch: Callable[[], None], only: Sequence[str] = ()) -> None:
    """Run a frozen round on this machine: the arms that have no score yet (of it, `only` those), then the meta stage.

    Raises WorkFailed when the meta stage fails, ConfigError when the round belongs to Slurm or runs already.
    """
    with held(folder):
        if folder.submitted.exists() and read_json(folder.submitted)["kind"] == "slurm":
            raise ConfigError(
                f"round {folder.name} was submitted to Slurm", f"`python -m pipeline status {campaign.folder}` shows it"
            )
        code_dir, digest = verified(campaign, folder)
        Log(campaign.log).append_once("slurm_submission", round=folder.name, plan_digest=digest, kind="local")
        write_file(folder.submitted, canonical.encoded({"kind": "local", "pid": os.getpid(), "plan_digest": digest}))
        chosen = settings.load(folder.config)
        stages = [
            stage
            for array in arrays(campaign, folder)
            for stage in array
            if results.status_of(campaign.round(stage[2]).published(stage[3])) != "completed"
            and (not only or (stage[2] == folder.name and stage[3] in only))
        ]
        at_once = chosen.cluster.arms_at_once or max(1, available_cores() // chosen.parallelism.world_size)
        local_runner.run_local(stages, code_dir, at_once, folder.logs_dir, watch, chosen.cluster.runtime)
        codes = local_runner.run_local(
            [meta_stage(campaign, folder)], code_dir, 1, folder.logs_dir, watch, chosen.cluster.runtime
        )
        if codes["meta"]:
            tail = (folder.logs_dir / "meta.log").read_text().strip().splitlines()[-1:]
            raise WorkFailed(f"the meta stage exited {codes['meta']}: {' '.join(tail)}", f"See {folder.logs_dir}")


def tasks_of(stages: Sequence[Sequence[stage_command.Stage]], ids: Mapping[str, Any]) -> dict[str, str]:
    """ "r0001/a3" -> the job or array task that has it."""
    return {
        f"{stage[2]}/{stage[3]}": job_id
        for array, job_ids in zip(stages, ids["task_job_ids"], strict=True)
        for stage, job_id in zip(array, job_ids, strict=True)
    }


def is_local(folder: Round) -> bool:
    """Whether the frozen configuration runs the round on this machine."""
    return settings.load(folder.config).cluster.kind == "local"


def resources(folder: Round, chosen: settings.Settings | None = None) -> slurm_submit.Resources:
    """What the frozen configuration of a round, or the one that it is being frozen with, asks of Slurm."""
    chosen = chosen or settings.load(folder.config)
    cluster = chosen.cluster
    flags = ("partition", "account", "qos", "reservation", "constraint")
    return slurm_submit.Resources(
        job_name=f"{folder.folder.parent.parent.name}-{folder.name}",
        time_limit_minutes=cluster.time_limit_minutes,
        cpus_per_task=cluster.cpus_per_task,
        gpus_per_node=cluster.gpus_per_node,
        mem_gb=cluster.mem_gb,
        signal_lead_seconds=cluster.signal_lead_seconds,
        nodes=chosen.num_nodes,
        arms_at_once=cluster.arms_at_once,
        setup=tuple(cluster.setup),
        runtime=tuple(cluster.runtime),
        flags=tuple((name, getattr(cluster, name)) for name in flags if getattr(cluster, name)),
        comment=str(anchor_of_plan(folder)),
    )


def anchor_of_plan(folder: Round) -> heads.Anchor:
    """The round's plan in the sealed log, and with it everything before: what each of its jobs carries as its comment."""
    log = Log(folder.campaign.log)
    planned = [one["seq"] for one in log.records() if (one["event"], one.get("round")) == ("plan", folder.name)]
    return log.anchor(planned[-1])


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def meta_stage(campaign: Campaign, folder: Round) -> stage_command.Stage:
    return ("meta", str(campaign.folder), folder.name)


def verified(campaign: Campaign, folder: Round) -> tuple[Path, str]:
    """The frozen code's folder and the plan's digest, after everything that jobs rely on was compared with what was frozen."""
    facts = facts_of(campaign)
    code_dir = verified_code(campaign, facts)
    image.verify(campaign.image, facts["image"]["tree_digest"])
    _, digest = read_plan(folder)
    return code_dir, digest


def held(folder: Round) -> AbstractContextManager[None]:
    """One `round` at a time for one round. Raises ConfigError while another holds it."""
    return exclusive_lock(folder.folder / ".lock", f"`round` of {folder.name}")
