"""The state of a round's arms, from their files and, where they were submitted, from what Slurm says about their jobs. Files have precedence.

    arm  role     state      node  phase     step     loss   tokens/s  GPU-hours  seconds
    a0   anchor   completed  n3    completed 300/300  0.21   1812      0.4        48

The phases are the marks that a worker writes (`phases.jsonl`). The trial itself reports its training progress, which is shown and never
believed. The states are:

    waiting      no worker has begun, and no job is known    completed   a score is published, whatever Slurm says
    queued       its job waits                               failed      an outcome without a score is published
    starting     its job runs but has not claimed it yet     interrupted it stopped with its state saved
    running      a worker works                              requeued    it was cut short, and its job waits to resume it
    cancelled    a person cancelled its job
    lost         its job or process ended unexpectedly       unknown     it gave no sign for ten minutes and Slurm does not say, or
                                                                         Slurm may bring its job back, or its result is not seen yet
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pipeline.campaign.facts import parse_yaml
from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.cluster import slurm_answers
from pipeline.cluster.slurm_answers import UNKNOWN
from pipeline.cluster.slurm_jobs import Job
from pipeline.execution import results
from pipeline.execution.trial import GROUPS, group_seconds, printable
from pipeline.model_calls.transcript import used_so_far
from pipeline.reporting import progress_tail

SILENT_SECONDS = 600.0  # a running arm without a sign for this long is unknown, unless Slurm says that its job runs
USED = {
    "steps": "answers",
    "tokens": "tokens",
    "gpu_seconds": "seconds of runs",
}  # setting of worker.budget -> in words


@dataclass(frozen=True)
class ArmStatus:
    """One row of the table. `detail` says why the arm failed, what its job waits for, or when the job may start.

    `cores`: on how many of the `cores_asked` its tasks may run, where that is fewer; else None. `unread`: its newest line of progress is
    malformed, so that step, loss and tokens per second are not known. `items`: judged items that are decoded, of `num_items`, while it decodes.
    """

    round: str
    arm: str
    role: str
    state: str
    node: str
    phase: str
    step: int | None
    num_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    gpu_hours: float
    seconds: float
    attempt: int | None
    job: str
    cores: int | None
    cores_asked: int | None
    detail: str
    unread: bool = False
    items: int | None = None
    num_items: int | None = None


def round_status(campaign: Campaign, folder: Round, jobs: Mapping[str, Job] | None = None) -> list[ArmStatus]:
    """The status of every arm of a round. `jobs` maps an arm such as "r0001/a3" to its newest job in Slurm."""
    gpus, known = gpus_of_an_arm(folder.config), jobs or {}
    return [
        _arm_status(folder, arm.name, arm.role, gpus, known.get(f"{folder.name}/{arm.name}"))
        for arm in folder.frozen_plan().arms
    ]


@cache
def _frozen(config: Path) -> Any:
    """The frozen configuration, which never changes; it is read as plain YAML to be quick."""
    return parse_yaml(config.read_text())


def num_items(folder: Round) -> int:
    """How many items an arm of a round is judged on. r0000, and an arm of a closed round, is judged on dev alone."""
    tasks = _frozen(folder.config)["tasks"]
    has_fresh = folder.number and not folder.closed.exists()
    return len(tasks["families"]) * (tasks["num_dev_per_family"] + (tasks["num_fresh_per_family"] if has_fresh else 0))


def file_wait_seconds(folder: Round) -> float:
    """For how long this machine may not see what another one wrote."""
    return float(_frozen(folder.config)["cluster"].get("file_wait_seconds") or 0)


def gpus_of_an_arm(config: Path) -> int:
    """The number of GPUs of an arm; 0 where the site has none."""
    chosen = _frozen(config)
    layout = chosen["parallelism"]
    return int(chosen["cluster"]["gpus_per_node"] and layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"])


def gpu_hours(folder: Round, rows: Sequence[ArmStatus]) -> dict[str, Any] | None:
    """The GPU-hours used so far and those that were forecast for the arms, with the source of the forecast; None where arms have no GPU."""
    if not (gpus := gpus_of_an_arm(folder.config)):
        return None
    frozen = read_json(folder.forecast) if folder.forecast.exists() else None
    return {
        "used": round(sum(row.gpu_hours for row in rows), 3),
        "forecast": frozen and round(gpus * frozen["arms"] * frozen["arm"]["arm"] / 3.6e6, 3),
        "source": frozen["source"] if frozen else "",
    }


def _arm_status(folder: Round, arm: str, role: str, gpus: int, job: Job | None) -> ArmStatus:
    attempts = folder.attempts(arm)
    attempt = attempts[-1] if attempts else None
    marks = read_json_lines(attempt.phases) if attempt else []
    now = time.time()
    last: dict[str, Any] = marks[-1] if marks else {"phase": "claim" if attempt else "", "at": now}
    state, detail = _state(folder, arm, attempt, last, job)
    working = state in ("running", "unknown")
    began = marks[0]["at"] if marks else now
    seconds = max(0.0, (now if working else last["at"]) - began)  # the clocks of two machines may differ
    spent = seconds + sum(_duration(each) for each in attempts[:-1])
    step, unread = progress_tail.newest(attempt.progress) if attempt else (None, False)
    rate = step.tokens / step.seconds if step and step.seconds > 1e-6 else None
    items = progress_tail.items(attempt) if attempt and last["phase"] == "generate_start" else None
    claim = read_json(attempt.claim) if attempt and attempt.claim.exists() else {}
    if attempt and state == "running" and attempt.transcript.exists():
        budget, used = _frozen(folder.config)["worker"]["budget"], used_so_far(attempt.transcript)
        detail = "agent: " + ", ".join(f"{spent:,} of {budget[name]:,} {USED[name]}" for name, spent in used.items())
    cores, cores_asked = _cores(attempt, claim)
    return ArmStatus(
        folder.name, arm, role, state, job.node if job and job.node else str(claim.get("node") or claim.get("host", "")),
        last["phase"], step.step if step else None, step.num_steps if step else None, step.loss if step else None,
        rate and round(rate, 1), round(gpus * spent / 3600, 3), round(seconds, 1), attempt.number if attempt else None, job.job_id if job else "",
        cores, cores_asked, printable(detail), unread, items.done if items else None, num_items(folder) if attempt else None,
    )  # fmt: skip


def _state(
    folder: Round, arm: str, attempt: Attempt | None, last: Mapping[str, Any], job: Job | None
) -> tuple[str, str]:
    """(state, detail). Published files decide first, then the job, then the time of the newest sign of life."""
    if _has_score(folder.published(arm)):
        return "completed", ""
    waits = _why_it_waits(job) if job else ""
    if attempt is None:
        if job is None:
            return "waiting", ""
        if job.waits or job.runs or job.ended:
            return ("queued", waits) if job.waits else ("starting", "") if job.runs else _without_result(folder, job)
        # Slurm does not answer, has forgotten the job or may bring it back, which means nothing for some minutes.
        silent = time.time() - folder.jobs.stat().st_mtime if folder.jobs.exists() else 0.0
        return ("unknown", _not_known(job)) if silent > SILENT_SECONDS or job.state != UNKNOWN else ("waiting", "")
    if last["phase"] in ("completed", "failed"):
        return str(last["phase"]), str(last.get("detail", ""))
    if job and job.waits:
        return "requeued", waits
    if attempt.interrupted.exists() and not (job and job.is_cancelled):
        return "interrupted", ""
    if job and job.ended:
        return _without_result(folder, job, "its state is saved; " if attempt.interrupted.exists() else "")
    if job and job.may_return:
        return "unknown", _not_known(job)
    if _is_dead(attempt):
        return "lost", "its process has ended"
    silent = time.time() - max(_touched(attempt), last["at"])
    if silent > SILENT_SECONDS and not (job and job.runs):
        return "unknown", f"it has given no sign for {silent:.0f} s"
    return "running", ""


def _has_score(published: Path) -> bool:
    """As `results.has_score`, which reads all of a file that a view asks for twice a second."""
    try:
        about = published.stat()
    except FileNotFoundError:
        return False
    return _of_version(published, (about.st_ino, about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=256)
def _of_version(published: Path, version: tuple[int, int, int]) -> bool:
    return results.has_score(published)


def _without_result(folder: Round, job: Job, saved: str = "") -> tuple[str, str]:
    """(state, detail) of an arm whose job has ended and whose result is not here. A job completes only once it has published a score.

    saved: begins the detail of a cancelled arm.

    It is not lost where other machines' files may come late; nobody but `rerun` and the meta stage waits for them.
    """
    if job.state == "COMPLETED" and file_wait_seconds(folder):
        return "unknown", "its job COMPLETED, but its result is not seen here yet; look again in a minute"
    if job.is_cancelled:
        by = f"by {job.canceller}" if job.canceller else f"{job.reason}; nobody recorded by whom".removeprefix("; ")
        return "cancelled", f"{by}; {saved}`rerun` with its name starts it"
    return "lost", f"{job.state} {job.reason}".strip()


def _why_it_waits(job: Job) -> str:
    starts = f"; it should start at {job.expected_start}" if job.expected_start else ""
    return slurm_answers.describe_reason(job.reason) + starts


def _not_known(job: Job) -> str:
    if job.may_return:
        return f"job {job.job_id} ended as {job.state}, and Slurm may start it again"
    return (
        f"Slurm does not know job {job.job_id}" if job.state == UNKNOWN else f"Slurm calls job {job.job_id} {job.state}"
    )


def _is_dead(attempt: Attempt) -> bool:
    """Whether the worker was a process of this host, outside Slurm, that has ended."""
    try:
        claim = read_json(attempt.claim)
        if claim["host"] != platform.node() or claim["slurm_job_id"]:
            return False
        os.kill(claim["pid"], 0)
    except ProcessLookupError:
        return True
    except Exception:
        return False
    return False


def _touched(attempt: Attempt) -> float:
    """When the attempt last wrote progress, a phase or a decoded item, in seconds since the epoch; 0 before the first."""
    signs = (attempt.progress, attempt.phases, *attempt.decoded_dir.glob("journal.*.jsonl"))
    return max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)


def _duration(attempt: Attempt) -> float:
    """Seconds from the first phase to the newest sign; 0 for an attempt without phases."""
    marks = read_json_lines(attempt.phases) if attempt.phases.exists() else []
    return float(max(marks[-1]["at"], _touched(attempt)) - marks[0]["at"]) if marks else 0.0


def _cores(attempt: Attempt | None, claim: Mapping[str, Any]) -> tuple[int, int] | tuple[None, None]:
    """(the fewest cores that a task of the attempt has, those asked for); None where every task has as many as that."""
    said = [claim, *map(read_json, sorted(attempt.folder.glob("nodes/*.cores.json")) if attempt else [])]
    few = min(said, key=lambda task: task.get("cores", 0) - task.get("cores_asked", 0))
    return (few["cores"], few["cores_asked"]) if few.get("cores", 0) < few.get("cores_asked", 0) else (None, None)


def worked_seconds(rounds: Iterable[Round], before: float) -> float:
    """For how many seconds before a moment at least one arm of the rounds worked. Pauses between the attempts do not count."""
    spans = [(marks[0]["at"], max(marks[-1]["at"], _touched(attempt))) for attempt, marks in _marked(rounds)]
    total, upto = 0.0, 0.0
    for start, end in sorted((start, min(end, before)) for start, end in spans):
        total += max(0.0, end - max(start, upto))
        upto = max(upto, end)
    return total


def breakdown(rounds: Iterable[Round]) -> dict[str, float]:
    """How the time of rounds was spent: seconds by group of phases, over all attempts."""
    totals = dict.fromkeys(GROUPS, 0.0)
    for _, marks in _marked(rounds):
        for name, seconds in group_seconds(marks).items():
            totals[name] += seconds
    return totals


def _marked(rounds: Iterable[Round]) -> Iterator[tuple[Attempt, list[Any]]]:
    """Every attempt of the rounds that has begun, with the marks of its phases."""
    for folder in rounds:
        for attempt in (each for arm in folder.frozen_plan().arms for each in folder.attempts(arm.name)):
            if attempt.phases.exists() and (marks := read_json_lines(attempt.phases)):
                yield attempt, marks


def step_in_words(row: ArmStatus) -> str:
    """How far the trial says that it is, such as 120/300; "?" where nobody can read what it says."""
    step = "?" if row.unread else "" if row.step is None else f"{row.step}/{row.num_steps}"
    return f"(full run: step {step})" if step and row.phase == "agent" else step
