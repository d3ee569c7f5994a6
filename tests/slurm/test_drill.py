"""The drill: real faults on the testbed, one arm at a time, and what each must end in. `make drill` prints the table.

A copy of the campaign trains the same arms undisturbed, so "resumed" can mean that the adapter has the same bytes. Not part of `make
test`: it takes a quarter of an hour.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.layout import Attempt, Campaign, Round, read_json, read_json_lines
from pipeline.results import read_attributes, status_of
from slurm.testbed.testbed import Testbed
from tests.slurm.test_round import ROOT, pipeline, run, sbatch, states, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.drill, pytest.mark.timeout(900)]

OVERRIDES = ["cluster=testbed", "experiment=smoke", "recipe.num_steps=150", "recipe.checkpoint_every=15", "recipe.warmup_steps=5",
             "cluster.stall_minutes=1"]  # fmt: skip
WAIT_SECONDS = 300
MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    folder = tmp_path_factory.mktemp("campaigns")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    made = Campaign.at(folder / "drill")
    pipeline("round", made.folder, *OVERRIDES, "--no-submit")
    shutil.copytree(made.folder, folder / "calm" / "drill")
    return made


@pytest.fixture
def ends(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Told the fault and its end, for the table."""
    return lambda fault, end: record_property("drill", f"{fault} | {end}")


def undisturbed(campaign: Campaign, arm: str) -> str:
    """Digest of the adapter that the arm gives when nothing happens."""
    calm = Campaign.at(campaign.folder.parent / "calm" / "drill")
    published = calm.round("r0001").published(arm)
    if not published.exists():
        pipeline("worker", calm.folder, "r0001", arm)
    return str(read_attributes(published)["adapter_digest"])


