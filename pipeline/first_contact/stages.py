"""Run one stage of a frozen round by itself and wait for it: as a child process here, or as a job on Slurm.

A job is named in the round's `jobs.jsonl`, as those of `round` and `rerun` are. So a call that follows an interrupted one waits for the job
that runs, `round` sees it too, and no arm is trained twice at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.campaign.errors import WorkFailed
from pipeline.campaign.files import is_alive
from pipeline.campaign.layout import Round
from pipeline.cluster import local_runner, slurm_clients, slurm_jobs, slurm_submit
from pipeline.cluster.stage_command import Stage
from pipeline.config import corrections
from pipeline.rounds import control, launch

POLL_SECONDS = 2.0
STOP_SECONDS = 300.0  # the longest wait for a job that was cancelled: it saves its state, and Slurm ends it at the latest after KillWait
SLURMS = ("srun:", "slurmstepd:")
"""How lines of a job's log begin that say that a task failed, and not why."""


def run_stage(folder: Round, stage: Stage, watch: Callable[[], None]) -> None:
    """Run a stage of the round and return when it has ended well. watch: called again and again meanwhile.

    Raises WorkFailed with the place of the log if the stage ends badly, and what submitting raises. Ctrl-C stops the stage.
    """
    chosen = corrections.of_round(folder)
    code_dir, _ = launch.verify_frozen(folder.campaign, folder)
    if chosen.cluster.kind == "local":
        gpus = local_runner.gpus_by_arm(chosen.cluster.gpus, chosen.cluster.gpus_per_node)
        codes = local_runner.run_local([stage], code_dir, 1, folder.logs_dir, watch, chosen.cluster.runtime, gpus)
        ((name, code),) = codes.items()
        log = folder.logs_dir / f"{name}.log"
        if code:
            raise WorkFailed(f"{stage[0]} ended with exit code {code}: {last_line(log)}", f"Read {log}")
        return
    job_id = job_of(folder, code_dir, stage)
    try:
        job = await_job(folder, job_id, watch)
    except KeyboardInterrupt:
        slurm_clients.cancel_jobs([job_id])
        raise
    if job.state != "COMPLETED":
        logs = sorted(folder.slurm_dir.glob(f"{job_id}_*_log.*"))
        told = last_line(logs[0]) if logs else job.reason
        where = f"Read {logs[0]}" if logs else f"`sacct -j {job_id}` and `scontrol show job {job_id}` say more"
        raise WorkFailed(f"job {job_id} is {job.state}: {told}", where)


def job_of(folder: Round, code_dir: Path, stage: Stage) -> str:
    """The id of the job that runs the stage: one that waits or runs, else one that is submitted now."""
    name = f"{folder.name}/{stage[3] if stage[0] == 'worker' else stage[0]}"
    with launch.patient_round_lock(folder, control.LOCK_SECONDS):
        known = control.ask_slurm(folder).jobs.get(name)
        if known and not (known.ended or known.absent):
            return known.job_id
        recorded = slurm_jobs.recorded_marks(folder)
        asked = launch.resources(folder)
        job_id, mark = slurm_submit.submit_stage(folder.slurm_dir, code_dir, stage, asked, recorded)
        slurm_jobs.record_submission(folder, {name: job_id}, "", "first-contact", {"submission": mark})
        slurm_submit.keep(folder.slurm_dir, mark)
        return job_id


def await_job(folder: Round, job_id: str, watch: Callable[[], None]) -> slurm_jobs.Job:
    """Wait until Slurm says that the job has ended, and return it."""
    while True:
        job = launch.query(folder, [job_id]).jobs[job_id]
        if job.ended or job.absent:
            return job
        watch()
        time.sleep(POLL_SECONDS)


def end_jobs(folder: Round) -> None:
    """Stop what works for the round, before its folder is removed: its jobs, recorded or not, and a worker on this machine.

    Else a job that holds an older configuration would work on in the folder that is made next. Raises WorkFailed for one that does not end.
    """
    left = [job_id for _, job_id in slurm_jobs.all_ids(folder)]
    if folder.slurm_dir.exists():
        left += slurm_submit.take_back_open(
            folder.slurm_dir, launch.job_names(folder), slurm_jobs.recorded_marks(folder)
        )
    pids = [pid for attempt in folder.attempts("a0")[-1:] if (pid := control.local_pid(attempt))]
    deadline, is_told = time.monotonic() + STOP_SECONDS, False
    while True:
        jobs = launch.query(folder, left).jobs
        left = [job_id for job_id in left if not (jobs[job_id].ended or jobs[job_id].absent)]
        pids = [pid for pid in pids if is_alive(pid)]
        if not (left or pids):
            return
        if not is_told:
            slurm_clients.cancel_jobs(left)
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            is_told = True
        if time.monotonic() > deadline:
            which = ", ".join([*(f"job {job_id}" for job_id in left), *(f"process {pid}" for pid in pids)])
            raise WorkFailed(
                f"{which} works for an earlier first contact, and does not end", "End it, then run the command again"
            )
        time.sleep(POLL_SECONDS)


def last_line(log: Path) -> str:
    """The last line of a log that the stage itself wrote; empty if there is none."""
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line and not line.startswith(SLURMS)), "")
    return ""
