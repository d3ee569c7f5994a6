"""The drill, one arm at a time: real faults on the testbed, and what each must end in. `make drill` prints the table.

A copy of the campaign trains the same arms undisturbed, so "resumed" can mean that the adapter has the same bytes. Not part of `make
test`: all of it takes half an hour.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.layout import Campaign, read_json_lines
from pipeline.results import read_attributes
from tests.slurm.playing import (
    OVERRIDES,
    admin,
    attempted,
    claim,
    completed,
    digest,
    environ_of,
    first_step,
    pids,
    pipeline,
    ranks,
    run,
    start,
    state_of,
    states,
    task,
    training,
    undisturbed,
    until,
    wait_for,
)  # fmt: skip

pytestmark = [pytest.mark.slurm, pytest.mark.drill, pytest.mark.timeout(900)]

MEMORY = Path("/sys/fs/cgroup/memory")


def test_a_killed_rank_is_a_typed_outcome(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    start(drilled, "a0")
    training(folder, "a0")
    os.kill(ranks(folder, "a0")[-1], signal.SIGKILL)
    wait_for(folder.published("a0"), "an outcome")
    found = read_attributes(folder.published("a0"))
    assert (found["status"], found["exit_class"]) == ("failed", "killed")
    assert state_of(drilled, "a0") == "failed"
    ends("SIGKILL of one rank", f"outcome `{found['exit_class']}`, no score; `rerun` offered")


def test_a_killed_worker_is_lost_and_run_again(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    job = start(drilled, "a1")
    training(folder, "a1", steps=40)
    time.sleep(2)
    os.kill(int(str(claim(folder, "a1")["pid"])), signal.SIGKILL)
    until(lambda: set(states(job).values()) == {"FAILED"}, "the job's end")
    # The job is none that `round` submitted, so its end is known from the process alone.
    assert not folder.published("a1").exists()
    kept = list((folder.folder / "a1/attempt_00/checkpoints").glob("0*"))
    job = start(drilled, "a1")
    until(lambda: completed(folder, "a1"), "a1's score")
    assert digest(folder, "a1") == undisturbed(drilled, "a1")
    ends(
        "SIGKILL of the worker",
        f"no outcome, {len(kept)} state kept outside the node; the next start gives the undisturbed adapter",
    )


def test_a_stopped_rank_is_killed_as_stalled_and_goes_on(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    start(drilled, "a2")
    training(folder, "a2")
    os.kill(ranks(folder, "a2")[-1], signal.SIGSTOP)
    until(lambda: completed(folder, "a2"), "a2's score")
    phases = [mark["phase"] for mark in read_json_lines(folder.attempts("a2")[0].phases)]
    assert phases.count("stalled") == 1 and len(folder.attempts("a2")) == 1
    assert digest(folder, "a2") == undisturbed(drilled, "a2")
    ends("SIGSTOP of one rank", "stalled after a minute, killed, went on from its checkpoint: the undisturbed adapter")


def test_a_lost_node_s_arm_goes_elsewhere_while_the_old_one_still_runs(
    drilled: Campaign, ends: Callable[[str, str], None]
) -> None:
    folder = drilled.round("r0001")
    job = start(drilled, "a3", "--nodelist=n2", "--exclude=")
    training(folder, "a3", steps=40)
    old = int(str(claim(folder, "a3")["pid"]))
    slurmd = [pid for pid in pids("slurmd") if b"n2" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    for pid in slurmd:
        os.kill(pid, signal.SIGKILL)
    admin("scontrol", "update", "nodename=n2", "state=down", "reason=drill")
    admin("scontrol", "update", f"jobid={task(job, 3)}", "reqnodelist=n3")
    until(lambda: len(folder.attempts("a3")) == 2, "the second instance")
    assert Path(f"/proc/{old}").exists(), "the old instance must still run for this drill"
    until(lambda: completed(folder, "a3"), "a3's score")
    until(lambda: not Path(f"/proc/{old}").exists(), "the old instance's end")
    found = read_attributes(folder.published("a3"))
    assert found["attempt"] == 1 and claim(folder, "a3", 1)["node"] == "n3"
    assert digest(folder, "a3") == undisturbed(drilled, "a3")
    ends(
        "node lost, old instance runs on",
        "requeued to another node; the old instance never published; the undisturbed adapter",
    )


def test_two_requeues_lose_nothing(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    job = start(drilled, "a4")
    for number in range(2):
        training(folder, "a4", attempt=number, steps=25 * (number + 1))
        admin("scontrol", "requeue", task(job, 4))
        until(lambda number=number: len(folder.attempts("a4")) == number + 2, "the next start")
    until(lambda: completed(folder, "a4"), "a4's score")
    assert digest(folder, "a4") == undisturbed(drilled, "a4")
    starts = [first_step(folder, number) for number in range(3)]
    assert starts[0] < starts[1] < starts[2]
    ends("preempted and requeued, twice", f"three starts, from steps {starts}; the undisturbed adapter")


def test_a_time_limit_is_met_with_a_checkpoint(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    """A job of one minute whose ranks stand still for half of it, so that it must be told to stop before it is done."""
    folder = drilled.round("r0001")
    start(drilled, "a5", "--time=1", "--signal=B:USR2@25")
    training(folder, "a5", steps=20)
    slow = ranks(folder, "a5")
    for pid in slow:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(30)  # below the stall limit
    for pid in slow:
        os.kill(pid, signal.SIGCONT)
    until(lambda: completed(folder, "a5"), "a5's score", 600)
    starts = len(folder.attempts("a5"))
    assert starts >= 2 and digest(folder, "a5") == undisturbed(drilled, "a5")
    ends(
        "a time limit shorter than the arm",
        f"told before it, saved, requeued: {starts} starts, the undisturbed adapter",
    )


def test_a_killed_slurmstepd_costs_a_start(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    """Slurm's own process of the job dies: its ranks go on unwatched, until Slurm finds out and starts the job again."""
    folder = drilled.round("r0001")
    number = len(folder.attempts("a0"))
    job = start(drilled, "a0")
    training(folder, "a0", attempt=number, steps=40)
    for pid in pids("slurmstepd"):
        os.kill(pid, signal.SIGKILL)
    ended = {"FAILED", "NODE_FAIL", "COMPLETED", "CANCELLED"}
    until(lambda: completed(folder, "a0") or set(states(job).values()) <= ended, "an end", 600)
    how = "Slurm started it again" if len(folder.attempts("a0")) > number + 1 else "its worker went on to the score"
    if not completed(folder, "a0"):
        start(drilled, "a0")
        how = "the next start went on"
        until(lambda: completed(folder, "a0"), "a0's score")
    assert digest(folder, "a0") == undisturbed(drilled, "a0")
    ends("SIGKILL of slurmstepd", f"{how}: the undisturbed adapter")


