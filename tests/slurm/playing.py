"""What the Slurm tests and the drill type and look at, as root or, where DRILL_UID names one, as an ordinary user of the cluster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.layout import Attempt, Campaign, Round, read_json, read_json_lines
from pipeline.results import read_attributes, status_of

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 900
OVERRIDES = ["cluster=testbed", "experiment=smoke", "recipe.num_steps=150", "recipe.checkpoint_every=15", "recipe.warmup_steps=5",
             "cluster.stall_minutes=1"]  # fmt: skip
UID = int(os.environ.get("DRILL_UID", os.geteuid()))
WHO: dict[str, Any] = {"user": UID, "group": UID, "extra_groups": []} if UID != os.geteuid() else {}


def own(folder: Path) -> Path:
    """A folder of ours that belongs to whoever plays, and that nodes and other users may walk to."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in (folder, *folder.parents[:2]):
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
    """Submit; the job's id."""
    command = ["sbatch", "--parsable", "--output=/dev/null", *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **WHO)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(path: Path, what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            queue = subprocess.run(["squeue", "--all"], capture_output=True, text=True, **WHO).stdout
            logs = "\n".join(log.read_text()[-2000:] for log in path.parent.glob("slurm/*log.out"))
            pytest.fail(f"{what} did not come in {WAIT_SECONDS} s\n{queue}\n{logs}")
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


def undisturbed(campaign: Campaign, arm: str) -> str:
    """Digest of the adapter that the arm gives when nothing happens."""
    calm = Campaign.at(campaign.folder.parent / "calm" / "drill")
    published = calm.round("r0001").published(arm)
    if not published.exists():
        pipeline("worker", calm.folder, "r0001", arm)
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
    rows = json.loads(pipeline("status", campaign.folder, "r0001", "--json"))["arms"]
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


def pids(name: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        try:
            if entry.read_text().strip() == name:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def task(job: str, index: int) -> str:
    return job if "_" in job else f"{job}_{index}"


def first_step(folder: Round, attempt: int) -> int:
    lines = read_json_lines(Attempt(folder.folder / "a4" / f"attempt_{attempt:02d}").progress)
    begun = max((number for number, line in enumerate(lines) if line["phase"] == "start"), default=0)
    return next((line["step"] for line in lines[begun:] if line["phase"] == "train"), 0)
