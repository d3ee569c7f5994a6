"""Slurm through submitit, its one door, and the same jobs as child processes where there is no Slurm.

A round is one array of eight workers and one meta job that waits for them with `afterany`: one failed worker must not strand
it. Beside the array one job judges the reference on the round's fresh items, so that meta finds its scores there; the first round's
array of r0000 (reference and base) is another array. submitit pickles only strings, a stage's
name and its arguments; the code that runs is the campaign's frozen copy, through PYTHONPATH. Nothing here waits on submitit's
results: files say what happened.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.campaign.errors import ConfigError, Interrupted, NotFound, WorkFailed
from pipeline.cluster.stage_command import Stage, command

REQUEUED, FORBIDDEN, ENDED = "requeued", "forbidden", "ended"
SECRET = re.compile(r"(token|secret|passw|api_?key|credential)", re.IGNORECASE)
"""In the name of a variable whose value nobody but its owner may see."""


@dataclass(frozen=True)
class Resources:
    """What one job asks of Slurm; empty strings leave the site's default."""

    job_name: str
    time_limit_minutes: int
    cpus_per_task: int
    gpus_per_node: int
    mem_gb: int
    signal_lead_seconds: int
    nodes: int = 1
    arms_at_once: int = 0
    setup: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()  # partition, account, qos, reservation, constraint where they are set
    comment: str = (
        ""  # an anchor of the sealed log (heads.py), which Slurm's accounting keeps where the site has it keep comments
    )


def run_stage(*stage: str) -> None:
    """What submitit runs inside a job: the stage as a child process, signals passed on, its exit code raised.

    submitit's own handlers count a signal as a time-out and requeue by their own rule; they are replaced. A stage that ends with 75
    saved its state: the job is requeued from here, outside the worker's namespaces, and the next start goes on.
    """
    # The next round is submitted from outside the meta stage: it runs in a namespace in which an ordinary user looks like root to sbatch.
    # A runtime that is a job step of its own (pyxis) has its own SLURM_PROCID: which task this is stands in POSTRAIN_TASK.
    task = {"POSTRAIN_TASK": os.environ.get("SLURM_PROCID", "0")}
    actual = ("chain", *stage[1:], "--meta") if stage[0] == "meta" else stage
    try:
        child = subprocess.Popen(command(actual), env={**os.environ, **task})
    except ConfigError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for name in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(name, pass_on)
    code = child.wait()
    if code == Interrupted.exit_code and os.environ.get("SLURM_PROCID", "0") == "0" and requeue_this_job() == FORBIDDEN:
        if stage[0] == "worker":  # what the reference's job leaves is done by the meta stage
            # Another job takes the arm on. `rerun` leaves everything as it is where that cannot be.
            subprocess.run(command(("rerun", *stage[1:4])))
    if code:
        raise SystemExit(code)


def submit(
    folder: Path,
    code_dir: Path,
    arrays: Sequence[Sequence[Stage]],
    meta: Stage,
    resources: Resources,
    reference: Stage | None = None,
) -> dict[str, Any]:
    """Submit every array, the job that judges the reference, and the meta job that waits for them all; returns their ids.

    reference: waits for the arrays after the first, which train it.

    Raises NotFound without sbatch, WorkFailed with Slurm's own sentence when it refuses; what it took before is then cancelled.
    """
    import submitit

    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise NotFound("sbatch and srun are not on PATH", "Run on a login node, or use cluster=local")
    executors = {name: _executor(folder, code_dir, resources, name) for name in ("worker", "reference", "meta")}
    array_ids: list[str] = []
    reference_id = ""
    task_ids: list[list[str]] = []
    with clean_environment():
        try:
            for stages in arrays:
                with executors["worker"].batch():
                    jobs = [executors["worker"].submit(run_stage, *stage) for stage in stages]
                array_ids.append(jobs[0].job_id.split("_")[0])
                task_ids.append([job.job_id for job in jobs])
            if reference:
                if array_ids[1:]:
                    executors["reference"].update_parameters(dependency=_after(array_ids[1:]))
                reference_id = executors["reference"].submit(run_stage, *reference).job_id
            executors["meta"].update_parameters(dependency=_after([*array_ids, *filter(None, [reference_id])]))
            meta_id = executors["meta"].submit(run_stage, *meta).job_id
        except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
            _cancel([*array_ids, *filter(None, [reference_id])])
            raise WorkFailed(
                f"sbatch refused: {_last_line(error)}", "Check `sinfo` and the cluster settings"
            ) from error
        except subprocess.SubprocessError as error:
            _cancel([*array_ids, *filter(None, [reference_id])])
            raise WorkFailed(f"sbatch failed: {_last_line(error)}", "Is the controller up? `scontrol ping`") from error
    return {"kind": "slurm", "array_job_ids": array_ids, "task_job_ids": task_ids, "reference_job_id": reference_id,
            "meta_job_id": meta_id}  # fmt: skip


