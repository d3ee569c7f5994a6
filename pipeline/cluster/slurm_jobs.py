"""What Slurm says of a round's jobs: one question for all of them, and no answer is an answer too.

    squeue    what waits and runs      by the jobs' names: an id that Slurm has forgotten would be an error
    scontrol  what ended just now      kept by the controller for some minutes
    sacct     what ended before        where the site has accounting

Each may be missing, slow or silent. A job that none of them knows is UNKNOWN, which is a state and not a failure: files say what
happened, and `status` puts the two together. `jobs.jsonl` of a round has every submission: which task of which job is which arm.
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
    """One job or array task."""

    job_id: str
    state: str  # Slurm's word, or UNKNOWN
    node: str = ""
    reason: str = ""
    expected_start: str = ""  # ISO time, of one that waits; empty where Slurm has no estimate
    source: str = ""  # squeue, scontrol or sacct

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
    """Append which task is which arm. tasks: "r0001/a3" -> job id; why: round, rerun or continuation."""
    line = json.dumps({"tasks": dict(tasks), "meta": meta_id, "why": why, "at": round(time.time(), 3)}) + "\n"
    descriptor = os.open(folder.jobs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o664)
    try:
        os.write(descriptor, line.encode())  # one call: two writers do not mix their lines
    finally:
        os.close(descriptor)


def task_ids(folder: Round) -> dict[str, str]:
    """Arm ("r0001/a3"; "reference", "meta") -> its newest job id."""
    found: dict[str, str] = {}
    for record in read_json_lines(folder.jobs) if folder.jobs.exists() else []:
        found |= record["tasks"]
        if record["meta"]:
            found["meta"] = record["meta"]
    return found


def query_jobs(ids: Iterable[str], names: Sequence[str]) -> dict[str, Job]:
    """The state of every job in `ids`. names: of the jobs, as they were submitted. Never raises: silence is UNKNOWN."""
    wanted = list(dict.fromkeys(ids))
    found: dict[str, Job] = {}
    known_arrays: set[str] = set()
    for source in (_squeue, _scontrol, _sacct):
        missing = [job_id for job_id in wanted if job_id not in found]
        if missing:
            answers = source(missing, names)
            known_arrays |= {job_id.split("_")[0] for job_id in answers} if source is not _sacct else set()
            found |= {job_id: job for job_id, job in answers.items() if job_id in missing}
    for job_id in wanted:
        root, _, task = job_id.partition("_")
        if job_id not in found and task and root in known_arrays:
            # The controller has the array and not this task: one that is cancelled while it waits leaves no record at all.
            found[job_id] = Job(job_id, "CANCELLED", "", "while it waited", "", "squeue")
    return {job_id: found.get(job_id, Job(job_id, UNKNOWN)) for job_id in wanted}


def answers() -> bool:
    """Whether a controller is there at all: without SLURM_CONF, or while it is down, every job is UNKNOWN."""
    return " is UP" in _run("scontrol", "ping")


def are_silent(found: Mapping[str, Job]) -> bool:
    """Whether jobs were asked for and Slurm does not answer."""
    return bool(found) and all(job.state == UNKNOWN for job in found.values()) and not answers()


class Asker:
    """Asks no more often than it must: at once when something changed, else twice as seldom each time."""

    def __init__(self, names: Sequence[str], shortest: float = 2.0, longest: float = 60.0) -> None:
        self._names, self._shortest, self._longest = names, shortest, longest
        self._wait, self._at = 0.0, 0.0
        self._found: dict[str, Job] = {}

    def states(self, ids: Sequence[str]) -> dict[str, Job]:
        """As `ask`, possibly as it was some seconds ago."""
        if set(ids) - set(self._found) or time.monotonic() - self._at >= self._wait:
            before, self._found = self._found, query_jobs(ids, self._names)
            self._at = time.monotonic()
            self._wait = self._shortest if before != self._found else min(self._longest, 2 * self._wait)
        return self._found


def _run(*command: str) -> str:
    """What a command prints; empty where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _squeue(ids: Sequence[str], names: Sequence[str]) -> dict[str, Job]:
    text = _run("squeue", "--noheader", "--array", "--all", f"--name={','.join(names)}", "--format=%i|%T|%N|%r|%S")
    found = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 5:
            job_id, state, node, reason, start = parts
            estimate = start if state in WAITING and start not in ("N/A", "Unknown") else ""
            found[job_id] = Job(job_id, state, node, "" if reason == "None" else reason, estimate, "squeue")
    return found


def _scontrol(ids: Sequence[str], names: Sequence[str]) -> dict[str, Job]:
    """All jobs that the controller remembers: one call, whose lines are `Key=value` words."""
    found = {}
    for line in _run("scontrol", "--oneliner", "show", "job").splitlines():
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
    text = _run("sacct", "-X", "-n", "-P", "-o", "JobID,State,NodeList,ExitCode", "-j", ",".join(roots))
    found = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 4:
            job_id, state, node, code = parts
            # "CANCELLED by 1000": who did it is a reason, not another state.
            word, _, rest = state.partition(" ")
            found[job_id] = Job(job_id, word or UNKNOWN, node, rest or code, "", "sacct")
    return found


def lost_nodes(folder: Round, arms: Iterable[str]) -> list[str]:
    """Nodes on which the newest attempt of one of these arms ended without a word: not asked again."""
    found = []
    for arm in arms:
        for attempt in folder.attempts(arm)[-1:]:
            if attempt.claim.exists() and not attempt.result.exists() and not attempt.interrupted.exists():
                found.append(str(_claim(attempt.claim).get("node") or ""))
    return sorted({node for node in found if node})


def _claim(path: Path) -> dict[str, Any]:
    try:
        claim: dict[str, Any] = read_json(path)
        return claim
    except (OSError, PipelineError):
        return {}
