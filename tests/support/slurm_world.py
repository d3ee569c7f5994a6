"""A made-up Slurm with a known truth, for the fuzz test of the readers: an array, and three clients that tell of it each in its way."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from pipeline.cluster import slurm_answers, slurm_jobs

WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "SPECIAL_EXIT")
RUNS = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING")
ENDS = (
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "CANCELLED",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "PREEMPTED",
    "DEADLINE",
    "BOOT_FAIL",
)
HEADERS = {
    "squeue": "JOBID|STATE|NODELIST|REASON|START_TIME", "scontrol": "", "sacct": "JobID|State|NodeList|ExitCode|End",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One task. state: the truth. age: seconds since it ended. forgotten: the controller no longer has it."""

    number: int
    state: str
    age: float
    forgotten: bool


@dataclass(frozen=True)
class World:
    """An array of tasks, and how each source answers: whole, silent (three ways) or, squeue alone, filtered to running jobs."""

    root: str
    name: str
    throttle: int
    tasks: tuple[Task, ...]
    modes: dict[str, str]
    style: dict[str, bool]

    @classmethod
    def random(cls, rng: random.Random) -> World:
        chosen = rng.sample(range(20), rng.randint(1, 9))
        tasks = []
        for number in sorted(chosen):
            state = rng.choice((rng.choice(WAITS[:1] * 6 + WAITS), rng.choice(RUNS), rng.choice(ENDS)))
            age = rng.choice((1.0, 100.0, 400.0, 5000.0))
            # The controller forgets an ended job after some minutes, and one that waits or runs never.
            tasks.append(Task(number, state, age, state in ENDS and age > 300.0))
        modes = {
            "squeue": rng.choice(("whole", "whole", "whole", "running", "missing", "empty", "fails")),
            "scontrol": rng.choice(("whole", "whole", "whole", "missing", "empty", "fails")),
            "sacct": rng.choice(("whole", "whole", "late", "missing", "empty", "fails")),
        }
        style = {word: rng.random() < 0.3 for word in ("lower", "cut", "cluster", "ranges", "steps", "header")}
        return cls(str(rng.randint(1, 9999)), "demo-r0001-arms", rng.choice((0, 1, 4)), tuple(tasks), modes, style)

    @property
    def ids(self) -> list[str]:
        return [f"{self.root}_{task.number}" for task in self.tasks]

    def task(self, job_id: str) -> Task:
        return next(task for task in self.tasks if job_id == f"{self.root}_{task.number}")

    def is_alive(self, job_id: str) -> bool:
        """Whether the task waits or runs, or may be requeued."""
        return self.task(job_id).state in WAITS + RUNS

    def end_that_is_told(self, job_id: str) -> bool:
        """Whether a whole source names an end that is final."""
        task = self.task(job_id)
        if task.state not in ENDS:
            return False
        by_scontrol = self.modes["scontrol"] == "whole" and not task.forgotten
        if task.state not in slurm_answers.COMES_BACK:
            return by_scontrol or self.modes["sacct"] == "whole"
        forgotten = task.forgotten and self.modes["squeue"] == self.modes["scontrol"] == "whole"
        return forgotten and self.modes["sacct"] == "whole" and task.age > slurm_jobs.RETURN_SECONDS + 5

    def answer(self, source: str) -> tuple[str, str, bool]:
        """(stdout, error, whether it failed) of a client."""
        mode = self.modes[source]
        if mode == "missing":
            return "", f"{source} cannot be run: No such file or directory", True
        if mode == "fails":
            return "", f"{source}: error: slurm_load_jobs: Unable to contact slurm controller", True
        if mode == "empty":
            return "", "", False
        rows = {"squeue": self._squeue, "scontrol": self._scontrol, "sacct": self._sacct}[source](mode)
        first = [HEADERS[source]] if HEADERS[source] and (self.style["header"] or not rows) else []
        if source == "scontrol" and not rows:
            rows = ["No jobs in the system"]
        return "\n".join([*first, *rows]) + "\n", "", False

    def _word(self, state: str) -> str:
        if self.style["cut"] and len(state) > 9:
            state = f"{state[:9]}+"
        return state.lower() if self.style["lower"] else state

    def _groups(self, states: tuple[str, ...]) -> list[tuple[str, str]]:
        """(id, state) of the tasks in these states; tasks that are PENDING share a line where the style says so."""
        suffix = ";alpha" if self.style["cluster"] else ""
        own = [
            task
            for task in self.tasks
            if task.state in states and not (task.state == "PENDING" and self.style["ranges"])
        ]
        shared = [
            task.number for task in self.tasks if task.state == "PENDING" and task not in own and "PENDING" in states
        ]
        rows = [(f"{self.root}_{task.number}{suffix}", task.state) for task in own]
        if shared:
            limit = f"%{self.throttle}" if self.throttle else ""
            rows.append((f"{self.root}_[{','.join(map(str, shared))}{limit}]{suffix}", "PENDING"))
        return rows

    def _squeue(self, mode: str) -> list[str]:
        states = ("RUNNING",) if mode == "running" else WAITS + RUNS
        return [f"{job_id}|{self._word(state)}|n1|None|N/A" for job_id, state in self._groups(states)]

    def _scontrol(self, mode: str) -> list[str]:
        rows = []
        pending = [task.number for task in self.tasks if task.state == "PENDING"]
        if pending:
            limit = f"%{self.throttle}" if self.throttle else ""
            numbers = ",".join(map(str, pending)) + limit
            rows.append(
                f"JobId={self.root} ArrayJobId={self.root} ArrayTaskId={numbers} JobName={self.name} JobState=PENDING Reason=Priority"
            )
        rows += [f"JobId={50000 + task.number} ArrayJobId={self.root} ArrayTaskId={task.number} JobName={self.name} "
                 f"JobState={task.state} Reason=None NodeList=n1"
                 for task in self.tasks if task.state != "PENDING" and not task.forgotten]  # fmt: skip
        return [*rows, "JobId=77 JobName=another JobState=RUNNING Reason=None NodeList=n4"]

    def _sacct(self, mode: str) -> list[str]:
        """Accounting that is late still calls an ended job RUNNING, and knows no job that waits."""
        rows = []
        for job_id, state in self._groups(WAITS + RUNS + ENDS):
            told = state if mode == "whole" else "RUNNING" if state in ENDS + RUNS else ""
            if not told:
                continue
            task = None if "[" in job_id else self.task(job_id.split(";")[0])
            age = task.age if task else 0.0
            ended = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - age)) if told in ENDS else "Unknown"
            rows.append(f"{job_id}|{self._word(told)}|n1|0:0|{ended}")
            if self.style["steps"] and "[" not in job_id:
                rows.append(f"{job_id.split(';')[0]}.batch|{self._word(told)}|n1|0:0|{ended}")
        return rows