def _after(job_ids: Sequence[str]) -> str:
    return "afterany:" + ":".join(job_ids)


def sbatch_texts(
    folder: Path, code_dir: Path, arrays: Sequence[Sequence[Stage]], resources: Resources
) -> dict[str, str]:
    """What would be given to sbatch, for the dry run and the frozen round; needs no Slurm."""
    from submitit.slurm.slurm import _make_sbatch_string

    text = {}
    named = [*((f"array_{number}", stages) for number, stages in enumerate(arrays)), ("reference", []), ("meta", [])]
    for name, stages in named:
        parameters = _parameters(code_dir, resources, name.split("_")[0])
        if stages:
            parameters["map_count"] = len(stages)
        elif name == "meta" or arrays[1:]:
            parameters["dependency"] = "afterany:<array ids>"
        body = f"{shlex.quote(sys.executable)} -P -u -m submitit.core._submit {shlex.quote(str(folder))}"
        text[name] = _make_sbatch_string(command=body, folder=folder, **parameters)
    return text


def requeue_this_job() -> str:
    """Have Slurm start the job that we run in again; returns REQUEUED, FORBIDDEN, or ENDED where that is not ours to say.

    FORBIDDEN: there is no Slurm, or it refuses. ENDED: the job does not run any more, for somebody cancelled or requeued it. From inside,
    `scontrol requeue` would bring a cancelled job back; it is refused to one that goes back by itself, beside which no other may
    start. A job whose time is up may go on.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or shutil.which("scontrol") is None:
        return FORBIDDEN
    said = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    words: dict[str, str] = dict(re.findall(r"(\w+)=(\S*)", said))
    if words.get("JobState", "RUNNING") != "RUNNING" and words.get("Reason") != "TimeLimit":
        return ENDED
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True)
    return FORBIDDEN if done.returncode else REQUEUED


def this_job() -> str:
    """The id of the job or array task that we run in, as Slurm's tables have it; empty outside."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def slurm_answers() -> bool:
    """Whether a Slurm controller answers on this host."""
    if shutil.which("scontrol") is None:
        return False
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=5).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@contextmanager
def clean_environment() -> Iterator[None]:
    """Without the caller's SBATCH_* and SLURM_* variables, which would leak into the submission; SLURM_CONF is kept.

    And without what is named as a secret is: sbatch copies its environment into job records. What a job must know lies in files.
    """
    kept = dict(os.environ)
    for name in kept:
        leaks = name.startswith(("SBATCH_", "SLURM_", "SRUN_")) and name != "SLURM_CONF"
        if leaks or SECRET.search(name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _executor(folder: Path, code_dir: Path, resources: Resources, role: str) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(folder, max_num_timeout=0, python=f"{shlex.quote(sys.executable)} -P")
    executor.update_parameters(**_parameters(code_dir, resources, role))
    return executor


def _parameters(code_dir: Path, resources: Resources, role: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "job_name": f"{resources.job_name}-{role if role in ('meta', 'reference') else 'arms'}",
        "time": resources.time_limit_minutes,
        "nodes": 1 if role in ("meta", "reference") else resources.nodes,  # judging takes one
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus_per_task,
        "signal_delay_s": resources.signal_lead_seconds,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": [
            *resources.setup,
            f"export PYTHONPATH={shlex.quote(str(code_dir))}",
            *([f"export POSTRAIN_RUNTIME={shlex.quote(shlex.join(resources.runtime))}"] if resources.runtime else []),
        ],
        "additional_parameters": {"requeue": True, **dict(resources.flags)},
    }
    if resources.comment:
        parameters["comment"] = resources.comment
    if resources.gpus_per_node:
        parameters["gpus_per_node"] = resources.gpus_per_node
    if resources.mem_gb:
        parameters["mem"] = f"{resources.mem_gb}GB"
    if resources.arms_at_once:
        parameters["array_parallelism"] = resources.arms_at_once
    return parameters


def _cancel(job_ids: Sequence[str]) -> None:
    """A round is submitted whole or not at all: without its meta job the arms would run for nothing."""
    if job_ids and shutil.which("scancel"):
        subprocess.run(["scancel", *job_ids], capture_output=True)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
