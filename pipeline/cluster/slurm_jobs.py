"""Ask Slurm for the states of a round's jobs, with one call of each client for all of them.

    squeue    jobs that wait or run       asked for by name, because squeue fails for an id that Slurm has forgotten
    scontrol  jobs that ended just now    the controller remembers them for some minutes
    sacct     jobs that ended earlier     where the site has accounting

Each client may be missing, slow or silent. A job that none of them knows has the state UNKNOWN, which is not a failure: the campaign's
files say what happened, and `status` shows both. A round's `jobs.jsonl` has a line for each submission, which maps arms to job ids.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Round

TIMEOUT_SECONDS = 15.0
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED")
ACTIVE = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "STOPPED")
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class Job:
    """The state of one job or array task."""

    job_id: str  # "4", or "2_0" for a task of an array
    state: str  # Slurm's word, such as RUNNING, or UNKNOWN
    node: str = ""
    reason: str = ""
    expected_start: str = ""  # ISO time at which a waiting job should start; empty if Slurm has no estimate
    source: str = ""  # the client that knew it: squeue, scontrol or sacct

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        return self.state in ACTIVE

    @property
    def ended(self) -> bool:
        return not self.waits and not self.runs and self.state != UNKNOWN


def record_submission(folder: Round, tasks: Mapping[str, str], meta_id: str, why: str) -> None:
    """Append a submission to `jobs.jsonl`. tasks: "r0001/a3" -> job id. why: `round` or `rerun`."""
    line = json.dumps({"tasks": dict(tasks), "meta": meta_id, "why": why, "at": round(time.time(), 3)}) + "\n"
    descriptor = os.open(folder.jobs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o664)
    try:
        os.write(descriptor, line.encode())  # a single call, so that two writers cannot mix their lines
    finally:
        os.close(descriptor)


def task_ids(folder: Round) -> dict[str, str]:
    """Arm -> the id of its newest job. Arms are named like "r0001/a3"; "reference" and "meta" are keys too."""
    ids: dict[str, str] = {}
    for submission in read_json_lines(folder.jobs) if folder.jobs.exists() else []:
        ids |= submission["tasks"]
        if submission["meta"]:
            ids["meta"] = submission["meta"]
    return ids


def query_jobs(ids: Iterable[str], names: Sequence[str]) -> dict[str, Job]:
    """Job id -> state, for every job in `ids`; UNKNOWN for a job that no client knows. Never raises.

    names: the names under which the jobs were submitted.
    """
    wanted = list(dict.fromkeys(ids))
    jobs: dict[str, Job] = {}
    known_arrays: set[str] = set()
    for source in (_squeue, _scontrol, _sacct):
        missing = [job_id for job_id in wanted if job_id not in jobs]
        if missing:
            answers = source(missing, names)
            known_arrays |= {job_id.split("_")[0] for job_id in answers} if source is not _sacct else set()
            jobs |= {job_id: job for job_id, job in answers.items() if job_id in missing}
    for job_id in wanted:
        root, _, task = job_id.partition("_")
        if job_id not in jobs and task and root in known_arrays:
            # Slurm keeps no record of an array task that was cancelled while it waited, although it knows the array.
            jobs[job_id] = Job(job_id, "CANCELLED", "", "while it waited", "", "squeue")
    return {job_id: jobs.get(job_id, Job(job_id, UNKNOWN)) for job_id in wanted}


def controller_answers() -> bool:
    """Whether a Slurm controller answers on this host. It does not if it is down, or if SLURM_CONF is missing."""
    return " is UP" in output_of("scontrol", "ping")


def is_slurm_silent(jobs: Mapping[str, Job]) -> bool:
    """Whether every state is UNKNOWN because no controller answers. jobs: what `query_jobs` returned; empty is not silent."""
    return bool(jobs) and all(job.state == UNKNOWN for job in jobs.values()) and not controller_answers()


class Asker:
    """Asks Slurm again soon after something changed, and else waits twice as long each time.

    shortest, longest: limits of the waiting time, in seconds.
    """

    def __init__(self, names: Sequence[str], shortest: float = 2.0, longest: float = 60.0) -> None:
        self._names, self._shortest, self._longest = names, shortest, longest
        self._wait, self._at = 0.0, 0.0
        self._found: dict[str, Job] = {}

    def states(self, ids: Sequence[str]) -> dict[str, Job]:
        """As `query_jobs`, but the states may be up to `longest` seconds old."""
        if set(ids) - set(self._found) or time.monotonic() - self._at >= self._wait:
            before, self._found = self._found, query_jobs(ids, self._names)
            self._at = time.monotonic()
            self._wait = self._shortest if before != self._found else min(self._longest, 2 * self._wait)
        return self._found


def output_of(*command: str, timeout_seconds: float | None = None) -> str:
    """The standard output of a command; empty if it is missing or hangs. timeout_seconds: TIMEOUT_SECONDS by default."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds or TIMEOUT_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _squeue(ids: Sequence[str], names: Sequence[str]) -> dict[str, Job]:
    text = output_of("squeue", "--noheader", "--array", "--all", f"--name={','.join(names)}", "--format=%i|%T|%N|%r|%S")
    found = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 5:
            job_id, state, node, reason, start = parts
            estimate = start if state in WAITING and start not in ("N/A", "Unknown") else ""
            found[job_id] = Job(job_id, state, node, "" if reason == "None" else reason, estimate, "squeue")
    return found


def _scontrol(ids: Sequence[str], names: Sequence[str]) -> dict[str, Job]:
    """Every job that the controller remembers, from one call. Each line of its output holds `Key=value` words."""
    found = {}
    for line in output_of("scontrol", "--oneliner", "show", "job").splitlines():
        values: dict[str, str] = dict(re.findall(r"(\w+)=(\S*)", line))
        if values.get("JobName") not in names:
            continue
        task = values.get("ArrayTaskId", "")
        job_id = f"{values.get('ArrayJobId')}_{task}" if task.isdigit() else values.get("JobId", "")
        reason = values.get("Reason", "")
        found[job_id] = Job(
            job_id, values.get("JobState", UNKNOWN), values.get("NodeList", "").replace("(null)", ""),
            "" if reason == "None" else reason, "", "scontrol",
        )  # fmt: skip
    return found


def _sacct(ids: Sequence[str], names: Sequence[str]) -> dict[str, Job]:
    roots = sorted({job_id.split("_")[0] for job_id in ids})
    text = output_of("sacct", "-X", "-n", "-P", "-o", "JobID,State,NodeList,ExitCode", "-j", ",".join(roots))
    found = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 4:
            job_id, state, node, code = parts
            # In "CANCELLED by 1000" the user is the reason; the state is the first word.
            word, _, rest = state.partition(" ")
            found[job_id] = Job(job_id, word or UNKNOWN, node, rest or code, "", "sacct")
    return found


def lost_nodes(folder: Round, arms: Iterable[str]) -> list[str]:
    """Nodes on which the newest attempt of one of these arms vanished: it has a claim, but neither a result nor a saved state.

    `rerun` excludes them.
    """
    nodes = []
    for arm in arms:
        for attempt in folder.attempts(arm)[-1:]:
            if attempt.claim.exists() and not attempt.result.exists() and not attempt.interrupted.exists():
                nodes.append(str(_claim(attempt.claim).get("node") or ""))
    return sorted({node for node in nodes if node})


def _claim(path: Path) -> dict[str, Any]:
    try:
        claim: dict[str, Any] = read_json(path)
        return claim
    except (OSError, PipelineError):
        return {}
