"""What a person does to a running round: ask for job states, find logs, cancel arms, run arms again.

Every function works from the campaign's files and from Slurm's answers (slurm_jobs). With `dry_run` it changes nothing and returns what it
would do. An arm with a published score never runs again, and an arm whose job waits or runs is not started a second time.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.campaign.errors import ConfigError, NotFound, WorkFailed
from pipeline.campaign.facts import read_plan
from pipeline.campaign.files import is_alive, lock_holder, read_json
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.campaign.shared_path import wait_until
from pipeline.cluster import slurm_clients, slurm_jobs, slurm_submit
from pipeline.cluster.slurm_jobs import Job
from pipeline.config import settings
from pipeline.execution import results
from pipeline.model_calls import served
from pipeline.rounds import launch

LOGS = ("trial", "judge", "job")
REFERENCE = "reference"
OTHER_JOBS = (REFERENCE, "judge", "agent", "meta")  # of a round, beside its arms
LOCK_SECONDS = 60.0  # arms that end at a common time limit each run `rerun`, one after the other


def ask_slurm(folder: Round) -> slurm_jobs.Report:
    """The state of every arm's newest job; keys are like "r0001/a3", and "reference", "agent" and "meta". Empty if nothing was submitted."""
    ids = slurm_jobs.task_ids(folder)
    said = launch.query(folder, list(ids.values()))
    return replace(said, jobs={arm: said.jobs[job_id] for arm, job_id in ids.items()})


def await_results(
    folder: Round, arms: Sequence[tuple[Round, str]], seconds: float, states: Mapping[str, Job] | None = None
) -> list[str]:
    """Wait for results of ended jobs that another machine has published and this one does not see yet, for `seconds` at most.

    arms: (round, arm); the arm "reference" stands for reference.h5. Arms whose jobs wait or run are not waited for. states: what
    Slurm says, which is asked by default. Returns the names of those that were waited for in vain, such as "r0001/a3".
    """
    unseen = [(of, arm) for of, arm in arms if not is_seen(of, arm)]
    if not unseen or not seconds:
        return []
    jobs = ask_slurm(folder).jobs if states is None else states

    def may_be_late(of: Round, arm: str) -> bool:
        """Whether the arm's job may have published: it is completed, or nobody knows of it."""
        job = jobs.get(arm if arm == REFERENCE else f"{of.name}/{arm}")
        return job is None or job.state in ("COMPLETED", "COMPLETING") or not (job.waits or job.runs or job.ended)

    awaited = [each for each in unseen if may_be_late(*each)]
    folders = [place for of, arm in awaited for place in (of.folder, of.folder / arm)]
    wait_until(lambda: all(is_seen(*each) for each in awaited), seconds, folders)
    return [f"{of.name}/{arm}" for of, arm in awaited if not is_seen(of, arm)]


def is_seen(of: Round, arm: str) -> bool:
    """Whether the arm's newest result is published, as this machine sees it: it may see an older version, that of a failed attempt."""
    published = of.published(arm)
    if results.has_score(published):
        return True
    return published.exists() and not any(results.has_score(attempt.result) for attempt in of.attempts(arm))


def logs_of(folder: Round, arm: str, which: str | None = None) -> list[Path]:
    """The existing logs of an arm's newest attempt. which: `trial`, `judge` or `job`; all by default. Raises NotFound if there is none.

    arm: or one of OTHER_JOBS, which have a judge's log where they judged the reference.
    """
    is_arm = arm not in OTHER_JOBS
    attempts = folder.attempts(arm) if is_arm else []
    logs: dict[str, list[Path]] = {"trial": [], "judge": [], "job": []}
    if attempts:
        logs["trial"], logs["judge"] = [attempts[-1].trial_log], [attempts[-1].judge_log]
    else:
        logs["judge"] = [] if is_arm else [folder.server_log if arm == "agent" else folder.meta_dir / "judge.log"]
    job_id = slurm_jobs.task_ids(folder).get(f"{folder.name}/{arm}" if is_arm else arm)
    for at in [folder] if folder.number else [folder, folder.campaign.round("r0001")]:  # r0000 runs beside r0001
        logs["job"] += sorted(at.slurm_dir.glob(f"{job_id}_*_log.out")) if job_id else []
        logs["job"].append(at.logs_dir / (f"{folder.name}_{arm}.log" if is_arm else f"{arm}.log"))
    paths = [path for name in ([which] if which else LOGS) for path in logs[name] if path.exists()]
    if not paths:
        raise NotFound(
            f"{folder.name}/{arm} has no {f'{which} ' if which else ''}log yet", "`status` shows what it is doing"
        )
    return paths


