#!/usr/bin/env python3
"""Play every kind of job on the testbed, and keep what squeue, scontrol and sacct say of it: `capture.py FOLDER` (root; four minutes).

    FOLDER/22.05.8/throttled/squeue scontrol sacct     what each client printed, of this case's jobs alone
    FOLDER/22.05.8/throttled/expect                    the truth, a line for each job: `17_3 PENDING waits`

`tests/cluster/test_captured_answers.py` reads them. The commands are the pipeline's own (slurm_jobs.COMMANDS), so capture again when those
change or when another version of Slurm is installed, and read the difference before you commit it. A job's truth is known because the
script makes it: it holds, kills, preempts or cancels the job, and waits until Slurm shows that.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.cluster import slurm_clients, slurm_jobs  # noqa: E402
from slurm.testbed.testbed import Testbed, TestbedError  # noqa: E402

NAME = "captured"
USER = 65534  # the ordinary user whose jobs an administrator cancels


class Stage:
    """The testbed, and the folder for the answers of one version of Slurm."""

    def __init__(self, folder: Path) -> None:
        version = slurm_clients.output_of("scontrol", "--version").split()[-1]
        self.folder = folder / version
        self.work = Path("/var/tmp")

    def submit(self, script: str, *flags: str, user: int | None = None) -> str:
        """Submit a shell script as job `captured` and return its id."""
        fixed = [
            "--parsable",
            f"--job-name={NAME}",
            f"--chdir={self.work}",
            "--output=/dev/null",
            "--nodes=1",
            "--ntasks=1",
        ]
        done = subprocess.run(
            ["sbatch", *fixed, *flags], input=f"#!/bin/bash\n{script}\n", capture_output=True, text=True, check=True,
            user=user, group=user,
        )  # fmt: skip
        return done.stdout.strip().split(";")[0]

    def keep(self, case: str, expected: dict[str, str], *, until: Callable[[], bool] | None = None) -> None:
        """Wait until the case has come about, and write what the clients say and what is true. expected: job id -> "PENDING waits"."""
        deadline = time.monotonic() + 150
        while until and not until():
            if time.monotonic() > deadline:
                raise SystemExit(f"{case}: it did not come about in 150 s; see `squeue`")
            time.sleep(0.3)
        folder = self.folder / case
        folder.mkdir(parents=True, exist_ok=True)
        roots = sorted({job_id.split("_")[0] for job_id in expected})
        for source, command in slurm_jobs.commands(roots, [NAME], time.time()).items():
            (folder / source).write_text(self.own_lines(slurm_clients.output_of(*command), roots))
        (folder / "expect").write_text("".join(f"{job_id} {truth}\n" for job_id, truth in expected.items()))
        print(case, flush=True)

    def own_lines(self, text: str, roots: list[str]) -> str:
        """The header and the lines of these jobs, without the host's name."""
        of_jobs = re.compile(rf"(^|ArrayJobId=|\bJobId=)({'|'.join(roots)})(?!\d)")
        kept = [line for number, line in enumerate(text.splitlines())
                if of_jobs.search(line) or (number == 0 and not line.startswith("JobId="))]  # fmt: skip
        return "".join(f"{line}\n".replace(socket.gethostname(), "login") for line in kept)


def state(job_id: str) -> str:
    """Slurm's word for one job; the empty text while it does not know the job."""
    text = slurm_clients.output_of("scontrol", "--oneliner", "show", "job", job_id)
    found = re.search(r"JobState=(\w+)", text)
    return found[1] if found else ""


