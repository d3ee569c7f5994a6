"""The facts of a round while it runs, from its files and from what Slurm said last: what a terminal shows and `status --json` gives."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.campaign.files import is_alive, lock_holder, read_json, read_json_lines
from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_answers, slurm_jobs, slurm_submit
from pipeline.execution import resume
from pipeline.live import time_left
from pipeline.live.time_left import Left
from pipeline.reporting import progress_tail, status
from pipeline.reporting.status import ArmStatus
from pipeline.rounds import judging

CURVE_POINTS = 10
FIRST = "r0000"


@dataclass(frozen=True)
class ArmView:
    """An arm of the view. losses: at equal distances over the training so far, the newest last. reference_loss: of the reference at
    the same step; None where it has made none. goes_on_from: what a stopped arm resumes from, in words; empty for others."""

    row: ArmStatus
    left: Left | None
    losses: tuple[float, ...]
    reference_loss: float | None
    goes_on_from: str

    def to_json(self) -> dict[str, Any]:
        """The row's fields and the others, in one object."""
        left = asdict(self.left) if self.left else None
        return {
            **asdict(self.row), "left": left, "losses": list(self.losses), "reference_loss": self.reference_loss,
            "goes_on_from": self.goes_on_from,
        }  # fmt: skip


@dataclass(frozen=True)
class RoundView:
    """A round. state: "closed", "undecided", "open" or "stopped"; `stopped` is open, and nothing runs or waits that would go on with it.

    began: when the first arm began, in seconds since the epoch; None before that. end: of the last arm, or why nobody can tell.
    beside: the arms of r0000 in the first round.
    """

    campaign: str
    name: str
    state: str
    began: float | None
    end: Left | str
    arms: tuple[ArmView, ...]
    beside: tuple[ArmView, ...]
    complaints: tuple[str, ...]

    @property
    def is_over(self) -> bool:
        return self.state != "open"

    @property
    def rows(self) -> list[ArmStatus]:
        return [arm.row for arm in (*self.beside, *self.arms)]

    def to_json(self) -> dict[str, Any]:
        """Times are ISO times in UTC. `why_no_end` is empty where an end is expected."""
        end = self.end if isinstance(self.end, Left) else None
        return {
            "state": self.state, "began": _iso(self.began), "expected_end": _iso(time.time() + end.seconds) if end else None,
            "expected_by": end.by if end else None, "why_no_end": "" if isinstance(self.end, Left) else self.end,
        }  # fmt: skip


def of_round(campaign: Campaign, folder: Round, said: slurm_jobs.Report | None = None) -> RoundView:
    """Look at a round now. said: what Slurm says of its jobs, with keys such as "r0001/a3" and "meta"; None where it was not asked.

    r0000, the reference and the base, runs beside the first round and is shown with it.
    """
    jobs = said.jobs if said else {}
    first = campaign.round(FIRST)
    rounds = [first, folder] if folder.number == 1 else [folder]
    rows = [row for each in rounds for row in status.round_status(campaign, each, jobs)]
    typical = time_left.expected(folder, rows)
    views = []
    for row in rows:
        of = campaign.round(row.round)
        views.append(ArmView(row, time_left.of_arm(of, row, typical), *_losses(of, first, row), _goes_on_from(of, row)))
    end = time_left.of_round(rows, [each.left for each in views], typical)
    beside = tuple(each for each in views if each.row.round != folder.name)
    arms = tuple(each for each in views if each.row.round == folder.name)
    state = _state(folder, jobs, [each.row for each in arms])
    return RoundView(
        campaign.name, folder.name, state, _began(rounds), end, arms, beside, said.complaints if said else ()
    )


def other_jobs(folder: Round, states: Mapping[str, slurm_jobs.Job]) -> dict[str, dict[str, str]]:
    """What Slurm says of the jobs beside the arms, if submitted: role -> job, state, node and, while it waits, why."""
    found = [(role, states[role]) for role in ("reference", "agent", "judge", "meta") if role in states]
    jobs = {
        role: {"job": job.job_id, "state": job.state, "node": job.node,
               "detail": slurm_answers.describe_reason(job.reason) if job.waits else job.reason}
        for role, job in found
    }  # fmt: skip
    if "judge" in jobs:
        wanted = f"judges {', '.join(sorted(judging.submitted_for(folder)))}"
        jobs["judge"]["detail"] = "; ".join(filter(None, (wanted, jobs["judge"]["detail"])))
    return jobs


