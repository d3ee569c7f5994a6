"""Run one stage of a frozen round by itself and wait for it: as a child process here, or as a job on Slurm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.campaign.errors import PipelineError, WorkFailed
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import Round
from pipeline.cluster import local_runner, slurm_clients, slurm_jobs, slurm_submit
from pipeline.cluster.stage_command import Stage
from pipeline.config import corrections
from pipeline.rounds import launch

POLL_SECONDS = 5.0


def run_stage(folder: Round, stage: Stage, job_file: Path, watch: Callable[[], None]) -> None:
    """Run a stage of the round and return when it has ended well.

    job_file: keeps the job's id, so that after an interruption the same job is waited for and no second one is submitted. watch: called
    again and again meanwhile.

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
    job_id = running_job(folder, job_file)
    if not job_id:
        job_id, mark = slurm_submit.submit_stage(folder.slurm_dir, code_dir, stage, launch.resources(folder))
        write_file(job_file, json.dumps({"job_id": job_id, "at": time.time()}))
        slurm_submit.keep(folder.slurm_dir, mark)
    try:
        job = await_job(folder, job_id, watch)
    except KeyboardInterrupt:
        slurm_clients.cancel_jobs([job_id])
        raise
    if job.state != "COMPLETED":
        logs = sorted(folder.slurm_dir.glob(f"{job_id}_*_log.*"))
        told = last_line(logs[0]) if logs else job.reason
        raise WorkFailed(f"job {job_id} is {job.state}: {told}", f"Read {folder.slurm_dir}/{job_id}_*_log.err")


def running_job(folder: Round, job_file: Path) -> str:
    """The id of a job that an earlier call submitted and that waits or runs; empty without one."""
    with suppress(OSError, PipelineError, KeyError, TypeError):
        known = read_json(job_file)
        job = slurm_jobs.query_jobs([known["job_id"]], [stage_name(folder)], known["at"]).jobs[known["job_id"]]
        if not (job.ended or job.absent):
            return str(known["job_id"])
    return ""


def await_job(folder: Round, job_id: str, watch: Callable[[], None]) -> slurm_jobs.Job:
    """Wait until Slurm says that the job has ended, and return it."""
    since = time.time()
    while True:
        job = slurm_jobs.query_jobs([job_id], [stage_name(folder)], since).jobs[job_id]
        if job.ended or job.absent:
            return job
        watch()
        time.sleep(POLL_SECONDS)


def stage_name(folder: Round) -> str:
    """The name under which Slurm knows the job."""
    return f"{launch.job_name(folder)}-arms"


def last_line(log: Path) -> str:
    """The last line of a log; empty if there is none."""
    with suppress(OSError):
        return " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
    return ""
