"""What a person does to a round that is on its way: look into it, cancel, run again, close, tidy, chain.

Everything follows from files and from what Slurm says (`jobs`); an act that would write says what it would do under `dry_run`. An arm with
a published score is never run again, and one whose job waits or runs is not started beside it.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.campaign.errors import ConfigError, NotFound, WorkFailed
from pipeline.campaign.facts import read_plan
from pipeline.campaign.files import is_alive, read_json
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.cluster import slurm_jobs, slurm_submit
from pipeline.cluster.slurm_jobs import Job
from pipeline.execution import results
from pipeline.rounds import launch

LOGS = ("trial", "judge", "job")


def job_states(folder: Round) -> dict[str, Job]:
    """ "r0001/a3", "reference" and "meta" -> what Slurm says of its newest job; empty where nothing was submitted."""
    ids = slurm_jobs.task_ids(folder)
    if not ids:
        return {}
    found = slurm_jobs.query_jobs(ids.values(), job_names(folder))
    return {arm: found[job_id] for arm, job_id in ids.items()}


def job_names(folder: Round) -> list[str]:
    """Of every job of the round, those of reruns among them."""
    name = launch.resources(folder).job_name
    return [f"{name}-{role}" for role in ("arms", "reference", "meta")]


def logs_of(folder: Round, arm: str, which: str | None = None) -> list[Path]:
    """The logs of an arm's newest attempt that are there: trial, judge, and its job's own. Raises NotFound without any."""
    attempts = folder.attempts(arm)
    found: dict[str, list[Path]] = {"trial": [], "judge": [], "job": []}
    if attempts:
        found["trial"], found["judge"] = [attempts[-1].trial_log], [attempts[-1].judge_log]
    job_id = slurm_jobs.task_ids(folder).get(f"{folder.name}/{arm}")
    if job_id:
        found["job"] = sorted(folder.slurm_dir.glob(f"{job_id}_*_log.out"))
    found["job"].append(folder.logs_dir / f"{folder.name}_{arm}.log")
    paths = [path for name in ([which] if which else LOGS) for path in found[name] if path.exists()]
    if not paths:
        raise NotFound(
            f"{folder.name}/{arm} has no {which or ''} log yet".replace("  ", " "), "`status` shows what it does"
        )
    return paths


def chosen_arms(folder: Round, asked: Sequence[str], *, failed: bool = False) -> list[str]:
    """Names that exist; without any, all that have no score. failed: those whose newest attempt ended without one."""
    known = [arm.name for arm in read_plan(folder)[0].arms]
    if unknown := [arm for arm in asked if arm not in known]:
        raise ConfigError(f"{folder.name} has no arm {unknown[0]}", f"Valid: {', '.join(known)}")
    arms = list(asked) or [arm for arm in known if results.status_of(folder.published(arm)) != "completed"]
    return [arm for arm in arms if not failed or folder.attempts(arm)]


def cancel(campaign: Campaign, folder: Round, asked: Sequence[str], *, dry_run: bool = False) -> list[str]:
    """Stop what waits or runs of these arms; without any, of the whole round, its meta job too. Says what, a line each."""
    states = job_states(folder)
    wanted = [f"{folder.name}/{arm}" for arm in chosen_arms(folder, asked)] + ([] if asked else ["reference", "meta"])
    ids = {arm: states[arm].job_id for arm in wanted if arm in states and not states[arm].ended}
    said = [f"{arm}: scancel {job_id}" for arm, job_id in ids.items()]
    if ids and not dry_run:
        done = subprocess.run(["scancel", *ids.values()], capture_output=True, text=True)
        if done.returncode:
            raise WorkFailed(f"scancel: {done.stderr.strip()}", "Is it your job? `squeue --me`")
    for arm in chosen_arms(folder, asked):
        for attempt in folder.attempts(arm)[-1:]:
            pid = _local_pid(attempt)
            if pid:
                said.append(f"{folder.name}/{arm}: SIGTERM to process {pid}, which saves its state")
                if not dry_run:
                    os.kill(pid, signal.SIGTERM)
    return said


def _local_pid(attempt: Attempt) -> int | None:
    """The worker's process where it is one of this host, outside Slurm, and runs."""
    claim = read_json(attempt.claim) if attempt.claim.exists() else {}
    if claim.get("host") != platform.node() or claim.get("slurm_job_id") or attempt.result.exists():
        return None
    return int(claim["pid"]) if is_alive(claim["pid"]) else None


def rerun(
    campaign: Campaign, folder: Round, asked: Sequence[str], *, failed: bool, dry_run: bool, watch: Callable[[], None]
) -> list[str]:
    """Start arms without a score again, then the meta stage; nodes that lost one are left out. Says what, a line each.

    Raises ConfigError for an arm that has a score, or whose job waits or runs (unless we are that job, and end now); WorkFailed
    where Slurm does not answer.
    """
    arms = chosen_arms(folder, asked, failed=failed)
    states = job_states(folder)
    if not folder.closed.exists() and slurm_jobs.are_silent(states):
        raise WorkFailed(
            f"Slurm does not answer: whether jobs of {folder.name} run cannot be known, and none can be submitted",
            "`sinfo` must work in this shell (SLURM_CONF)",
        )
    for arm in arms:
        job = states.get(f"{folder.name}/{arm}")
        if results.status_of(folder.published(arm)) == "completed":
            raise ConfigError(f"{folder.name}/{arm} has a score", "It is never run again; another seed is another arm")
        if job and (job.waits or job.runs) and job.job_id != slurm_submit.this_job():
            raise ConfigError(
                f"{folder.name}/{arm} is {job.state.lower()} as job {job.job_id}", "`cancel` it first, or wait"
            )
        if (newest := folder.attempts(arm)[-1:]) and (pid := _local_pid(newest[0])):
            raise ConfigError(f"{folder.name}/{arm} runs here as process {pid}", "`cancel` it first, or wait")
    if not arms:
        return []
    _, digest = read_plan(folder)
    stages = [("worker", str(campaign.folder), folder.name, arm, "--plan", digest) for arm in arms]
    if launch.is_local(folder):
        if not dry_run:
            launch.run_here(campaign, folder, watch, only=arms)
        return [f"{folder.name}/{arm}: again, on this machine" for arm in arms]
    excluded = slurm_jobs.lost_nodes(folder, arms)
    wanted = launch.resources(folder)
    if excluded:
        wanted = replace(wanted, flags=(*wanted.flags, ("exclude", ",".join(excluded))))
    without = f", without {', '.join(excluded)}" if excluded else ""
    if dry_run:
        return [f"{folder.name}/{arm}: one more job{without}" for arm in arms]
    with launch.held(folder):
        code_dir, _ = launch.verified(campaign, folder)
        meta = launch.meta_stage(campaign, folder)
        ids = slurm_submit.submit(folder.slurm_dir, code_dir, [stages], meta, wanted)
        tasks = launch.tasks_of([stages], ids)
        slurm_jobs.record_submission(folder, tasks, ids["meta_job_id"], "rerun")
    return [f"{arm}: job {job_id}{without}" for arm, job_id in tasks.items()]