def until(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            queue = subprocess.run(["squeue", "--all"], capture_output=True, text=True).stdout
            pytest.fail(f"{what} did not come in {seconds:.0f} s\n{queue}")
        time.sleep(0.2)


def start(campaign: Campaign, arm: str, *flags: str) -> str:
    return sbatch(f"--array={arm[1]}", *flags, "slurm/round.sbatch", campaign.folder, "r0001")


def steps_of(folder: Round, arm: str, attempt: int) -> int:
    path = Attempt(folder.folder / arm / f"attempt_{attempt:02d}").progress
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"train"' in line for line in lines)


def training(folder: Round, arm: str, attempt: int = 0, steps: int = 30) -> None:
    until(lambda: steps_of(folder, arm, attempt) >= steps, f"step {steps} of {arm}, attempt {attempt}")


def claim(folder: Round, arm: str, attempt: int = 0) -> dict[str, object]:
    found: dict[str, object] = read_json(folder.folder / arm / f"attempt_{attempt:02d}" / "claim.json")
    return found


def descendants(pid: int) -> list[int]:
    """Of a process, in every namespace."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found, queue = [], [pid]
    while queue:
        queue += (below := children.get(queue.pop(), []))
        found += below
    return found


def ranks(folder: Round, arm: str, attempt: int = 0) -> list[int]:
    """The training processes of an arm, torchrun's children."""
    found = []
    for pid in descendants(int(str(claim(folder, arm, attempt)["pid"]))):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if b"\0LOCAL_RANK=" in environ or environ.startswith(b"LOCAL_RANK="):
            found.append(pid)
    return sorted(found)


def state_of(campaign: Campaign, arm: str) -> str:
    rows = json.loads(pipeline("status", campaign.folder, "r0001", "--json"))["arms"]
    return next(str(row["state"]) for row in rows if row["arm"] == arm)


def completed(folder: Round, arm: str) -> bool:
    return status_of(folder.published(arm)) == "completed"


def digest(folder: Round, arm: str) -> str:
    return str(read_attributes(folder.published(arm))["adapter_digest"])


def test_a_killed_rank_is_a_typed_outcome(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = campaign.round("r0001")
    start(campaign, "a0")
    training(folder, "a0")
    os.kill(ranks(folder, "a0")[-1], signal.SIGKILL)
    wait_for(folder.published("a0"), "an outcome")
    found = read_attributes(folder.published("a0"))
    assert (found["status"], found["exit_class"]) == ("failed", "killed")
    assert state_of(campaign, "a0") == "failed"
    ends("SIGKILL of one rank", f"outcome `{found['exit_class']}`, no score; `rerun` offered")


def test_a_killed_worker_is_lost_and_run_again(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = campaign.round("r0001")
    job = start(campaign, "a1")
    training(folder, "a1", steps=40)
    time.sleep(2)
    os.kill(int(str(claim(folder, "a1")["pid"])), signal.SIGKILL)
    until(lambda: set(states(job).values()) == {"FAILED"}, "the job's end")
    # The job is none that `round` submitted, so its end is known from the process alone.
    assert not folder.published("a1").exists()
    kept = list((folder.folder / "a1/attempt_00/checkpoints").glob("0*"))
    job = start(campaign, "a1")
    until(lambda: completed(folder, "a1"), "a1's score")
    assert digest(folder, "a1") == undisturbed(campaign, "a1")
    ends(
        "SIGKILL of the worker",
        f"no outcome, {len(kept)} state kept outside the node; the next start gives the undisturbed adapter",
    )


def test_a_stopped_rank_is_killed_as_stalled_and_goes_on(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = campaign.round("r0001")
    start(campaign, "a2")
    training(folder, "a2")
    os.kill(ranks(folder, "a2")[-1], signal.SIGSTOP)
    until(lambda: completed(folder, "a2"), "a2's score")
    phases = [mark["phase"] for mark in read_json_lines(folder.attempts("a2")[0].phases)]
    assert phases.count("stalled") == 1 and len(folder.attempts("a2")) == 1
    assert digest(folder, "a2") == undisturbed(campaign, "a2")
    ends("SIGSTOP of one rank", "stalled after a minute, killed, went on from its checkpoint: the undisturbed adapter")


def test_a_lost_node_s_arm_goes_elsewhere_while_the_old_one_still_runs(
    campaign: Campaign, ends: Callable[[str, str], None]
) -> None:
    folder = campaign.round("r0001")
    job = start(campaign, "a3", "--nodelist=n2", "--exclude=")
    training(folder, "a3", steps=40)
    old = int(str(claim(folder, "a3")["pid"]))
    slurmd = [pid for pid in _pids("slurmd") if b"n2" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    for pid in slurmd:
        os.kill(pid, signal.SIGKILL)
    run("scontrol", "update", "nodename=n2", "state=down", "reason=drill")
    run("scontrol", "update", f"jobid={_task(job, 3)}", "reqnodelist=n3")
    until(lambda: len(folder.attempts("a3")) == 2, "the second instance")
    assert Path(f"/proc/{old}").exists(), "the old instance must still run for this drill"
    until(lambda: completed(folder, "a3"), "a3's score")
    until(lambda: not Path(f"/proc/{old}").exists(), "the old instance's end")
    found = read_attributes(folder.published("a3"))
    assert found["attempt"] == 1 and claim(folder, "a3", 1)["node"] == "n3"
    assert digest(folder, "a3") == undisturbed(campaign, "a3")
    ends(
        "node lost, old instance runs on",
        "requeued to another node; the old instance never published; the undisturbed adapter",
    )


def test_two_requeues_lose_nothing(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = campaign.round("r0001")
    job = start(campaign, "a4")
    for number in range(2):
        training(folder, "a4", attempt=number, steps=25 * (number + 1))
        run("scontrol", "requeue", _task(job, 4))
        until(lambda number=number: len(folder.attempts("a4")) == number + 2, "the next start")
    until(lambda: completed(folder, "a4"), "a4's score")
    assert digest(folder, "a4") == undisturbed(campaign, "a4")
    starts = [_first_step(folder, number) for number in range(3)]
    assert starts[0] < starts[1] < starts[2]
    ends("preempted and requeued, twice", f"three starts, from steps {starts}; the undisturbed adapter")


def test_a_time_limit_is_met_with_a_checkpoint(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    """A job of one minute whose ranks stand still for half of it, so that it must be told to stop before it is done."""
    folder = campaign.round("r0001")
    start(campaign, "a5", "--time=1", "--signal=B:USR2@25")
    training(folder, "a5", steps=20)
    slow = ranks(folder, "a5")
    for pid in slow:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(30)  # below the stall limit
    for pid in slow:
        os.kill(pid, signal.SIGCONT)
    until(lambda: completed(folder, "a5"), "a5's score", 600)
    starts = len(folder.attempts("a5"))
    assert starts >= 2 and digest(folder, "a5") == undisturbed(campaign, "a5")
    ends(
        "a time limit shorter than the arm",
        f"told before it, saved, requeued: {starts} starts, the undisturbed adapter",
    )


@pytest.mark.skipif(not MEMORY.is_dir(), reason=f"no memory cgroup at {MEMORY}")
def test_a_kill_for_want_of_memory_is_typed_with_the_plan(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    """The kernel's own kill: the worker runs in a memory cgroup that two ranks do not fit in."""
    folder, group = campaign.round("r0001"), MEMORY / "drill"
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
            str(campaign.folder),
            "r0001",
            "a6",
        ]
        done = _run(command)
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the end of the cgroup's processes")
        group.rmdir()
    found = read_attributes(folder.published("a6"))
    assert done.returncode == 1 and found["exit_class"] == "out_of_memory", found["traceback"]
    assert "planned: " in found["traceback"] and len(folder.attempts("a6")) == 1
    ends("killed by the kernel for want of memory", "outcome `out_of_memory` with the memory plan; no retry")


def test_where_requeueing_is_forbidden_another_job_goes_on(
    campaign: Campaign, ends: Callable[[str, str], None]
) -> None:
    folder = campaign.round("r0001")
    job = start(campaign, "a7", "--no-requeue")
    training(folder, "a7", steps=40)
    run("scancel", "--signal=USR2", "--batch", _task(job, 7))
    until(lambda: completed(folder, "a7"), "a7's score")
    assert digest(folder, "a7") == undisturbed(campaign, "a7")
    (line,) = read_json_lines(folder.jobs)
    assert line["why"] == "rerun" and set(line["tasks"]) == {"r0001/a7"}
    run("scancel", line["meta"])
    ends("signal before the limit, requeueing forbidden", "saved; another job went on: the undisturbed adapter")


@pytest.fixture(scope="module")
def wide(campaign: Campaign) -> Campaign:
    """The same recipes, an arm over two nodes."""
    made = Campaign.at(campaign.folder.parent / "wide")
    over_two = ["cluster.ranks_per_node=1", "cluster.network=fabric"]
    pipeline("round", made.folder, *OVERRIDES, *over_two, "--no-submit")
    return made


def test_an_arm_over_two_nodes_is_that_of_one(
    campaign: Campaign, wide: Campaign, ends: Callable[[str, str], None]
) -> None:
    folder = wide.round("r0001")
    start(wide, "a3", "--nodes=2")
    until(lambda: completed(folder, "a3"), "a3's score")
    coverage = json.loads(str(read_attributes(folder.published("a3"))["coverage"]))
    assert coverage["nodes"] == "2 nodes"
    assert digest(folder, "a3") == undisturbed(campaign, "a3")
    assert not (folder.attempts("a3")[0].folder / "nodes" / "out").exists()
    ends("an arm over two nodes", "the adapter of one node; a probe on each")


def test_an_arm_over_two_nodes_is_requeued_and_its_second_node_killed(
    campaign: Campaign, wide: Campaign, ends: Callable[[str, str], None]
) -> None:
    folder = wide.round("r0001")
    job = start(wide, "a4", "--nodes=2")
    training(folder, "a4")
    run("scontrol", "requeue", _task(job, 4))
    until(lambda: len(folder.attempts("a4")) == 2, "the next start")
    training(folder, "a4", attempt=1, steps=60)
    others = [pid for pid in _pids("python") if b"NODE_RANK=1" in _environ(pid)]
    os.kill(max(others), signal.SIGKILL)
    until(lambda: folder.published("a4").exists(), "an outcome")
    found = read_attributes(folder.published("a4"))
    assert (found["status"], found["exit_class"]) == ("failed", "killed")
    start(wide, "a4", "--nodes=2")
    until(lambda: completed(folder, "a4"), "a4's score")
    assert digest(folder, "a4") == undisturbed(campaign, "a4")
    ends(
        "two nodes: requeued, then a rank of the second killed",
        "saved and resumed; then outcome `killed`; started again: the undisturbed adapter",
    )


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def test_two_metas_and_two_rounds_at_once(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = campaign.round("r0001")
    for arm in ("a0", "a6"):
        start(campaign, arm)
    sbatch("--array=0-1", "slurm/round.sbatch", campaign.folder, "r0000")
    until(lambda: all(completed(folder, arm) for arm in ("a0", "a6")), "the last arms", 600)
    until(lambda: all(completed(campaign.round("r0000"), arm) for arm in ("a0", "a1")), "the reference", 600)
    command = [sys.executable, "-m", "pipeline"]
    with ThreadPoolExecutor(2) as pool:
        metas = list(pool.map(lambda _: _run([*command, "meta", str(campaign.folder), "r0001"]), range(2)))
    assert sorted(each.returncode for each in metas) == [0, 2], [each.stderr for each in metas]
    assert any("another meta stage of r0001 runs now" in each.stderr for each in metas)
    assert [path.name for path in sorted(folder.decisions_dir.iterdir())] == ["00.json"]
    with ThreadPoolExecutor(2) as pool:
        rounds = list(pool.map(lambda _: _run([*command, "round", str(campaign.folder), "cluster=testbed"]), range(2)))
    assert sorted(each.returncode for each in rounds) == [0, 2], [each.stderr for each in rounds]
    assert len(read_json_lines(campaign.round("r0002").jobs)) == 1
    pipeline("cancel", campaign.folder)
    ends("two metas, two rounds at once", "one decision, one submission; the other says who has it")


def test_a_damaged_result_is_refused_by_name_and_cured(campaign: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = campaign.round("r0001")
    whole = folder.published("a6").read_bytes()
    for damage in (whole[: len(whole) // 2], bytes([*whole[:2000], whole[2000] ^ 1, *whole[2001:]])):
        folder.published("a6").write_bytes(damage)
        told = _run([sys.executable, "-m", "pipeline", "meta", str(campaign.folder), "r0001"])
        outcomes = {each["arm"]: each for each in read_json(folder.evidence)["outcomes"]}
        if outcomes["a6"]["status"] == "failed":
            assert outcomes["a6"]["exit_class"].startswith("integrity"), told.stderr
            break
    else:
        pytest.fail("no damage was seen")
    folder.published("a6").write_bytes(whole[: len(whole) // 2])
    start(campaign, "a6")
    until(lambda: completed(folder, "a6"), "a6's score")
    assert digest(folder, "a6") == undisturbed(campaign, "a6")
    ends("truncated result file", "refused by name in the evidence; started again, its sealed adapter is judged again")


def test_a_campaign_goes_on_by_itself_without_accounting_and_over_a_new_controller(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory, ends: Callable[[str, str], None]
) -> None:
    """Two rounds; slurmdbd is stopped all through the first, slurmctld is killed in its middle."""
    made = Campaign.at(tmp_path_factory.mktemp("auto") / "auto")
    for parent in (made.folder.parent, *made.folder.parents[1:3]):
        parent.chmod(0o755)
    controller = next(each for each in testbed.services if each.name == "slurmctld")
    testbed._stop("slurmdbd")
    try:
        begun = time.monotonic()
        pipeline("campaign", made.folder, "--rounds", "2", "cluster=testbed", "experiment=smoke")
        submitting = time.monotonic() - begun
        first = made.round("r0001")
        until(lambda: completed(first, "a1"), "a1's score")
        testbed._stop("slurmctld")
        time.sleep(3)
        rows = json.loads(pipeline("status", made.folder, "--json"))["arms"]
        blind = sorted({row["state"] for row in rows})
        testbed._start(controller)
        until(lambda: first.closed.exists(), "the end of r0001", 600)
        assert all(completed(first, f"a{n}") for n in range(8))
    finally:
        testbed.up()
    second = made.round("r0002")
    until(lambda: second.submitted.exists(), "r0002")
    meta, following = read_json(first.submitted)["meta_job_id"], read_json(second.submitted)["array_job_ids"][0]
    # Slurm's times are whole seconds.
    started, sent = _when(meta, "StartTime"), _when(f"{following}_0", "SubmitTime")
    until(lambda: (second.folder / "a0" / "attempt_00" / "claim.json").exists(), "the first claim of r0002")
    gap = _when(f"{following}_0", "StartTime") - _when(meta, "EndTime")
    pipeline("pause", made.folder)
    until(lambda: second.closed.exists(), "the end of r0002", 600)
    assert not made.round("r0003").submitted.exists()
    ends("no slurmdbd, slurmctld killed mid-round", f"round complete; status meanwhile: {', '.join(blind)}")
    ends("two rounds by themselves", f"first submission {submitting:.1f} s (init included); meta's start to the next sbatch "
         f"{sent - started:.0f} s; idle between rounds {gap:.0f} s")  # fmt: skip


NO_OP = """
import sys, tempfile
from pathlib import Path
from pipeline import image, namespace
from pipeline.sandbox import Sandbox

_, sqsh, digest, number = sys.argv[1:]
namespace.enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])
with tempfile.TemporaryDirectory(prefix="noop-") as folder:
    scratch = Path(folder)
    (scratch / "out").mkdir()
    with image.mounted(Path(sqsh), digest, scratch) as mount, image.forked(mount, scratch, namespace.trial_uid()) as fork:
        sandbox = Sandbox({}, {"/substrate": fork.root, "/out": scratch / "out"})
        with sandbox.start(["touch", "/substrate/was_here", "/out/was_here"], scratch / "log") as process:
            sys.exit(process.wait())
"""


def test_a_hundred_rounds_of_eight_leave_nothing_behind(
    campaign: Campaign, tmp_path: Path, ends: Callable[[str, str], None]
) -> None:
    """Arms that mount, fork, enter a sandbox, touch two files and end."""
    from pipeline import scheduler

    code = tmp_path / "code"
    shutil.copytree(ROOT / "pipeline", code / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "pipeline" / "__main__.py").write_text(NO_OP)
    tree_digest = str(read_json(campaign.image.with_name(campaign.image.name + ".json"))["tree_digest"])
    seconds, before = [], _left()
    for _ in range(100):
        begun = time.monotonic()
        stages = [("worker", str(campaign.image), tree_digest, f"a{n}") for n in range(8)]
        codes = scheduler.run_local(stages, code, 2, tmp_path / "logs")
        assert set(codes.values()) == {0}, [path.read_text()[-500:] for path in (tmp_path / "logs").iterdir()]
        seconds.append(time.monotonic() - begun)
    assert _left() == before
    early, late = sorted(seconds[:20])[10], sorted(seconds[-20:])[10]
    assert late < 1.2 * early
    ends(
        "100 rounds of 8 no-op arms",
        f"no mount, process or file left; {early:.2f} s a round at the beginning, {late:.2f} s at the end (medians)",
    )


def _left() -> tuple[list[str], list[str], list[str]]:
    """Mounts, processes and files that arms make."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    names = [name for name in ("squashfuse", "bwrap", "fuse-overlayfs") if _pids(name)]
    files = [
        path.name for path in Path("/tmp").iterdir() if path.name.startswith(("noop-", "sandbox-", "arm-", "judge-"))
    ]
    return sorted(mounts), names, sorted(files)


def _when(job: str, what: str) -> float:
    """Seconds since the epoch, as the controller remembers it."""
    text = run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
    words = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return time.mktime(time.strptime(words[what], "%Y-%m-%dT%H:%M:%S"))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _pids(name: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        try:
            if entry.read_text().strip() == name:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def _task(job: str, index: int) -> str:
    return job if "_" in job else f"{job}_{index}"


def _first_step(folder: Round, attempt: int) -> int:
    lines = read_json_lines(Attempt(folder.folder / "a4" / f"attempt_{attempt:02d}").progress)
    begun = max((number for number, line in enumerate(lines) if line["phase"] == "start"), default=0)
    return next((line["step"] for line in lines[begun:] if line["phase"] == "train"), 0)
