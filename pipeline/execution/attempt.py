"""The state of one attempt while it runs, the seal of its adapter, and its end: the result file, published while the attempt is the newest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError, Interrupted
from pipeline.campaign.files import read_json_lines, write_file, write_new_file
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.campaign.records import Arm, Plan
from pipeline.config import settings
from pipeline.execution import judge, results, trial
from pipeline.execution.job_end import JobEnd
from pipeline.sandbox.image import Fork, Mount
from pipeline.sandbox.kernel_cache import Kernels


class ByAgent(Protocol):
    """How agents' arms are trained: `pipeline.agent.arm`, which a layer above this one hands in."""

    def train(
        self, job: Work, mount: Mount, fork: Fork, bound: Mapping[str, Path], out_dir: Path, scratch: Path,
        kernels: Kernels | None,
    ) -> None:  # fmt: skip
        """Leave the trial's outputs in `out_dir`. bound: path inside a sandbox -> folder of base weights. Raises TrialFailed."""

    def resume(self, job: Work, trained: Attempt, mount: Mount) -> None:
        """Take over what the agent of an earlier attempt did, whose sealed adapter this one judges."""


@dataclass
class Work:
    """What one attempt knows so far. However it ends, `conclude` writes these values into its result file."""

    campaign: Campaign
    folder: Round
    facts: Mapping[str, Any]
    plan: Plan
    plan_digest: str
    arm: Arm
    chosen: settings.Settings
    attempt: Attempt
    started: float = field(default_factory=time.time)
    stop: threading.Event = field(default_factory=threading.Event)
    adapter_digest: str = ""
    by_agent: ByAgent | None = None
    look: judge.Look = lambda folders, work: None  # at the judged sets, for an agent's canaries
    edited_files: int = 0  # of the fork, by an agent, when the full run began
    coverage: dict[str, Any] = field(default_factory=dict)
    judged: judge.Judged = field(default_factory=judge.Judged)

    @cached_property
    def end(self) -> JobEnd:
        """The end of the job that this attempt runs in."""
        cluster = self.chosen.cluster
        return JobEnd(self.started, cluster.request("worker").time_limit_minutes, cluster.signal_lead_seconds)

    def stop_wanted(self) -> bool:
        """Whether the attempt is to save its state and stop: a signal came, or the job ends soon and none has come."""
        if not self.stop.is_set() and self.end.is_near():
            self.stop.set()
        return self.stop.is_set()

    def check_stop(self) -> None:
        """Raises Interrupted if the attempt is to stop now, when it has no state to save."""
        if self.stop_wanted():
            raise Interrupted("the arm was stopped before it trained", "Start the arm again")

    @property
    def before(self) -> list[Attempt]:
        """The earlier attempts at this arm, the newest first."""
        return self.folder.attempts(self.arm.name)[:-1][::-1]

    def mark(self, phase: str, at: float | None = None, detail: str = "") -> None:
        """Record that a phase begins, for `status` and the report. at: seconds since the epoch, now for None."""
        with open(self.attempt.phases, "a") as file:
            file.write(json.dumps({"phase": phase, "at": round(at or time.time(), 3), "detail": detail}) + "\n")