@pytest.mark.skipif(not MEMORY.is_dir(), reason=f"no memory cgroup at {MEMORY}")
def test_a_kill_for_want_of_memory_is_typed_with_the_plan(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    """The kernel's own kill: the worker runs in a memory cgroup that two ranks do not fit in."""
    folder, group = drilled.round("r0001"), MEMORY / "drill"
    group.mkdir(exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(str(500 * 2**20))
    try:
        join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        command = [
            "bash",
            "-c",
            join,
            "-",
            sys.executable,
            "-m",
            "pipeline",
            "worker",
            str(drilled.folder),
            "r0001",
            "a6",
        ]
        ended = attempted(command)
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the end of the cgroup's processes")
        group.rmdir()
    found = read_attributes(folder.published("a6"))
    assert ended.returncode == 1 and found["exit_class"] == "out_of_memory", found["traceback"]
    assert "planned: " in found["traceback"] and len(folder.attempts("a6")) == 1
    ends("killed by the kernel for want of memory", "outcome `out_of_memory` with the memory plan; no retry")


def test_where_requeueing_is_forbidden_another_job_goes_on(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    job = start(drilled, "a7", "--no-requeue")
    training(folder, "a7", steps=40)
    run("scancel", "--signal=USR2", "--batch", task(job, 7))
    until(lambda: completed(folder, "a7"), "a7's score")
    assert digest(folder, "a7") == undisturbed(drilled, "a7")
    (line,) = read_json_lines(folder.jobs)
    assert line["why"] == "rerun" and set(line["tasks"]) == {"r0001/a7"}
    run("scancel", line["meta"])
    ends("signal before the limit, requeueing forbidden", "saved; another job went on: the undisturbed adapter")


@pytest.fixture(scope="module")
def wide(drilled: Campaign) -> Campaign:
    """The same recipes, an arm over two nodes."""
    made = Campaign.at(drilled.folder.parent / "wide")
    over_two = ["cluster.ranks_per_node=1", "cluster.network=fabric"]
    pipeline("round", made.folder, *OVERRIDES, *over_two, "--no-submit")
    return made


def test_an_arm_over_two_nodes_is_that_of_one(
    drilled: Campaign, wide: Campaign, ends: Callable[[str, str], None]
) -> None:
    folder = wide.round("r0001")
    start(wide, "a3", "--nodes=2")
    until(lambda: completed(folder, "a3"), "a3's score")
    coverage = json.loads(str(read_attributes(folder.published("a3"))["coverage"]))
    assert coverage["nodes"] == "2 nodes"
    assert digest(folder, "a3") == undisturbed(drilled, "a3")
    assert not (folder.attempts("a3")[0].folder / "nodes" / "out").exists()
    ends("an arm over two nodes", "the adapter of one node; a probe on each")


def test_an_arm_over_two_nodes_is_requeued_and_its_second_node_killed(
    drilled: Campaign, wide: Campaign, ends: Callable[[str, str], None]
) -> None:
    folder = wide.round("r0001")
    job = start(wide, "a4", "--nodes=2")
    training(folder, "a4")
    admin("scontrol", "requeue", task(job, 4))
    until(lambda: len(folder.attempts("a4")) == 2, "the next start")
    training(folder, "a4", attempt=1, steps=60)
    others = [pid for pid in pids("python") if b"NODE_RANK=1" in environ_of(pid)]
    os.kill(max(others), signal.SIGKILL)
    until(lambda: folder.published("a4").exists(), "an outcome")
    found = read_attributes(folder.published("a4"))
    assert (found["status"], found["exit_class"]) == ("failed", "killed")
    start(wide, "a4", "--nodes=2")
    until(lambda: completed(folder, "a4"), "a4's score")
    assert digest(folder, "a4") == undisturbed(drilled, "a4")
    ends(
        "two nodes: requeued, then a rank of the second killed",
        "saved and resumed; then outcome `killed`; started again: the undisturbed adapter",
    )
