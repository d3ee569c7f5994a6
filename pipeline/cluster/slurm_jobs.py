"""Ask Slurm for the states of a round's jobs, with one call of each client for all of them.

    squeue    jobs that wait or run       asked for by name, because squeue fails for an id that Slurm has forgotten
    scontrol  jobs that ended just now    the controller remembers them for some minutes
    sacct     jobs that ended earlier     where the site has accounting; it also knows how a job's steps ended

Each client may be missing, slow or silent, and a site may wrap one so that it filters. So a job is called ended only where a source says
so, or where squeue and scontrol both answered and neither has it although squeue has all that scontrol calls waiting or running. Everything
else is "not known yet", which is no failure: the campaign's files say what happened, and `status` shows both. A round's `jobs.jsonl` has a
line for each submission, which maps arms to job ids.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pipeline.campaign.files import read_json_lines, user_name, write_file
from pipeline.campaign.layout import Round
from pipeline.cluster import slurm_answers, slurm_clients
from pipeline.cluster.slurm_answers import COMES_BACK, ENDS, RUNS, UNKNOWN, WAITS, Line

# So long after a preemption or a node's failure a job that Slurm no longer has may still come back.
RETURN_SECONDS = 300.0
DAY_SECONDS = 86400.0
NO_ACCOUNTING = "accounting storage is disabled"
READERS = {
    "squeue": slurm_answers.read_squeue, "scontrol": slurm_answers.read_scontrol, "sacct": slurm_answers.read_sacct,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The state of one job or array task. A job that neither waits, nor runs, nor ended is "not known yet"."""

    job_id: str  # "4", or "2_0" for a task of an array
    state: str  # Slurm's word, such as RUNNING, or UNKNOWN
    node: str = ""
    reason: str = ""
    expected_start: str = ""  # ISO time at which a waiting job should start; empty if Slurm has no estimate
    source: str = ""  # the client that knew it: squeue, scontrol or sacct
    absent: bool = False  # squeue and scontrol both answered, unfiltered, and neither has the job
    final: bool = False  # the job ended so long ago that a preemption or a node's failure no longer brings it back

    @property
    def waits(self) -> bool:
        return self.state in WAITS

    @property
    def runs(self) -> bool:
        return self.state in RUNS

    @property
    def ended(self) -> bool:
        return self.state in ENDS and (self.final or self.state not in COMES_BACK)

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody cancelled the job itself, and not one of its steps."""
        return self.state == "CANCELLED" and not self.reason.startswith("step ")

    @property
    def canceller(self) -> str:
        """Who cancelled it, where accounting or our own `cancel` tells; else empty."""
        told = re.fullmatch(r"by (\d+)", self.reason)
        return user_name(int(told[1])) if told else ""

    @property
    def may_return(self) -> bool:
        """Whether Slurm may still requeue the job although it calls it ended."""
        return self.state in COMES_BACK and not self.final


@dataclass(frozen=True)
class Report:
    """What Slurm says of some jobs. complaints: a line for each client that did not answer, or part of whose answer nobody can read."""

    jobs: dict[str, Job]
    complaints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """The answer of one client."""

    name: str
    answer: slurm_answers.Answer
    output: slurm_clients.Output

    def is_trusted(self, root: str) -> bool:
        """Whether it answered without an error, and no line that cannot be read may be of the job or array `root`."""
        is_whole = self.answer.spoke and not self.output.failed and "error" not in self.output.stderr.lower()
        return is_whole and not any(root in re.findall(r"\d+", line) for line in self.answer.unread)

    def complaints(self) -> list[str]:
        """Why it failed, and the first line that nobody can read; empty if all is well."""
        said = [self.output.error] if self.output.error else []
        for line in self.answer.unread[:1]:
            said.append(
                line if line.startswith(f"{self.name}:") else f"{self.name} printed a line that cannot be read: {line}"
            )
        return said if said or self.answer.spoke else [f"{self.name} printed nothing, not even a header"]

    def line_of(self, job_id: str) -> Line | None:
        """The last line of a job, one of its own before one that it shares with other tasks."""
        lines = [line for line in self.answer.lines if not line.ids.step and line.ids.covers(job_id)]
        own = [line for line in lines if sum(map(len, line.ids.tasks or ())) <= 1]
        return (own or lines)[-1] if lines else None


def record_submission(
    folder: Round, tasks: Mapping[str, str], meta_id: str, why: str, ids: Mapping[str, Any] | None = None
) -> None:
    """Add a submission to `jobs.jsonl`; whoever calls this holds the round's lock. Raises WorkFailed where it cannot be written whole.

    tasks: "r0001/a3" -> job id. why: `round`, `rerun`, `judge`, `first-contact`, or `found` by a job of it. ids: what slurm_submit.submit returned.
    """
    content: dict[str, Any] = {"tasks": dict(tasks), "meta": meta_id, "why": why, "at": round(time.time(), 3)}
    content |= {"uid": os.getuid(), "cluster": slurm_clients.cluster_name(), "ids": dict(ids or {})}
    before = folder.jobs.read_text() if folder.jobs.exists() else ""
    write_file(folder.jobs, before + json.dumps(content) + "\n", mode=0o664)


def submissions(folder: Round) -> list[dict[str, Any]]:
    """The lines of `jobs.jsonl`, oldest first; empty if the round was never submitted to Slurm.

    r0000 has no submission of its own at first: its arms are submitted beside r0001, whose file names them.
    """
    own = read_json_lines(folder.jobs) if folder.jobs.exists() else []
    if folder.number:
        return own
    beside = submissions(folder.campaign.round("r0001"))
    of_first = [{**each, "meta": "", "tasks": {arm: job_id for arm, job_id in each["tasks"].items() if arm.startswith("r0000/")}}
                for each in beside]  # fmt: skip
    return [*(each for each in of_first if each["tasks"]), *own]


def recorded_marks(folder: Round) -> set[str]:
    """The marks of the submissions that `jobs.jsonl` names."""
    return {str(each.get("ids", {}).get("submission", "")) for each in submissions(folder)}


def clusters(folder: Round) -> set[str]:
    """The names of the clusters to which the round was submitted."""
    return {each["cluster"] for each in submissions(folder) if each.get("cluster")}


def task_ids(folder: Round) -> dict[str, str]:
    """Arm -> the id of its newest job. Arms are named like "r0001/a3"; "reference" and "meta" are keys too."""
    ids: dict[str, str] = {}
    for submission in submissions(folder):
        ids |= submission["tasks"]
        if submission["meta"]:
            ids["meta"] = submission["meta"]
    return ids


def all_ids(folder: Round) -> list[tuple[str, str]]:
    """(arm, job id) of every job that was ever submitted for the round, superseded ones and each meta job included."""
    pairs = [pair for each in submissions(folder) for pair in (*each["tasks"].items(), ("meta", each["meta"]))]
    return [(arm, job_id) for arm, job_id in dict.fromkeys(pairs) if job_id]


def first_submitted(folder: Round) -> float:
    """When the round was first submitted, in seconds since the epoch; now if it never was."""
    return min((float(submission["at"]) for submission in submissions(folder)), default=time.time())


def commands(roots: Sequence[str], names: Sequence[str], since: float) -> dict[str, list[str]]:
    """Source -> the command that asks it. roots: ids without tasks. names: of the jobs. since: no job is older, in seconds since the epoch.

    Without roots or names the source is asked for every job.
    Every command prints a header, so that "there is none" and silence differ. sacct has a start date, without which some sites refuse it.
    """
    by_name = [f"--name={','.join(names)}"] if names and not any("," in name for name in names) else []
    by_id = ["-j", ",".join(roots)] if roots else []
    day = datetime.fromtimestamp(max(0.0, since - DAY_SECONDS)).strftime("%Y-%m-%d")
    return {
        "squeue": ["squeue", "--array", "--all", *by_name, "--format=%i|%T|%N|%r|%S"],
        "scontrol": ["scontrol", "--all", "--oneliner", "show", "job"],
        "sacct": ["sacct", "-P", "-S", day, "-o", "JobID,State,NodeList,ExitCode,End", *by_id],
    }


def query_jobs(ids: Iterable[str], names: Sequence[str], since: float) -> Report:
    """The state of every job in `ids`. Never raises. names, since: as `commands`.

    scontrol is asked where squeue does not know a job; sacct where neither does, or where a job is COMPLETED, because one whose step was
    killed is called so too if its script ended with 0, or CANCELLED, because it knows by whom.
    """
    wanted = list(dict.fromkeys(ids))
    asked: dict[str, Source] = {}
    known: dict[str, Job] = {}
    by_source = commands(sorted({job_id.split("_")[0] for job_id in wanted}), names, since)
    for name, command in by_source.items():
        missing = [job_id for job_id in wanted if job_id not in known]
        unclear = [job_id for job_id, job in known.items() if job.state in ("COMPLETED", "CANCELLED")]
        if not missing and not (name == "sacct" and unclear):
            continue
        asked[name] = source = ask(name, command)
        known |= {job_id: job for job_id in missing if (job := _job_of(source, job_id))}
    jobs = {job_id: _concluded(job_id, known.get(job_id), asked) for job_id in wanted}
    return Report(jobs, tuple(_complaints(asked.values(), jobs.values())))


def ask(name: str, command: Sequence[str]) -> Source:
    """Run the command of one source, as `commands` has it, and read what it prints."""
    output = slurm_clients.run(*command)
    return Source(name, READERS[name](output.text), output)


def _job_of(source: Source, job_id: str) -> Job | None:
    """What one source says of a job, if its word is one that we know; else None, and the next source is asked."""
    line = source.line_of(job_id)
    if line is None or line.state not in WAITS | RUNS | ENDS:
        return None
    start = line.start if line.state in WAITS else ""
    return Job(job_id, line.state, line.node, line.reason, start, source.name)


def _concluded(job_id: str, job: Job | None, asked: Mapping[str, Source]) -> Job:
    """The job with what follows from all answers together: whether Slurm still has it, and whether its steps agree with its end."""
    absent = _is_absent(job_id, asked)
    accounted = asked["sacct"].line_of(job_id) if "sacct" in asked else None
    if job is None:
        queues = [asked[name] for name in ("squeue", "scontrol") if name in asked]
        strange = next((line for source in queues if (line := source.line_of(job_id))), accounted)
        if strange is not None:
            return Job(job_id, strange.state, strange.node, strange.reason, absent=absent)
        root = job_id.split("_")[0]
        if absent and any(line.ids.root == root for source in queues for line in source.answer.lines):
            # Slurm keeps no record of an array task that was cancelled while it waited, although it knows the array.
            return Job(job_id, "CANCELLED", "", "while it waited", "", "squeue", absent=True)
        return Job(job_id, UNKNOWN, absent=absent)
    if job.source == "sacct" and absent and job.state not in ENDS:
        # Accounting can miss an end, and would then call the job running for ever.
        return Job(job_id, UNKNOWN, job.node, f"sacct alone calls it {job.state}", absent=True)
    if job.state == "COMPLETED" and (step := _failed_step(asked.get("sacct"), job_id)):
        return replace(job, state=step.state, reason=f"step {step.ids.step}, although its script ended with 0")
    if accounted is not None and job.state == accounted.state == "CANCELLED":
        job = replace(job, reason=accounted.reason)
    gone = absent and accounted is not None and _is_past(accounted.ended_at, RETURN_SECONDS)
    return replace(job, absent=absent, final=gone)


def _is_absent(job_id: str, asked: Mapping[str, Source]) -> bool:
    """Whether squeue and scontrol both gave a whole answer and neither has the job.

    squeue is believed only if it has every job that scontrol says waits or runs; else somebody filters it.
    """
    if not {"squeue", "scontrol"} <= set(asked):
        return False
    squeue, scontrol = asked["squeue"], asked["scontrol"]
    root = job_id.split("_")[0]
    if not all(source.is_trusted(root) and not source.line_of(job_id) for source in (squeue, scontrol)):
        return False
    ours = [line for source in (squeue, scontrol) for line in source.answer.lines if line.ids.root == root]
    if any(line.ids.cut for line in ours):
        return False
    queued = [line for line in scontrol.answer.lines if line.ids.root == root and line.state in WAITS | RUNS]
    return all(squeue.line_of(each) for line in queued for each in line.ids.each())


def _failed_step(sacct: Source | None, job_id: str) -> Line | None:
    """The first step of a completed job that srun started and that ended otherwise; None if there is none."""
    lines = sacct.answer.lines if sacct else []
    steps = [line for line in lines if line.ids.step.isdigit() and replace(line.ids, step="").covers(job_id)]
    return next((step for step in steps if step.state in ENDS and step.state != "COMPLETED"), None)


def _is_past(moment: str, seconds: float) -> bool:
    """Whether an ISO time of this host's zone lies more than so many seconds back. False for a text that is no time."""
    try:
        return time.time() - datetime.fromisoformat(moment).timestamp() > seconds
    except ValueError:
        return False


def _complaints(asked: Iterable[Source], jobs: Iterable[Job]) -> list[str]:
    """A line for each source that failed or printed what nobody can read. A site without accounting is no news where all states are known."""
    all_known = all(job.state != UNKNOWN for job in jobs)
    return [line for source in asked for line in source.complaints() if not (all_known and NO_ACCOUNTING in line)]


def is_slurm_silent(jobs: Mapping[str, Job]) -> bool:
    """Whether every state is UNKNOWN because no controller answers. jobs: what `query_jobs` found; empty is not silent."""
    return bool(jobs) and all(job.state == UNKNOWN for job in jobs.values()) and not slurm_clients.controller_answers()
