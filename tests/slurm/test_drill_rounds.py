"""The drill of whole rounds; see test_drill_arms.py."""

import ctypes
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from slurm.testbed.testbed import Testbed
from tests.slurm.playing import (
    ROOT,
    UID,
    WHO,
    attempted,
    completed,
    descendants,
    digest,
    own,
    pipeline,
    queued,
    sbatch,
    start,
    states,
    submissions,
    training,
    undisturbed,
    until,
    when,
)
from tests.support.campaigns import publish, publish_reference, tree

pytestmark = [pytest.mark.slurm, pytest.mark.drill, pytest.mark.timeout(900)]


def test_two_metas_and_two_rounds_at_once(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    for arm in ("a0", "a6"):
        start(drilled, arm)
    sbatch("--array=0-1", "slurm/round.sbatch", drilled.folder, "r0000")
    until(lambda: all(completed(folder, arm) for arm in ("a0", "a6")), "the last arms", 600)
    until(lambda: all(completed(drilled.round("r0000"), arm) for arm in ("a0", "a1")), "the reference", 600)
    command = [sys.executable, "-m", "pipeline"]
    with ThreadPoolExecutor(2) as pool:
        metas = list(
            pool.map(lambda _: attempted([*command, "meta", str(drilled.folder), "--round", "r0001"]), range(2))
        )
    assert sorted(each.returncode for each in metas) == [0, 2], [each.stderr for each in metas]
    assert any("another meta stage of r0001 runs now" in each.stderr for each in metas)
    assert [path.name for path in sorted(folder.decisions_dir.iterdir())] == ["00.json"]
    with ThreadPoolExecutor(2) as pool:
        rounds = list(
            pool.map(lambda _: attempted([*command, "round", str(drilled.folder), "cluster=testbed"]), range(2))
        )
    assert sorted(each.returncode for each in rounds) == [0, 2], [each.stderr for each in rounds]
    following = drilled.round("r0002")
    assert len(submissions(following)) == 1
    training(following, "a0", steps=5)
    pipeline("cancel", drilled.folder)
    jobs = [*submissions(following)[0]["tasks"].values(), submissions(following)[0]["meta"]]
    until(lambda: not set(jobs) & set(queued()), "the cancelled round's end")
    assert len(following.attempts("a0")) == 1 and not following.published("a0").exists()
    assert len(submissions(following)) == 1
    ends("two metas, two rounds at once", "one decision, one submission; the other says who has it")


def test_a_damaged_result_is_refused_by_name_and_cured(drilled: Campaign, ends: Callable[[str, str], None]) -> None:
    folder = drilled.round("r0001")
    whole = folder.published("a6").read_bytes()
    middle = len(whole) // 2
    for damage in (whole[:middle], bytes([*whole[:middle], whole[middle] ^ 1, *whole[middle + 1 :]])):
        folder.published("a6").write_bytes(damage)
        told = attempted([sys.executable, "-m", "pipeline", "meta", str(drilled.folder), "--round", "r0001"])
        outcomes = {each["arm"]: each for each in read_json(folder.evidence)["outcomes"]}
        assert outcomes["a6"]["status"] == "failed", told.stderr
        assert outcomes["a6"]["exit_class"].startswith("integrity"), told.stderr
    start(drilled, "a6")
    until(lambda: completed(folder, "a6"), "a6's score")
    assert digest(folder, "a6") == undisturbed(drilled, "a6")
    ends(
        "result file truncated, or one bit of it flipped",
        "refused by name in the evidence; started again, its sealed adapter is judged again",
    )


def test_a_campaign_goes_on_by_itself_without_accounting_and_over_a_new_controller(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory, ends: Callable[[str, str], None]
) -> None:
    """Two rounds; slurmdbd is stopped all through the first, slurmctld is killed in its middle."""
    made = Campaign.at(own(tmp_path_factory.mktemp("auto")) / "auto")
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
    started, sent = when(meta, "StartTime"), when(f"{following}_0", "SubmitTime")
    until(lambda: (second.folder / "a0" / "attempt_00" / "claim.json").exists(), "the first claim of r0002")
    gap = when(f"{following}_0", "StartTime") - when(meta, "EndTime")
    pipeline("pause", made.folder)
    until(lambda: second.closed.exists(), "the end of r0002", 600)
    assert not made.round("r0003").submitted.exists()
    ends("no slurmdbd, slurmctld killed mid-round", f"round complete; status meanwhile: {', '.join(blind)}")
    ends("two rounds by themselves", f"first submission {submitting:.1f} s (init included); meta's start to the next sbatch "
         f"{sent - started:.0f} s; idle between rounds {gap:.0f} s")  # fmt: skip


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 48 MiB that nodes see."""
    folder = own(tmp_path_factory.mktemp("small"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=48m,mode=0755,uid={UID},gid={UID}", "small", str(folder)], check=True
    )
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """To the last byte."""
    ballast = disk / "ballast"
    with open(ballast, "ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


def test_a_full_disk_costs_a_start_and_no_file(
    drilled: Campaign, small_disk: Path, ends: Callable[[str, str], None]
) -> None:
    made = Campaign.at(shutil.copytree(drilled.folder.parent / "calm" / "drill", small_disk / "drill"))
    for path in (made.folder, *made.folder.rglob("*")):
        os.chown(path, UID, UID, follow_symlinks=False)
    folder = made.round("r0001")
    shutil.rmtree(folder.folder / "a1", ignore_errors=True)
    folder.published("a1").unlink(missing_ok=True)
    before = tree(made.folder)
    job = start(made, "a1")
    training(folder, "a1")
    ballast = fill(small_disk)  # checkpoints are kept here, and results
    until(lambda: set(states(job).values()) == {"FAILED"}, "the job's end")
    assert not folder.published("a1").exists()
    assert {name: content for name, content in tree(made.folder).items() if name in before} == before
    ballast.unlink()
    start(made, "a1")
    until(lambda: completed(folder, "a1"), "a1's score")
    assert digest(folder, "a1") == undisturbed(drilled, "a1")
    ends("disk full while training, checkpoints and result", "job FAILED, nothing half-written, earlier files the same; "
         "with space again the undisturbed adapter")  # fmt: skip

    publish_reference(made, folder)
    for n in range(8):
        publish(folder, f"a{n}", 20)
    before = tree(made.folder)
    ballast = fill(small_disk)
    told = attempted([sys.executable, "-m", "pipeline", "meta", str(made.folder), "--round", "r0001"])
    assert told.returncode == 1 and "No space left" in told.stderr, told.stderr
    assert (
        tree(made.folder) == before | {"ballast": b""}
        or {name: content for name, content in tree(made.folder).items() if name in before} == before
    )
    ballast.unlink()
    pipeline("meta", made.folder, "--round", "r0001")
    assert folder.closed.exists()
    ends(
        "disk full while writing the ledger",
        "WorkFailed with the file's name, earlier files the same; then the decision",
    )


DYING = """
import itertools, os, signal, sys
calls, last = itertools.count(), int(sys.argv[1])
for name in ("fsync", "replace", "rename"):
    def act(*arguments, real=getattr(os, name), **more):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)
    setattr(os, name, act)