def recorded(job_id: str, word: str) -> Callable[[], bool]:
    """Whether accounting has this state of a job, which takes some seconds."""
    return lambda: word in slurm_clients.output_of("sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id)


def is_in(job_id: str, *words: str) -> Callable[[], bool]:
    return lambda: state(job_id) in words


def wait_for(job_id: str, word: str) -> None:
    while state(job_id) != word:
        time.sleep(0.2)


def scancel(*arguments: str) -> None:
    subprocess.run(["scancel", *arguments], check=True)


def waiting_jobs(stage: Stage) -> None:
    job = stage.submit("sleep 9", "--array=0-7%4", "--begin=now+1hour")
    stage.keep("waiting", {f"{job}_{n}": "PENDING waits" for n in range(8)}, until=is_in(job, "PENDING"))
    scancel(job)
    job = stage.submit("sleep 9", "--array=1,3-5,8-14:2", "--hold")
    stage.keep(
        "held_list", {f"{job}_{n}": "PENDING waits" for n in (1, 3, 4, 5, 8, 10, 12, 14)}, until=is_in(job, "PENDING")
    )
    scancel(job)
    scattered = [7 * n + n % 3 for n in range(30)]
    job = stage.submit("sleep 9", f"--array={','.join(map(str, scattered))}", "--hold")
    stage.keep("held_long_list", {f"{job}_{n}": "PENDING waits" for n in scattered}, until=is_in(job, "PENDING"))
    scancel(job)


def running_jobs(stage: Stage) -> None:
    job = stage.submit("sleep 300", "--array=0-7%2")
    truth = {f"{job}_{n}": "RUNNING runs" if n < 2 else "PENDING waits" for n in range(8)}
    stage.keep("throttled", truth, until=is_in(f"{job}_1", "RUNNING"))
    scancel(f"{job}_5")
    stage.keep(
        "waiting_task_cancelled", truth | {f"{job}_5": "CANCELLED ended"}, until=lambda: state(f"{job}_5") != "PENDING"
    )
    subprocess.run(["scontrol", "requeue", f"{job}_1"], check=True)
    stage.keep(
        "requeued", {f"{job}_0": "RUNNING runs", f"{job}_1": "PENDING waits"}, until=is_in(f"{job}_1", "PENDING")
    )
    scancel(job)
    stage.keep("cancelled", {f"{job}_0": "CANCELLED ended"}, until=recorded(f"{job}_0", "CANCELLED"))
    job = stage.submit("sleep 300", "--array=0")
    stage.keep("array_of_one", {f"{job}_0": "RUNNING runs"}, until=is_in(f"{job}_0", "RUNNING"))
    scancel(job)
    job = stage.submit("sleep 300")
    stage.keep("no_array", {job: "RUNNING runs"}, until=is_in(job, "RUNNING"))
    scancel("--signal=STOP", job)
    scancel(job)


def ended_jobs(stage: Stage) -> None:
    job = stage.submit("exit $((SLURM_ARRAY_TASK_ID == 1))", "--array=0-1")
    stage.keep(
        "completed_and_failed",
        {f"{job}_0": "COMPLETED ended", f"{job}_1": "FAILED ended"},
        until=recorded(f"{job}_1", "FAILED"),
    )
    job = stage.submit("sleep 300", user=USER)
    wait_for(job, "RUNNING")
    scancel(job)
    stage.keep("cancelled_by_administrator", {job: "CANCELLED ended"}, until=recorded(job, "CANCELLED"))
    job = stage.submit("srun --overlap sleep 300 || true\nexit 0")
    while ".0" not in slurm_clients.output_of("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i"):
        time.sleep(0.2)
    scancel(f"{job}.0")
    stage.keep("step_cancelled", {job: "CANCELLED ended"}, until=recorded(job, "COMPLETED"))
    # This is what a job out of memory looks like on a site without cgroups, such as the testbed. With them Slurm says OUT_OF_MEMORY.
    job = stage.submit("kill -KILL $$")
    stage.keep("out_of_memory_without_cgroups", {job: "FAILED ended"}, until=recorded(job, "FAILED"))
    job = stage.submit("sleep 300", "--time=1")
    stage.keep("time_limit", {job: "TIMEOUT ended"}, until=recorded(job, "TIMEOUT"))


def jobs_that_come_back(stage: Stage) -> None:
    def both(one: Callable[[], bool], other: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: one() and other()

    for case, flag, word in (
        ("preempted", "--requeue", "PENDING"),
        ("preempted_for_good", "--no-requeue", "PREEMPTED"),
    ):
        job = stage.submit("sleep 300", "--partition=scavenge", "--nodelist=n8", "--exclusive", flag)
        wait_for(job, "RUNNING")
        other = stage.submit("sleep 300", "--partition=main", "--nodelist=n8", "--exclusive")
        truth = {job: f"{word} {'waits' if word == 'PENDING' else 'unknown'}", other: "RUNNING runs"}
        stage.keep(case, truth, until=both(is_in(job, word), is_in(other, "RUNNING")))
        scancel(job, other)
    for case, flag, word in (
        ("node_failure", "--no-requeue", "NODE_FAIL"),
        ("node_failure_requeued", "--requeue", "PENDING"),
    ):
        job = stage.submit("sleep 300", "--nodelist=n7", flag)
        wait_for(job, "RUNNING")
        subprocess.run(["scontrol", "update", "nodename=n7", "state=down", "reason=captured"], check=True)
        stage.keep(case, {job: f"{word} {'waits' if word == 'PENDING' else 'unknown'}"}, until=is_in(job, word))
        scancel(job)
        # This fails if the node came back by itself.
        subprocess.run(["scontrol", "update", "nodename=n7", "state=resume"], capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    testbed = Testbed()
    try:
        testbed.up()
    except TestbedError as error:
        print(f"capture: {error}", file=sys.stderr)
        return 1
    os.environ["SLURM_CONF"] = str(testbed.conf)
    stage = Stage(folder)
    for play in (waiting_jobs, running_jobs, ended_jobs, jobs_that_come_back):
        play(stage)
    print(f"next: git diff {folder}; python -m pytest tests/cluster/test_captured_answers.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
