"""When the Slurm job of this process ends, so that an arm saves its state before that, whether or not Slurm's signal arrives.

A shell, a container or a site's KillWait of 0 may keep the signal from the worker. So the worker stops by its own clock, as long before the
end as the signal would have come, and exactly as if it had come. The end is what the first of these says:

    SLURM_JOB_END_TIME               in the environment of a job (newer versions of Slurm; 22.05 has none)
    scontrol show job, squeue        asked once at the start, and again at the end, because an administrator may have moved it
    the configuration                start of the job + cluster.time_limit_minutes
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import datetime

ASK_SECONDS = 5.0  # for an answer of a Slurm client
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
NEVER = float("inf")
KEPT = ("SLURM_CONF", "SLURM_JWT")  # they say which Slurm to ask


class JobEnd:
    """The end of this process's job. lead_seconds: how long before it the state is to be saved, but at most half of the job's time."""

    def __init__(self, started: float, time_limit_minutes: float, lead_seconds: float) -> None:
        began = _number("SLURM_JOB_START_TIME") or started
        self.at = NEVER
        if os.environ.get("SLURM_JOB_ID"):
            told = _number("SLURM_JOB_END_TIME")
            if told is None or told <= started:  # of an allocation that this job inherited its environment from
                told = asked_of_slurm() or began + 60.0 * time_limit_minutes
            self.at = told
        self._lead = min(lead_seconds, max(0.0, self.at - began) / 2)
        self._is_near = False

    def is_near(self) -> bool:
        """Whether the state is to be saved now. Call it as often as you like: Slurm is asked again only once the time has come."""
        if not self._is_near and time.time() >= self.at - self._lead:
            self.at = max(self.at, asked_of_slurm() or self.at)
            self._is_near = time.time() >= self.at - self._lead
            if self._is_near:
                left = self.at - time.time()
                print(f"the job ends in {left:.0f} s, so its state is saved now, without a signal", file=sys.stderr)
        return self._is_near


def asked_of_slurm() -> float | None:
    """The end of this job in seconds since the epoch, as Slurm says; None if it does not say, NEVER for a job without a time limit.

    Both clients show all tasks of an array for the task whose own number is that of the array, so its line is looked for.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    for line in _output("scontrol", "--oneliner", "show", "job", job).splitlines():
        words: dict[str, str] = dict(re.findall(r"(\w+)=(\S*)", line))
        if words.get("JobId") == job:
            end = NEVER if words.get("TimeLimit") == "UNLIMITED" else _seconds(words.get("EndTime", ""))
            if end is not None:
                return end
    for line in _output("squeue", "--noheader", "--jobs", job, "--format=%A %e").splitlines():
        number, _, text = line.strip().rpartition(" ")
        if number.strip() in ("", job) and (end := _seconds(text)):
            return end
    return None


def _seconds(text: str) -> float | None:
    """A time as Slurm's clients print it, in the time zone of this process, as seconds since the epoch; None for `Unknown` and the like."""
    try:
        return datetime.fromisoformat(text).timestamp() if TIME.fullmatch(text) else None
    except ValueError:
        return None


def _output(*command: str) -> str:
    """The output of a Slurm client, without the variables that change its form; empty if it is missing, fails or hangs."""
    changing = ("SCONTROL_", "SLURM_", "SQUEUE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(changing) or name in KEPT}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _number(name: str) -> float | None:
    """A variable of the environment that is a whole number above 0; None for anything else."""
    text = os.environ.get(name, "")
    return float(text) if re.fullmatch(r"[1-9]\d{0,11}", text) else None
