"""Slurm through submitit, its one door, and the same jobs as child processes where there is no Slurm.

A round is one array of eight workers and one meta job that waits for them with `afterany`: one failed worker must not strand
it. Beside the array one job judges the reference on the round's fresh items, so that meta finds its scores there; the first round's
array of r0000 (reference and base) is another array. submitit pickles only strings, a stage's
name and its arguments; the code that runs is the campaign's frozen copy, through PYTHONPATH. Nothing here waits on submitit's
results: files say what happened.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import ConfigError, Interrupted, NotFound, WorkFailed

IN_RUNTIME = ("worker", "reference", "meta")
Stage = tuple[str, ...]
"""A stage's name and its arguments, such as ("worker", "/runs/demo", "r0001", "a3", "--plan", "<sha256>")."""


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


def command(stage: Stage) -> list[str]:
    """The process that runs a stage: Python, safe path, `-m pipeline`. What trains or judges does so in the site's runtime.

    The runtime is POSTRAIN_RUNTIME, shell words that end with a Python (cluster.runtime), such as `apptainer exec --nv "$IMAGE" python3`; without
    it this very Python. Whatever talks to Slurm stays outside. Raises ConfigError for a variable that is not set.
    """
    words = shlex.split(os.environ.get("POSTRAIN_RUNTIME", "")) if stage[0] in IN_RUNTIME else []
    runtime = [os.path.expandvars(word) for word in words] or [sys.executable]
    if unset := [word for word in runtime if "$" in word]:
        raise ConfigError(f"cluster.runtime has {unset[0]}, which is not set", "Export it in cluster.setup")
    return [*runtime, "-P", "-m", "pipeline", *stage]


def run_stage(*stage: str) -> None:
    """What submitit runs inside a job: the stage as a child process, signals passed on, its exit code raised.

    submitit's own handlers count a signal as a time-out and requeue by their own rule; they are replaced. A stage that ends with 75
    saved its state: the job is requeued from here, outside the worker's namespaces, and the next start goes on.
    """
    # The next round is submitted from outside the meta stage: it runs in a namespace in which an ordinary user looks like root to sbatch.
    # A runtime that is a job step of its own (pyxis) has its own SLURM_PROCID: which task this is stands in POSTRAIN_TASK.
    task = {"POSTRAIN_TASK": os.environ.get("SLURM_PROCID", "0")}
    actual = ("chain", *stage[1:], "--meta") if stage[0] == "meta" else stage
    child = subprocess.Popen(command(actual), env={**os.environ, **task})

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for name in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(name, pass_on)
    code = child.wait()
    if code == Interrupted.exit_code and os.environ.get("SLURM_PROCID", "0") == "0" and not requeue_this_job():
        if stage[0] == "worker":  # what the reference's job leaves is done by the meta stage
            # The site forbids it: another job takes the arm on. `rerun` leaves everything as it is where that cannot be.
            subprocess.run(command(("rerun", stage[1], stage[3], "--round", stage[2])))
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


def run_local(
    stages: Sequence[Stage], code_dir: Path, at_once: int, logs_dir: Path, watch: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Run stages as child processes, `at_once` side by side; `watch` is called between polls. Returns exit codes by log name.

    A failed stage does not stop the others. On Ctrl-C or SIGTERM every running stage is ended (it saves what it can) and the
    interrupt goes on to the caller.
    """
    logs_dir.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(code_dir)}
    waiting = list(stages)
    running: dict[str, subprocess.Popen[bytes]] = {}
    codes: dict[str, int] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, as Ctrl-C does
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                stage = waiting.pop(0)
                name = "_".join(stage[2:4]) if stage[0] == "worker" else stage[0]
                with open(logs_dir / f"{name}.log", "ab") as log:
                    running[name] = subprocess.Popen(
                        command(stage), env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                    )
            watch()
            time.sleep(0.1)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                codes[name] = running.pop(name).returncode
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
        signal.signal(signal.SIGTERM, before)
    return codes


def requeue_this_job() -> bool:
    """Ask Slurm to requeue the job that we run in; False outside Slurm or when the site refuses."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or shutil.which("scontrol") is None:
        return False
    return subprocess.run(["scontrol", "requeue", job], capture_output=True).returncode == 0


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
    """Without the caller's SBATCH_* and SLURM_* variables, which would leak into the submission; SLURM_CONF is kept."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(("SBATCH_", "SLURM_", "SRUN_")) and name != "SLURM_CONF":
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