def chosen_arms(folder: Round, asked: Sequence[str], *, failed: bool = False) -> list[str]:
    """The arms of a command: those asked for, or if none are, all without a score. failed: only arms that have an attempt.

    Raises ConfigError for an arm that the round does not have.
    """
    known = [arm.name for arm in read_plan(folder)[0].arms]
    if unknown := [arm for arm in asked if arm not in known]:
        raise ConfigError(f"{folder.name} has no arm {unknown[0]}", f"Valid: {', '.join(known)}")
    arms = list(asked) or [arm for arm in known if not results.has_score(folder.published(arm))]
    return [arm for arm in arms if not failed or folder.attempts(arm)]


def cancel(campaign: Campaign, folder: Round, asked: Sequence[str], *, dry_run: bool = False) -> list[str]:
    """Stop the jobs and processes of the given arms, or if none are given, of the whole round with its meta job. Returns a line for each.

    Of a whole round on this machine the `round` process is stopped, which ends its arms and would else go on with the next one.

    Raises ConfigError for an arm that the round does not have, WorkFailed if scancel fails.
    """
    arms = chosen_arms(folder, asked)
    known = slurm_jobs.all_ids(folder)
    if asked:
        known = [(arm, job_id) for arm, job_id in known if arm in {f"{folder.name}/{each}" for each in arms}]
    jobs = launch.query(folder, [job_id for _, job_id in known]).jobs
    left = [(arm, job_id) for arm, job_id in known if not (jobs[job_id].ended or jobs[job_id].absent)]
    lines = [f"{arm}: scancel {job_id}" for arm, job_id in left]
    if left and not dry_run:
        slurm_clients.cancel_jobs([job_id for _, job_id in left])
        with open(folder.cancelled, "a") as file:
            file.write(
                json.dumps({"jobs": [job_id for _, job_id in left], "uid": os.getuid(), "at": time.time()}) + "\n"
            )
    if not asked and not dry_run and slurm_submit.is_cut_short(folder.slurm_dir):
        with launch.round_lock(folder):
            cut = slurm_submit.take_back_open(
                folder.slurm_dir, launch.job_names(folder), slurm_jobs.recorded_marks(folder)
            )
        lines += [f"{folder.name}: scancel {job_id}, of a submission that was cut short" for job_id in cut]
    if not asked and (pid := round_pid(folder)):
        lines.append(f"{folder.name}: SIGTERM to process {pid}, the `round` here; its arms save their state")
        if not dry_run:
            os.kill(pid, signal.SIGTERM)
        return lines
    for arm in arms:
        for attempt in folder.attempts(arm)[-1:]:
            pid = local_pid(attempt)
            if pid:
                lines.append(f"{folder.name}/{arm}: SIGTERM to process {pid}, which saves its state")
                if not dry_run:
                    os.kill(pid, signal.SIGTERM)
    return lines


def round_pid(folder: Round) -> int | None:
    """The process that runs the round's arms on this host now. It holds the round's lock."""
    holder = lock_holder(folder.lock)
    if holder is None or folder.closed.exists() or not launch.is_local(folder):
        return None
    pid, host = holder
    return pid if host == platform.node() and pid != os.getpid() and is_alive(pid) else None


def local_pid(attempt: Attempt) -> int | None:
    """The process of the attempt's worker if it still runs, on this host and outside of Slurm."""
    claim = read_json(attempt.claim) if attempt.claim.exists() else {}
    if claim.get("host") != platform.node() or claim.get("slurm_job_id") or attempt.result.exists():
        return None
    return int(claim["pid"]) if is_alive(claim["pid"]) else None


