"""Helpers of the Slurm tests and the drill: run commands as root or, if DRILL_UID is set, as an ordinary user, and look at files."""

import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.execution.results import read_attributes, status_of
from slurm.testbed.testbed import Testbed

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 900
OVERRIDES = ["cluster=testbed", "experiment=smoke", "recipe.num_steps=150", "recipe.checkpoint_every=15", "recipe.warmup_steps=5",
             "cluster.stall_minutes=1"]  # fmt: skip
SAID = Path(tempfile.gettempdir()) / f"postrain-slurm-{os.environ.get('DRILL_UID', os.geteuid())}"
UID = int(os.environ.get("DRILL_UID", os.geteuid()))
WHO: dict[str, Any] = {"user": UID, "group": UID, "extra_groups": []} if UID != os.geteuid() else {}


def own(folder: Path) -> Path:
    """A folder of ours that belongs to whoever plays, and that nodes and other users may walk to."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in (folder, *folder.parents[:2]):
        if not parent.stat().st_mode & stat.S_ISVTX:  # /tmp itself stays as it is
            parent.chmod(0o755)
    os.chown(folder, UID, UID)
    return folder


def pipeline(*arguments: object, module: str = "pipeline", **environment: str) -> str:
    return run(sys.executable, "-m", module, *map(str, arguments), **environment)


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, **WHO)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def admin(*command: str) -> None:
    """What the site's people do, and a job's owner may not."""
    subprocess.run(command, check=True, capture_output=True)


def sbatch(*arguments: object) -> str:
    """Submit; the job's id. What the job says is kept for whoever waits in vain."""
    SAID.mkdir(exist_ok=True)
    os.chown(SAID, UID, UID)
    command = ["sbatch", "--parsable", f"--output={SAID}/%x-%j.out", *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **WHO)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(path: Path, what: str) -> None:
    """Until the file is there; not longer than half a minute after the last job that could make it has ended."""
    deadline, last_job = time.monotonic() + WAIT_SECONDS, time.monotonic()
    while not path.exists():
        last_job = time.monotonic() if queued() else last_job
        if time.monotonic() > min(deadline, last_job + 30):
            queue = subprocess.run(["squeue", "--all"], capture_output=True, text=True, **WHO).stdout
            logs = [*path.parent.glob("slurm/*log.out"), *SAID.glob("*.out")]
            newest = sorted(logs, key=lambda log: log.stat().st_mtime)[-12:]
            said = "\n".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in newest)
            pytest.fail(
                f"{what} did not come, the last job ended {time.monotonic() - last_job:.0f} s ago\n{queue}\n{said}"
            )
        time.sleep(0.5)


def states(*job_ids: str) -> dict[str, str]:
    """Job (or array task) -> state, as accounting has it, once every job has ended."""
    deadline = time.monotonic() + 60
    while True:
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(job_ids)]
        rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found = dict(row.split("|") for row in rows if "|" in row)
        running = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"}
        if time.monotonic() > deadline or (found and not running & set(found.values())):
            return found
        time.sleep(0.5)


def accounted(job_ids: str, column: str) -> dict[str, str]:
    """Job, array task or step -> a column of sacct, for jobs that have ended. job_ids: joined by commas."""
    command = ["sacct", "-n", "-P", "-o", f"JobID,{column}", "-j", job_ids]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(row.split("|", 1) for row in rows)


def undisturbed(campaign: Campaign, arm: str) -> str:
    """Digest of the adapter that the arm gives when nothing happens."""
    calm = Campaign.at(campaign.folder.parent / "calm" / "drill")
    published = calm.round("r0001").published(arm)
    if not published.exists():
        pipeline("worker", calm.folder, "--round", "r0001", arm)
    return str(read_attributes(published)["adapter_digest"])


def until(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            queue = subprocess.run(["squeue", "--all"], capture_output=True, text=True, **WHO).stdout
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
    rows = json.loads(pipeline("status", campaign.folder, "--round", "r0001", "--json"))["arms"]
    return next(str(row["state"]) for row in rows if row["arm"] == arm)


def completed(folder: Round, arm: str) -> bool:
    return status_of(folder.published(arm)) == "completed"


def digest(folder: Round, arm: str) -> str:
    return str(read_attributes(folder.published(arm))["adapter_digest"])


def environ_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def when(job: str, what: str) -> float:
    """Seconds since the epoch, as the controller remembers it."""
    text = run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
    words = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return time.mktime(time.strptime(words[what], "%Y-%m-%dT%H:%M:%S"))


def attempted(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **WHO)


def pids(cluster: Testbed, name: str) -> list[int]:
    """Processes of that name, of this cluster's daemons and jobs and nobody else's."""
    own = set(cluster.processes())
    found = []
    for pid in own.union(*map(descendants, own)):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(pid)
        except OSError:
            continue
    return sorted(found)


def task(job: str, index: int) -> str:
    return job if "_" in job else f"{job}_{index}"


def first_step(folder: Round, arm: str, attempt: int) -> int:
    """The first that an attempt trained itself: what stands before its newest start came along with the state."""
    lines = read_json_lines(Attempt(folder.folder / arm / f"attempt_{attempt:02d}").progress)
    begun = max((number for number, line in enumerate(lines) if line["phase"] == "start"), default=0)
    return next((line["step"] for line in lines[begun:] if line["phase"] == "train"), 0)


def submissions(folder: Round) -> list[dict[str, Any]]:
    return read_json_lines(folder.jobs)


def queued() -> list[str]:
    """Every job and array task that waits or runs."""
    return run("squeue", "--all", "--noheader", "--array", "--format=%i").split()