from pipeline.rounds import meta
from pipeline.campaign.layout import Campaign
campaign = Campaign.at(sys.argv[2])
meta.close(campaign, campaign.round("r0001"))
"""


def test_a_meta_stage_killed_between_any_two_writes_is_run_again(
    drilled: Campaign, tmp_path_factory: pytest.TempPathFactory, ends: Callable[[str, str], None]
) -> None:
    folder = own(tmp_path_factory.mktemp("dying"))
    ready = Campaign.at(shutil.copytree(drilled.folder.parent / "calm" / "drill", folder / "ready" / "drill"))
    publish_reference(ready, ready.round("r0001"))
    for n in range(8):
        publish(ready.round("r0001"), f"a{n}", 20)
    expected, kills = None, 0
    for number in (10**6, *range(200)):  # the first is not killed: what all others must come to
        made = Campaign.at(shutil.copytree(ready.folder, folder / str(number) / "drill"))
        environment = {**os.environ, "PYTHONPATH": str(next(made.code_dir.iterdir()))}
        command = [sys.executable, "-P", "-c", DYING, str(number), str(made.folder)]
        code = subprocess.run(command, env=environment, capture_output=True).returncode
        if expected is None:
            assert code == 0
            expected = tree(made.folder)
        elif code == 0:
            break
        else:
            assert code == -signal.SIGKILL
            kills += 1
            subprocess.run([*command[:-2], "-1", str(made.folder)], env=environment, check=True)
            found = {
                name: content for name, content in tree(made.folder).items() if not Path(name).name.startswith(".")
            }
            assert found == expected
    assert kills >= 12
    ends("meta killed between each two of its writes", f"{kills} kills; run again: the same bytes each time")


NO_OP = """
import sys, tempfile
from pathlib import Path
make = tempfile.mkdtemp  # all of it in one folder, what has a fixed place, too: others use /tmp
tempfile.mkdtemp = lambda suffix=None, prefix=None, dir=None: make(suffix, prefix)
from pipeline.sandbox import image; from pipeline.sandbox import namespace
from pipeline.sandbox.bubblewrap import Sandbox