def silence_warning(folder: Round, states: Mapping[str, slurm_jobs.Job]) -> str:
    """The warning that the states come from files alone, because Slurm does not answer; empty if it answers."""
    if folder.closed.exists() or not slurm_jobs.is_slurm_silent(states):
        return ""
    return "Slurm does not answer, so states come from files alone; make `sinfo` work in this shell (SLURM_CONF) to see the jobs"


def is_cut_short(folder: Round) -> bool:
    """Whether a submission of the round was cut short, and none is under way."""
    is_cut = slurm_submit.is_cut_short(folder.slurm_dir, slurm_jobs.recorded_marks(folder))
    return is_cut and not lock_holder(folder.lock)


def gpu_hours_in_words(folder: Round, found: RoundView) -> str:
    """The GPU-hours of the round's arms beside their forecast; empty where arms have no GPU."""
    hours = status.gpu_hours(folder, [arm.row for arm in found.arms])
    if not hours:
        return ""
    forecast = "there is no forecast, because no rate is known"
    if hours["forecast"]:
        forecast = f"{hours['forecast']:,.2f} forecast, {hours['source']}"
    return f"GPU-hours of the round's arms: {hours['used']:,.2f} used; {forecast}"


def _state(folder: Round, jobs: Mapping[str, slurm_jobs.Job], rows: Sequence[ArmStatus]) -> str:
    if folder.closed.exists():
        return "closed"
    if folder.evidence.exists() and not folder.decisions_dir.exists() and not _may_go_on(folder, jobs):
        return "undecided"
    submitted = read_json(folder.submitted) if folder.submitted.exists() else {}
    works = any(row.state in ("running", "starting", "queued", "requeued") for row in rows)
    is_here = submitted.get("kind") == "local"
    return "stopped" if not works and (is_here or "meta" in jobs) and not _may_go_on(folder, jobs) else "open"


def _may_go_on(folder: Round, jobs: Mapping[str, slurm_jobs.Job]) -> bool:
    """Whether a process or job may still decide the round. What nobody knows of may."""
    if "meta" in jobs:
        return any(not jobs[role].ended for role in ("meta", "judge") if role in jobs)
    submitted = read_json(folder.submitted) if folder.submitted.exists() else {}
    if submitted.get("kind") != "local":
        return True
    return is_alive(submitted["pid"]) or lock_holder(folder.lock) is not None


def _began(rounds: Sequence[Round]) -> float | None:
    first = [
        float(marks[0]["at"])
        for folder in rounds
        for arm in folder.frozen_plan().arms
        for attempt in folder.attempts(arm.name)[:1]
        if (marks := read_json_lines(attempt.phases))
    ]
    return min(first, default=None)


def _losses(folder: Round, first: Round, row: ArmStatus) -> tuple[tuple[float, ...], float | None]:
    """(losses over the training so far, the reference's loss at the same step)."""
    if row.step is None:
        return (), None
    path = folder.attempts(row.arm)[-1].progress
    losses = tuple(step.loss for step in progress_tail.curve(path, CURVE_POINTS))
    trained = [attempt.progress for attempt in first.attempts("a0") if attempt.progress.exists()]
    if not trained or folder.name == FIRST:
        return losses, None
    beside = progress_tail.at_step(trained[-1], row.step)
    return losses, beside.loss if beside and beside.step == row.step else None


def _goes_on_from(folder: Round, row: ArmStatus) -> str:
    """What an arm that was stopped resumes from: judged items, a sealed adapter, or a saved step."""
    if row.state not in ("requeued", "interrupted", "cancelled", "lost"):
        return ""
    before = folder.attempts(row.arm)[::-1]
    if not before:
        return ""
    if resume.sealed_record(before[0]):
        found = progress_tail.items(before[0])
        return f"{found.done} of {row.num_items} decoded items" if found else "its trained adapter"
    kept = resume.newest_state(before)
    saved = max((path.name for path in (kept / "checkpoints").glob("step_*")), default="") if kept else ""
    number = saved.removeprefix("step_")
    return f"step {int(number)}" if number.isdigit() else "the beginning"


def _iso(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