def rerun(
    campaign: Campaign, folder: Round, asked: Sequence[str], *, failed: bool, dry_run: bool, watch: Callable[[], object]
) -> list[str]:
    """Start arms without a score again, and the meta stage after them. Returns a line for each job.

    Nodes of which Slurm says that they failed are excluded.

    Without `asked`, a job on Slurm also judges the reference if nobody else does: a meta job without GPUs cannot. failed: only arms that
    have an attempt, without those that a person cancelled. watch: called while the arms run on this machine.

    Raises ConfigError for an arm that has a score, or whose job waits or runs (unless this process runs inside that job). Raises
    WorkFailed if Slurm does not answer.
    """
    if dry_run or launch.is_local(folder):
        return _rerun(campaign, folder, asked, failed, dry_run, watch)
    with launch.patient_round_lock(
        folder, LOCK_SECONDS
    ):  # nobody starts an arm between our question to Slurm and our submission
        launch.adopt(folder)
        recorded = slurm_jobs.recorded_marks(folder)
        if slurm_submit.is_cut_short(folder.slurm_dir, recorded):
            raise WorkFailed(
                f"a submission of {folder.name} was cut short, and its jobs may run",
                f"`python -m pipeline round {folder.campaign.folder}` cancels them and submits the round again",
            )
        return _rerun(campaign, folder, asked, failed, dry_run, watch)


def _rerun(
    campaign: Campaign, folder: Round, asked: Sequence[str], failed: bool, dry_run: bool, watch: Callable[[], object]
) -> list[str]:
    """As `rerun`. The caller holds the round's lock where jobs are submitted."""
    arms = chosen_arms(folder, asked, failed=failed)
    said = ask_slurm(folder)
    states = said.jobs
    if not folder.closed.exists() and slurm_jobs.is_slurm_silent(states):
        why = f" ({said.complaints[0]})" if said.complaints else ""
        raise WorkFailed(
            f"Slurm does not answer{why}, so nobody knows whether jobs of {folder.name} run, and none can be submitted",
            "Make `sinfo` work in this shell (SLURM_CONF), then run `rerun` again",
        )
    completed = [(folder, arm) for arm in arms if _has_completed(states.get(f"{folder.name}/{arm}"))]
    if not asked and _has_completed(states.get(REFERENCE)):
        completed.append((folder, REFERENCE))
    if completed:  # their results are there, and may not be seen here yet
        await_results(folder, completed, settings.load(folder.config).cluster.file_wait_seconds, states)
        arms = chosen_arms(folder, asked, failed=failed)
    cancelled = {job_of for job_of, job in states.items() if job.is_cancelled} if failed and not asked else set()
    left_out = [arm for arm in arms if f"{folder.name}/{arm}" in cancelled]
    arms = [arm for arm in arms if arm not in left_out]
    for arm in arms:
        _check_may_run(folder, arm, states.get(f"{folder.name}/{arm}"), said.complaints)
    judge = states.get("judge")  # a judge job that waits or runs judges the reference too
    is_awaited = bool(judge and (judge.waits or judge.runs))
    has_reference = not asked and not is_awaited and _lacks_reference(campaign, folder, states.get(REFERENCE))
    why = "no job, because a person cancelled it; name it, and `rerun` starts it"
    left = [f"{folder.name}/{arm}: {why}" for arm in left_out]
    if not (arms or has_reference):
        return left
    if launch.is_local(folder):
        if not dry_run:
            launch.run_here(campaign, folder, watch, only=arms)
        return [f"{folder.name}/{arm}: again, on this machine" for arm in arms]
    excluded = launch.failed_nodes(folder, arms, states)
    asked_of_slurm = replace(launch.resources(folder), excluded_nodes=tuple(excluded))
    without = f", without {', '.join(excluded)}" if excluded else ""
    if dry_run:
        wanted = [*(f"{folder.name}/{arm}" for arm in arms), *(["reference"] if has_reference else [])]
        return [*(f"{arm}: one more job{without}" for arm in wanted), *left]
    code_dir, digest = launch.verify_frozen(campaign, folder)
    stages = launch.worker_stages(campaign, folder, arms, digest)
    arrays, meta = [stages] if stages else [], launch.meta_stage(campaign, folder)
    reference = launch.reference_stage(campaign, folder) if has_reference else None
    server = served.stage(folder, settings.load(folder.config).worker, arms)
    given = (asked_of_slurm, reference, slurm_jobs.recorded_marks(folder), None, server)
    ids = slurm_submit.submit(folder.slurm_dir, code_dir, arrays, meta, *given)
    tasks = launch.tasks_of(arrays, ids) | ({"reference": ids["reference_job_id"]} if has_reference else {})
    slurm_jobs.record_submission(folder, tasks, ids["meta_job_id"], "rerun", ids)
    slurm_submit.keep(folder.slurm_dir, ids["submission"])
    return [*(f"{arm}: job {job_id}{without}" for arm, job_id in tasks.items()), *left]