_, sqsh, _, digest, number = sys.argv[1:]  # worker IMAGE --round DIGEST ARM
namespace.enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])
with tempfile.TemporaryDirectory(prefix="noop-") as folder:
    scratch = Path(folder)
    (scratch / "out").mkdir()
    with image.mounted(Path(sqsh), digest, scratch) as mount, image.forked(mount, scratch, namespace.trial_uid()) as fork:
        sandbox = Sandbox({}, {"/substrate": fork.root, "/out": scratch / "out"})
        with sandbox.start(["touch", "/substrate/was_here", "/out/was_here"], scratch / "log") as process:
            sys.exit(process.wait())
"""


def yardstick() -> float:
    """The processor seconds that a fixed computation takes now."""
    begun = time.process_time()
    for _ in range(40):
        hashlib.sha256(bytes(2_000_000)).digest()
    return time.process_time() - begun


def test_a_hundred_rounds_of_eight_leave_nothing_behind(
    drilled: Campaign, tmp_path: Path, ends: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arms that mount, fork, enter a sandbox, touch two files and end. Others may use this machine meanwhile: only our own is looked at."""
    from pipeline.cluster import local_runner

    code, scratch = tmp_path / "code", Path(tempfile.mkdtemp(prefix="drill-", dir="/tmp"))
    shutil.copytree(ROOT / "pipeline", code / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "pipeline" / "__main__.py").write_text(NO_OP)
    scratch.chmod(0o755)  # sandboxed processes are another user's
    monkeypatch.setenv("TMPDIR", str(scratch))
    tree_digest = str(read_json(drilled.image.with_name(drilled.image.name + ".json"))["tree_digest"])
    seconds, work = [], []
    with adopting():
        before = descendants(os.getpid())
        for _ in range(100):
            begun, spent = time.monotonic(), spent_by_children()
            stages = [("worker", str(drilled.image), tree_digest, f"a{n}") for n in range(8)]
            codes = local_runner.run_local(stages, code, 2, tmp_path / "logs")
            assert set(codes.values()) == {0}, [path.read_text()[-500:] for path in (tmp_path / "logs").iterdir()]
            seconds.append(time.monotonic() - begun)
            work.append((spent_by_children() - spent) / yardstick())
        # One that is killed with its parent may need a moment.
        until(lambda: not alive(set(descendants(os.getpid())) - set(before)), "the end of every process of an arm", 30)
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(scratch) in line]
    scratch.rmdir()  # an error where something is left in it
    # Work is the processors' time in units of a fixed computation beside it: the clock's time is the machine's other users' too, and even
    # the processors' speed has changed by a third within such a run.
    early, late = sorted(work[:20])[10], sorted(work[-20:])[10]
    assert late < 1.3 * early
    early, late = sorted(seconds[:20])[10], sorted(seconds[-20:])[10]
    ends(
        "100 rounds of 8 no-op arms",
        f"no mount, process or file left; {early:.2f} s a round at the beginning, {late:.2f} s at the end (medians)",
    )


@contextmanager
def adopting() -> Iterator[None]:
    """What outlives its parent becomes a child of this process, and not of init, where nobody would know whose it was."""
    set_child_subreaper = 36
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(set_child_subreaper, 0, 0, 0, 0)


def alive(found: Iterable[int]) -> list[str]:
    """Names of those that have not ended; what only waits to be asked how it ended has."""
    names = []
    for pid in found:
        with suppress(OSError):
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
            names += [name] if rest.split()[0] != "Z" else []
    return names


def spent_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_site_s_own_drill_finds_nothing_bad_here(ends: Callable[[str, str], None], testbed: Testbed) -> None:
    folder = own(ROOT / "build" / "site")
    done = subprocess.run(
        [sys.executable, str(ROOT / "slurm/drill.py"), "cluster=testbed"],
        cwd=folder,
        capture_output=True,
        text=True,
        **WHO,
    )
    rows = [line.split(None, 2) for line in done.stdout.splitlines()[:-1]]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: verdict for name, verdict, _ in rows} == dict.fromkeys(
        ("claim", "lock", "rename", "hop", "sandbox", "requeue", "signal"), "good"
    )
    ends("python slurm/drill.py", "; ".join(f"{name} {seen}" for name, _, seen in rows))
