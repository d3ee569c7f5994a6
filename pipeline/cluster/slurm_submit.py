"""Submit the jobs of a round to Slurm through submitit, and requeue a job from inside.

A round is an array of eight workers, a job that judges the reference on the round's fresh items, and a meta job that waits for them all.
The meta job may have a judge job submitted, with another meta job after it (rounds/judging.py). Where the round serves its agents' model
itself, a job of role `agent` is submitted before the arms, which start by themselves and wait for its address (model_calls/served.py).
The meta job waits with `afterany`, so that it runs even if a worker failed. The first round has a second array, which trains the
reference and evaluates the base (r0000). submitit pickles only strings: a stage's name and its arguments. The jobs run the campaign's
frozen code, which PYTHONPATH names. Nothing here reads submitit's results, because the campaign's files say what happened.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pipeline.campaign.errors import ConfigError, Interrupted, NotFound, WorkFailed
from pipeline.cluster import slurm_answers, slurm_clients
from pipeline.cluster.sbatch_parameters import Resources, parameters
from pipeline.cluster.stage_command import Stage, command
from pipeline.config.credentials import NOT_INHERITED
from pipeline.config.requests import ROLES
from pipeline.sandbox import devices

if TYPE_CHECKING:
    from pipeline.cluster import slurm_sbatch

REQUEUED, FORBIDDEN, ENDED = "requeued", "forbidden", "ended"
UNSAFE, UNSAFE_NAME = re.compile(r"[%\\\x00-\x1f\x7f]"), re.compile(r"[^\w.+:@~^-]")
OF_GPUS = (*devices.VISIBLE, devices.SHARE, devices.REQUESTED)


def run_stage(*stage: str) -> None:
    """Run a stage as a child process inside a job, pass SIGUSR2 and SIGTERM on to it, and raise SystemExit with its exit code.

    This replaces submitit's own handlers, which count a signal as a time-out and requeue by their own rule. A stage that ends with
    exit code 75 has saved its state: the job is requeued here, outside the worker's namespaces, and its next start resumes.
    """
    if os.path.exists(os.environ.get("POSTRAIN_TAKEN_BACK", "")):
        print(
            "this submission was taken back, so its jobs do nothing; `status` names the jobs of the round",
            file=sys.stderr,
        )
        raise SystemExit(WorkFailed.exit_code)
    # `chain` runs the meta stage in a namespace of its own and submits the next round outside of it, because inside an ordinary user
    # looks like root to sbatch. A runtime that is a job step of its own (pyxis) has another SLURM_PROCID; POSTRAIN_TASK keeps ours.
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
        if stage[0] == "worker":  # what the reference's job leaves, the meta stage finishes or names
            # Submit another job for the arm. `rerun` changes nothing if it cannot do so.
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
    recorded: Collection[str] = (),
    judge: Stage | None = None,
    server: Stage | None = None,
) -> dict[str, Any]:
    """Submit every array, the job that judges the reference, the judge job, and the meta job that waits for them all. Returns their ids.

    reference: this stage waits for the arrays after the first, which train the reference. judge, server: these wait for nothing, and the meta job
    does not wait for the server, which is submitted first and ends after the arms. recorded: marks of earlier submissions whose jobs the
    campaign's files name. The caller records the ids and then calls `keep`; the next submission of this folder cancels the jobs of a mark that is
    neither kept nor recorded, because nobody would know of them.

    Raises NotFound if sbatch or srun is missing. Raises WorkFailed with Slurm's own sentence if Slurm refuses a job, after cancelling the
    jobs that it had accepted.
    """
    check_clients()
    from pipeline.cluster import slurm_sbatch

    names = [f"{resources.job_name}-{role}" for role in ("arms", *ROLES[1:])]
    if left := take_back_open(folder, names, recorded):
        print(f"cancelled {', '.join(left)}: jobs of a submission that was cut short", file=sys.stderr)
    mark = slurm_sbatch.Mark(folder)
    mark.open()
    array_ids: list[str] = []
    reference_id = judge_id = server_id = ""
    task_ids: list[list[str]] = []
    with clean_environment():
        executors = {name: _executor(folder, code_dir, resources, name, mark) for name in resources.requests}
        try:
            if server:
                server_id = executors["agent"].submit(run_stage, *server).job_id
            for stages in arrays:
                with executors["worker"].batch():
                    jobs = [executors["worker"].submit(run_stage, *stage) for stage in stages]
                array_ids.append(jobs[0].job_id.split("_")[0])
                task_ids.append([job.job_id for job in jobs])
            if reference:
                if array_ids[1:]:
                    executors["reference"].update_parameters(dependency=_after(array_ids[1:]))
                reference_id = executors["reference"].submit(run_stage, *reference).job_id
            if judge:
                judge_id = executors["judge"].submit(run_stage, *judge).job_id
            executors["meta"].update_parameters(
                dependency=_after([*array_ids, *filter(None, [reference_id, judge_id])])
            )
            meta_id = executors["meta"].submit(run_stage, *meta).job_id
        except BaseException:
            with suppress(WorkFailed):  # it then stays open, and the next submission cancels what is left
                mark.take_back(names)
            with suppress(WorkFailed):
                slurm_clients.cancel_jobs([*array_ids, *filter(None, [reference_id, judge_id, server_id])])
            raise
    return {"kind": "slurm", "array_job_ids": array_ids, "task_job_ids": task_ids, "reference_job_id": reference_id,
            "judge_job_id": judge_id, "agent_job_id": server_id, "meta_job_id": meta_id, "submission": mark.word}  # fmt: skip


def submit_stage(
    folder: Path, code_dir: Path, stage: Stage, resources: Resources, recorded: Collection[str]
) -> tuple[str, str]:
    """Submit one stage by itself, with the resources of an arm. Returns (job id, mark), for which the caller calls `keep` as after `submit`.

    recorded: as `submit`. Raises as `submit`.
    """
    check_clients()
    from pipeline.cluster import slurm_sbatch

    take_back_open(folder, [f"{resources.job_name}-arms"], recorded)
    mark = slurm_sbatch.Mark(folder)
    mark.open()
    with clean_environment():
        executor = _executor(folder, code_dir, resources, "worker", mark)
        with executor.batch():
            job = executor.submit(run_stage, *stage)
    return job.job_id, mark.word


def check_clients() -> None:
    """Raise NotFound where this machine cannot submit jobs."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise NotFound("sbatch and srun are not on PATH", "Run on a login node, or use cluster=local")


