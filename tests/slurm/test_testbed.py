"""Test that the testbed is a real Slurm: it schedules, accounts, requeues, loses nodes and serves ordinary users."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from slurm.testbed.testbed import Testbed

pytestmark = pytest.mark.timeout(120)


def ask(*command: str, **kwargs: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, **kwargs)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()


def submit(script: str, *options: str, **kwargs: Any) -> str:
    """The number of a batch job that runs these shell commands."""
    fixed = ("--parsable", "--output=/dev/null", "--chdir=/tmp", f"--wrap={script}")
    return ask("sbatch", *fixed, *options, **kwargs)


def job_states(job: str) -> list[str]:
    """The states that accounting knows of a job's tasks."""
    return ask("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=state").splitlines()


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s\n{ask('squeue')}"
        time.sleep(0.2)


def test_eight_nodes_with_eight_gpus(testbed: Testbed) -> None:
    lines = ask("sinfo", "--noheader", "--partition=main", "--Node", "--format=%N %T %G %c").splitlines()
    assert lines == [f"n{i} idle gpu:8 16" for i in range(1, 9)]


def test_a_job_sees_the_gpus_it_asked_for(testbed: Testbed) -> None:
    job = submit('test "$CUDA_VISIBLE_DEVICES" = 0,1,2', "--gres=gpu:3")
    wait_for("the end of the job", lambda: job_states(job) == ["COMPLETED"])


def test_array_and_dependent_job(testbed: Testbed) -> None:
    """The shape of a round: eight workers, one of which fails, and a job after them that runs all the same."""
    workers = submit('test "$SLURM_ARRAY_TASK_ID" != 5', "--array=0-7", "--gres=gpu:8", "--comment=demo/r0001")
    after = submit("true", f"--dependency=afterany:{workers}")
    wait_for("the end of the job after", lambda: job_states(after) == ["COMPLETED"])
    # Accounting knows of the tasks of an array some seconds later than of the job that waited for them (seen).
    wait_for("the account of all", lambda: sorted(job_states(workers)) == ["COMPLETED"] * 7 + ["FAILED"])
    comments = ask("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={workers}", "--format=comment")
    assert set(comments.splitlines()) == {"demo/r0001"}


def test_up_twice_starts_nothing_twice(testbed: Testbed) -> None:
    before = testbed.processes()
    testbed.up()
    assert testbed.processes() == before


def test_requeue(testbed: Testbed) -> None:
    job = submit("sleep 300")

    def runs_after(restarts: int) -> bool:
        shown = ask("scontrol", "show", "job", job)
        return "JobState=RUNNING" in shown and f"Restarts={restarts}" in shown

    wait_for("the start", lambda: runs_after(0))
    ask("scontrol", "requeue", job)
    wait_for("the second start", lambda: runs_after(1))
    ask("scancel", job)


def test_a_killed_node_comes_back(testbed: Testbed) -> None:
    [pid] = [pid for pid, name in testbed.processes().items() if name == "n3"]
    os.kill(pid, signal.SIGKILL)
    wait_for("the end of slurmd", lambda: pid not in testbed.processes())
    ask("scontrol", "update", "nodename=n3", "state=down", "reason=test")
    assert ask("sinfo", "--noheader", "--nodes=n3", "--format=%T").startswith("down")
    testbed.up()
    job = submit('test "$SLURMD_NODENAME" = n3', "--nodelist=n3")
    wait_for("a job on the node", lambda: job_states(job) == ["COMPLETED"])


def test_an_ordinary_user_submits(testbed: Testbed) -> None:
    job = submit('test "$(id -un)" = nobody', user="nobody", group="nogroup", extra_groups=[])
    wait_for("the end of the job", lambda: job_states(job) == ["COMPLETED"])