def conclude(job: Work, status: str, exit_class: str, trace: str = "") -> None:
    """Write this attempt's result file, then publish it as `publish` does.

    status: completed or failed. exit_class: how it ended. trace: the traceback of a failure.
    """
    scored = status == "completed"
    gpus = job.chosen.cluster.gpus_per_node and job.chosen.parallelism.world_size
    attributes = {
        "schema_version": results.SCHEMA,
        "campaign": job.plan.campaign,
        "round": job.folder.name,
        "arm": job.arm.name,
        "attempt": job.attempt.number,
        "role": job.arm.role,
        "status": status,
        "exit_class": exit_class,
        "traceback": trace,
        "image_digest": job.plan.image_digest,
        "runtime_digest": job.facts["runtime_digest"],
        "constitution_digest": job.plan.constitution_digest,
        "config_digest": job.plan.config_digest,
        "adapter_digest": job.adapter_digest,
        "seed": job.arm.seed,
        "started_at": _time(job.started),
        "finished_at": _time(time.time()),
        "gpu_seconds": gpus * (time.time() - job.started),
        "coverage": json.dumps(job.coverage, sort_keys=True),
        "host": platform.node(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
        "edited_files": job.edited_files,
        "train_steps": trained_steps(job.attempt),
        "train_gpu_seconds": _train_seconds(job) * (job.chosen.cluster.gpus or job.chosen.parallelism.world_size),
    }
    judged = job.judged if scored else judge.Judged()
    for item_set, lines in judged.raw.items():
        write_file(job.attempt.completions_dir / f"{item_set}.jsonl", lines)
    results.write_result(job.attempt.result, attributes, judged.items, _training_rows(job), judged.completions)
    job.mark(status, detail=exit_class if status == "failed" else "")
    publish(job, status)
    if scored:
        shutil.rmtree(job.attempt.decoded_dir, ignore_errors=True)  # result.h5 holds the complete completions now


def publish(job: Work, status: str) -> None:
    """Publish the result as `aN.h5`, unless a newer attempt exists, or this one failed and an earlier one has a score."""
    newest = job.folder.attempts(job.arm.name)[-1]
    if newest.number != job.attempt.number:
        return
    if status == "failed" and results.has_score(job.folder.published(job.arm.name)):
        return
    write_file(job.folder.published(job.arm.name), job.attempt.result.read_bytes())


def write_task(job: Work, attempt: Attempt, base: str, recipe: Mapping[str, Any]) -> None:
    """Write the task file of a training of this arm by a recipe. base: folder of the base weights inside the sandbox."""
    model, parallelism = asdict(job.chosen.model), asdict(job.chosen.parallelism)
    config = {"model": model, "recipe": recipe, "parallelism": parallelism, "seed": job.arm.seed}
    trial.write_task(attempt, config, base)


def mark_training(job: Work) -> None:
    """Record when training steps began, as the trial says. People see this; no decision rests on it."""
    began = read_json_lines(job.attempt.phases)[-1]["at"]
    for line in trial.progress_lines(job.attempt, "start")[-1:]:
        seconds = trial.number(line.get("seconds"))
        if seconds is not None:
            job.mark("train", at=min(time.time(), began + max(0.0, seconds)))


def seal_adapter(job: Work) -> None:
    """Write the adapter's digest before any secret seed is read. Raises IntegrityError where `sealed.json` exists."""
    record = {"adapter_digest": job.adapter_digest, "plan_digest": job.plan_digest, "attempt": job.attempt.number}
    record["edited_files"] = job.edited_files
    try:
        write_new_file(job.attempt.sealed, canonical.encoded(record))
    except FileExistsError:
        raise IntegrityError(
            f"{job.attempt.sealed} exists already, so two workers share this attempt", "Start the arm again"
        ) from None


def _training_rows(job: Work) -> list[dict[str, Any]]:
    """Return the last valid line of each training step. A trial may write anything, so lines with other values are left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in trial.progress_lines(job.attempt, "train"):
        numbers = {name: trial.number(line.get(name)) for name in results.TRAIN_COLUMNS}
        whole = [numbers[name] for name in ("step", "tokens")]
        if all(value is not None for value in numbers.values()) and all(
            type(v) is int and 0 <= v < 2**53 for v in whole
        ):
            rows[int(line["step"])] = numbers
    return [rows[step] for step in sorted(rows)][: job.chosen.recipe.num_steps]


def trained_steps(attempt: Attempt) -> int:
    """The last step of the training, by its own word. It may lie above the recipe's number of steps, which `_training_rows` ends at."""
    steps = [trial.number(line.get("step")) or 0 for line in trial.progress_lines(attempt, "train")]
    return int(min(max(steps, default=0), 2**53))


def _train_seconds(job: Work) -> float:
    """How long the training of this adapter took by the worker's clock, its start included.

    A recipe's training goes on from one attempt to the next, so all count. An agent begins anew, and its last full run made the adapter.
    """
    trained_by = job.coverage.get("trained_by_attempt", job.attempt.number)
    each = [each for each in (*job.before, job.attempt) if each.number <= trained_by]
    if job.chosen.worker.runs(job.arm.role):
        return next((trial.train_runs(of)[-1] for of in each if of.number == trained_by and trial.train_runs(of)), 0.0)
    return sum(sum(trial.train_runs(of)) for of in each)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