def keep(folder: Path, submission: str) -> None:
    """Say that the campaign's files name the jobs of a submission. submission: as `submit` returned it."""
    from pipeline.cluster import slurm_sbatch

    slurm_sbatch.Mark(folder, submission).keep()


def is_cut_short(folder: Path, recorded: Collection[str] = ()) -> bool:
    """Whether a submission was cut short whose jobs nobody recorded. folder, recorded: as `take_back_open`."""
    return any(path.stem not in recorded for path in (folder / "submissions").glob("*.open"))


def was_refused(folder: Path) -> bool:
    """Whether a submission was taken back, because sbatch refused a job of it or its process was killed. folder: as `take_back_open`."""
    return any((folder / "submissions").glob("*.taken_back"))


def take_back_open(folder: Path, names: Sequence[str], recorded: Collection[str]) -> list[str]:
    """Cancel the jobs of submissions that were cut short and that nobody recorded. Returns their ids.

    folder: of the round's jobs. names: of the jobs. recorded: the marks that the campaign's files name; they are kept. The submission of
    the job that this process runs in stays as it is, because its jobs are known: this one is among them.

    Raises WorkFailed if Slurm does not answer or does not cancel them.
    """
    from pipeline.cluster import slurm_sbatch

    cancelled = []
    for mark in slurm_sbatch.open_marks(folder):
        if mark.word in recorded:
            mark.keep()
        elif mark.word != own_mark(folder):
            cancelled += mark.take_back(names)
    return cancelled


def own_mark(folder: Path) -> str:
    """The mark of the submission that the job of this process belongs to, while nobody has recorded it; else empty. folder: of the round's jobs."""
    word = Path(os.environ.get("POSTRAIN_TAKEN_BACK", "")).stem
    return word if word and (folder / "submissions" / f"{word}.open").exists() else ""


def _after(job_ids: Sequence[str]) -> str:
    return "afterany:" + ":".join(job_ids)


def check_names(paths: Sequence[Path], job_name: str) -> None:
    """Raise ConfigError for a path or a name that Slurm would read as something else.

    sbatch replaces `%j` in the names of logs and takes a backslash for a sign of its own; squeue takes a comma between two names. Blanks and
    quotes are quoted (seen on Slurm 22.05).
    """
    for text, unsafe in (*((str(path), UNSAFE) for path in paths), (job_name, UNSAFE_NAME)):
        if found := unsafe.search(text):
            raise ConfigError(
                f"{text!r} holds {found[0]!r}, which Slurm would read as something else",
                "Move the campaign to a path without it",
            )


def requeue_this_job() -> str:
    """Ask Slurm to requeue the job that this process runs in. Returns REQUEUED, FORBIDDEN or ENDED.

    FORBIDDEN: there is no Slurm, or it refuses. ENDED: somebody else cancelled or requeued the job, so this function leaves it alone.
    Without that check `scontrol requeue` would revive a job that a person cancelled, and would be refused for one that is already being
    requeued, for which the caller would then submit a second job. A job that reached its time limit is requeued.
    """
    # Of an array, SLURM_JOB_ID of the last task is the id of the whole array, which must not be requeued.
    job = this_job()
    if not job or shutil.which("scontrol") is None:
        return FORBIDDEN
    answer = slurm_answers.read_scontrol(slurm_clients.output_of("scontrol", "--oneliner", "show", "job", job))
    said = [line for line in answer.lines if line.ids.covers(job)]
    if said and said[0].state != "RUNNING" and said[0].reason != "TimeLimit":
        return ENDED
    return FORBIDDEN if slurm_clients.run("scontrol", "requeue", job).failed else REQUEUED


def this_job() -> str:
    """The id of the job or array task that this process runs in, as Slurm prints it; empty outside of a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the caller's SBATCH_*, SLURM_* and SRUN_* variables, which would change a submission. SLURM_CONF stays.

    Variables that say which GPUs the caller may use are hidden too: a job would take them for its own.
    Variables whose names look like secrets are hidden too, because sbatch copies its environment into job records. A job reads what it
    needs from files. The environment is restored afterwards.
    """
    before = dict(os.environ)
    for name in before:
        leaks = name.startswith(("SBATCH_", "SLURM_", "SRUN_")) and name != "SLURM_CONF"
        if leaks or name in OF_GPUS or NOT_INHERITED.search(name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _executor(folder: Path, code_dir: Path, resources: Resources, role: str, mark: slurm_sbatch.Mark) -> Any:
    from pipeline.cluster import slurm_sbatch

    executor = slurm_sbatch.MarkedExecutor(folder, f"{shlex.quote(sys.executable)} -P", mark)
    given = parameters(code_dir, resources, role)
    refusal = f"export POSTRAIN_TAKEN_BACK={shlex.quote(str(mark.path('taken_back')))}"
    executor.update_parameters(**{**given, "setup": [*given["setup"], refusal]})
    return executor
