"""The drill of single arms: cause real faults on the testbed and check how each ends. `make drill` prints the table.

A copy of the campaign trains the same arms undisturbed, so that a resumed arm can be shown to give an adapter of the same bytes. The drill
takes half an hour and is not part of `make test`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Campaign
from pipeline.execution.results import read_attributes
from slurm.testbed.testbed import Testbed
from tests.slurm.playing import (
    OVERRIDES,
    ROOT,
    UID,
    admin,
    claim,
    completed,
    digest,
    environ_of,
    first_step,
    pids,
    pipeline,
    queued,
    ranks,
    run,
    start,
    state_of,
    states,
    steps_of,
    submissions,
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
    saved = folder.attempts("a1")[0].saved_dir
    until(lambda: list(saved.glob("0*")), "a state of a1 outside the node")
    os.kill(int(str(claim(folder, "a1")["pid"])), signal.SIGKILL)
    until(lambda: set(states(job).values()) == {"FAILED"}, "the job's end")
    # The job is none that `round` submitted, so its end is known from the process alone.
    assert not folder.published("a1").exists()
    kept = list(saved.glob("0*"))
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
    drilled: Campaign, testbed: Testbed, ends: Callable[[str, str], None]
) -> None:
    folder = drilled.round("r0001")
    job = start(drilled, "a3", "--nodelist=n2", "--exclude=")
    training(folder, "a3", steps=40)
    old = int(str(claim(folder, "a3")["pid"]))
    slurmd = [pid for pid in pids(testbed, "slurmd") if b"n2" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    for pid in slurmd:
        os.kill(pid, signal.SIGKILL)
    slow = ranks(folder, "a3")
    for pid in slow:  # else it might be done before the second begins
        os.kill(pid, signal.SIGSTOP)
    admin("scontrol", "update", "nodename=n2", "state=down", "reason=drill")
    admin("scontrol", "update", f"jobid={task(job, 3)}", "reqnodelist=n3")
    until(lambda: len(folder.attempts("a3")) == 2, "the second instance")
    assert Path(f"/proc/{old}").exists(), "the old instance must still run for this drill"
    for pid in slow:
        with suppress(ProcessLookupError):  # it stood still for long, was killed as stalled, and goes on
            os.kill(pid, signal.SIGCONT)
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
    starts = [first_step(folder, "a4", number) for number in range(3)]
    assert starts[0] < starts[1] < starts[2]
    ends("preempted and requeued, twice", f"three starts, from steps {starts}; the undisturbed adapter")


def test_a_time_limit_is_met_with_a_checkpoint(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    """A job of one minute, told to stop at any time of its first half; its ranks stand still until then, and the next start has time."""
    folder = drilled.round("r0001")
    job = start(drilled, "a5", "--time=1", "--signal=B:USR2@25")
    until(lambda: folder.attempts("a5"), "a5's start")
    (first, *_) = folder.attempts("a5")
    told = first.task_dir / "stop"
    until(lambda: told.exists() or steps_of(folder, "a5", 0) >= 5, "step 5 of a5")
    slow = [] if told.exists() else ranks(folder, "a5")
    for pid in slow:
        os.kill(pid, signal.SIGSTOP)
    until(told.exists, "the signal before the limit")
    admin("scontrol", "update", f"jobid={task(job, 5)}", "timelimit=30")  # for this save too, on a machine however slow
    for pid in slow:
        os.kill(pid, signal.SIGCONT)
    until(first.interrupted.exists, "the first start's end")
    until(lambda: completed(folder, "a5"), "a5's score")
    starts = len(folder.attempts("a5"))
    assert starts == 2 and digest(folder, "a5") == undisturbed(drilled, "a5")
    resumed = first_step(folder, "a5", 1)
    assert resumed == steps_of(folder, "a5", 0) + 1
    ends(
        "a time limit shorter than the arm",
        f"told before it, saved, requeued: the second start went on at step {resumed}; the undisturbed adapter",
    )


def test_a_killed_slurmstepd_costs_a_start(
    drilled: Campaign, testbed: Testbed, ends: Callable[[str, str], None]
) -> None:
    """Slurm's own process of the job dies: its ranks go on unwatched, until Slurm finds out and starts the job again."""
    folder = drilled.round("r0001")
    number = len(folder.attempts("a0"))
    job = start(drilled, "a0")
    training(folder, "a0", attempt=number, steps=40)
    for pid in pids(testbed, "slurmstepd"):
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
        # Only root may join a group of root's; what joins becomes the cluster's user then.
        drop = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--"]
        work = [sys.executable, "-m", "pipeline", "worker", str(drilled.folder), "--round", "r0001", "a6"]
        command = ["bash", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "-", *drop, *work]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the end of the cgroup's processes")
        group.rmdir()
    assert folder.published("a6").exists(), ended.stderr
    found = read_attributes(folder.published("a6"))
    assert ended.returncode == 1 and found["exit_class"] == "out_of_memory", found["traceback"]
    assert "planned: " in found["traceback"] and len(folder.attempts("a6")) == 1
    ends("killed by the kernel for want of memory", "outcome `out_of_memory` with the memory plan; no retry")


def test_a_cancelled_arm_stays_cancelled(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    """It saves its state as one does that is requeued, and must not come back of itself."""
    folder = drilled.round("r0001")
    number, before = len(folder.attempts("a7")), submissions(folder)
    job = start(drilled, "a7")
    training(folder, "a7", attempt=number, steps=20)
    run("scancel", task(job, 7))
    until(lambda: task(job, 7) not in queued(), "the job's end")
    assert set(states(job).values()) == {"CANCELLED"}
    # A job by plain sbatch is in no record of the campaign, so `status` knows it by its files alone and not that it was cancelled.
    assert folder.attempts("a7")[-1].interrupted.exists() and state_of(drilled, "a7") == "interrupted"
    assert len(folder.attempts("a7")) == number + 1 and submissions(folder) == before
    ends("scancel of an arm that trains", "state saved; it stays cancelled, and nothing else is submitted")


def test_where_requeueing_is_forbidden_another_job_goes_on(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    number, before = len(folder.attempts("a7")), submissions(folder)
    kept = steps_of(folder, "a7", number - 1)
    job = start(drilled, "a7", "--no-requeue")
    training(folder, "a7", attempt=number, steps=kept + 20)
    run("scancel", "--signal=USR2", "--batch", task(job, 7))
    until(lambda: completed(folder, "a7"), "a7's score")
    assert digest(folder, "a7") == undisturbed(drilled, "a7")
    (line,) = submissions(folder)[len(before) :]
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
    drilled: Campaign, wide: Campaign, testbed: Testbed, ends: Callable[[str, str], None]
) -> None:
    folder = wide.round("r0001")
    job = start(wide, "a4", "--nodes=2")
    training(folder, "a4")
    admin("scontrol", "requeue", task(job, 4))
    until(lambda: len(folder.attempts("a4")) == 2, "the next start")
    training(folder, "a4", attempt=1, steps=60)
    others = [pid for pid in pids(testbed, "python") if b"NODE_RANK=1" in environ_of(pid)]
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