def _lacks_reference(campaign: Campaign, folder: Round, job: Job | None) -> bool:
    """Whether the reference has a score, is not judged on the round's items, and has no job that will. job: its newest, on Slurm."""
    is_judged = (folder.folder / "reference.h5").exists() or folder.closed.exists()
    has_ended = job is None or job.ended or _is_gone(folder, job)
    is_wanted = has_ended and not is_judged and not launch.is_local(folder)
    return is_wanted and results.has_score(campaign.round("r0000").published("a0"))


def _has_completed(job: Job | None) -> bool:
    """Whether Slurm says that the job ended with exit code 0, with which a worker ends only once it has published a score."""
    return job is not None and job.state == "COMPLETED"


def _check_may_run(folder: Round, arm: str, job: Job | None, complaints: Sequence[str]) -> None:
    """Raise ConfigError for an arm that has a score, or that waits or runs, WorkFailed where nobody knows that it does not.

    job: the state of its newest job. complaints: of Slurm's clients.
    """
    if results.has_score(folder.published(arm)):
        raise ConfigError(
            f"{folder.name}/{arm} has a score, and an arm with a score never runs again",
            "Leave it out; the next round trains other seeds",
        )
    if job and (job.waits or job.runs) and job.job_id != slurm_submit.this_job():
        raise ConfigError(
            f"{folder.name}/{arm} is {job.state.lower()} as job {job.job_id}", "Wait, or `cancel` it first"
        )
    if job and job.may_return and not folder.closed.exists():
        raise WorkFailed(
            f"job {job.job_id} of {folder.name}/{arm} ended as {job.state}, and Slurm may start it again",
            f"`cancel` it first, or wait {slurm_jobs.RETURN_SECONDS / 60:.0f} minutes",
        )
    if job and not job.ended and job.job_id != slurm_submit.this_job() and not _is_gone(folder, job):
        raise WorkFailed(
            f"nobody knows whether job {job.job_id} of {folder.name}/{arm} waits or runs ({_why_unknown(job, complaints)})",
            "Make `squeue` and `scontrol show job` answer in this shell for the user who submitted it, then run `rerun` again",
        )
    if (newest := folder.attempts(arm)[-1:]) and (pid := local_pid(newest[0])):
        raise ConfigError(f"{folder.name}/{arm} runs here as process {pid}", "Wait, or `cancel` it first")


def _is_gone(folder: Round, job: Job) -> bool:
    """Whether Slurm surely has the job no more. Some sites show nobody the jobs of others, so only the submitter or root can see that."""
    submitters = {submission.get("uid", os.getuid()) for submission in slurm_jobs.submissions(folder)}
    return job.absent and (os.getuid() == 0 or submitters == {os.getuid()})


def _why_unknown(job: Job, complaints: Sequence[str]) -> str:
    hidden = "another user submitted it, and a site may hide the jobs of others"
    return hidden if job.absent else "; ".join(complaints) or f"Slurm calls it {job.state}"
