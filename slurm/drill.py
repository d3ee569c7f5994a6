"""Check with small jobs what only a real cluster can show: `python slurm/drill.py cluster=slurm_pyxis`

Run it on a login node, in a folder that the nodes see. It submits jobs of a few CPU-minutes with the account, partition and so on of the
cluster's file, waits for them and prints a table. The exit code is 0 if nothing is bad. A row is `unknown` if its job did not start in
time, because a full queue is not a fault. In brackets: what a campaign needs it for.

    requeue      may a job requeue itself, and does it then know that it was requeued?       (preempted arms resume)
    signal       does USR2 come before the limit, and how long before?                       (arms save their state)
    claim        if two nodes make the same folder at once, does exactly one succeed?        (attempts of an arm)
    lock         does a file lock on one node hold on another?                               (one meta stage, one log)
    rename       how long until a file renamed on a node is seen here?                       (results)
    hop          how long from an array's end to the start of the job that waits for it?     (rounds)
    sandbox      does the sandbox hold on a node, and do two ranks in it reach each other?   (arms)
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.cluster import site_check, slurm_answers, slurm_clients  # noqa: E402

LEAD_SECONDS = 30
LIMIT_SECONDS = 60  # the shortest time limit that Slurm accepts

REQUEUE = """
echo "${SLURM_RESTART_COUNT:-0}" >> requeue.starts
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] && { scontrol requeue "$SLURM_JOB_ID" || echo refused > requeue.refused; sleep 60; }
exit 0
"""
SIGNAL = """
trap 'date +%s.%N > signal.told; exit 0' USR2
date +%s.%N > signal.began
sleep 300 & wait
"""
TOGETHER = """
me=$SLURM_ARRAY_TASK_ID
touch together.$me
for _ in $(seq 600); do [ -e together.0 ] && [ -e together.1 ] && break; sleep 0.1; done
[ -e together.0 ] && [ -e together.1 ] || exit 1
mkdir claim 2>/dev/null && hostname > claim.won.$me || hostname > claim.lost.$me
exec 9> lock
flock -w 60 9 && { date +%s.%N > lock.from.$me; sleep 2; date +%s.%N > lock.to.$me; }
date +%s.%N > aside.$me && mv aside.$me renamed.$me
date +%s.%N > together.ended.$me
"""
AFTER = "date +%s.%N > after.began"


@dataclass(frozen=True)
class Row:
    """One line of the table. verdict: good, bad or unknown."""

    name: str
    verdict: str
    seen: str


class Site:
    """A folder that the nodes see, the flags of every sbatch call, and the jobs that were submitted."""

    def __init__(self, folder: Path, flags: list[str], wait_seconds: float) -> None:
        self.folder, self.flags = folder, flags
        self.deadline = time.monotonic() + wait_seconds
        self.jobs: list[str] = []

    def submit(self, text: str, *flags: str) -> str:
        """Submit a shell script and return the job's id. If sbatch refuses, cancel all jobs and raise SystemExit with Slurm's sentence."""
        fixed = ["--parsable", "--time=1", "--nodes=1", "--ntasks=1", "--open-mode=append", f"--chdir={self.folder}",
                 f"--output={self.folder}/%x.log"]  # fmt: skip
        hidden = slurm_clients.ignored(os.environ)
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        command = ["sbatch", *fixed, *self.flags, *flags]
        done = subprocess.run(command, input=f"#!/bin/bash\n{text}", env=environment, capture_output=True, text=True)
        if done.returncode:
            self.cancel()
            said = " ".join(done.stderr.split())
            raise SystemExit(f"sbatch refused: {said}. Check cluster.account and cluster.partition")
        job_id = slurm_answers.parse_sbatch(done.stdout)
        if not job_id:
            self.cancel()
            raise SystemExit(f"sbatch printed {done.stdout.strip()!r}, in which no line is a job's id")
        self.jobs.append(job_id)
        return job_id

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait until the condition holds or the deadline has passed. Returns whether it holds."""
        while not condition() and time.monotonic() < self.deadline:
            time.sleep(0.05)
        return condition()

    def has(self, *names: str) -> bool:
        """Whether the jobs have written these files. A shell makes a file before it writes the line, so an empty one does not count."""
        return all((self.folder / name).exists() and (self.folder / name).stat().st_size for name in names)

    def number(self, name: str) -> float:
        return float((self.folder / name).read_text())

    def cancel(self) -> None:
        if self.jobs:
            subprocess.run(["scancel", *self.jobs], capture_output=True)


def requeue(site: Site) -> Row:
    def starts() -> list[str]:
        path = site.folder / "requeue.starts"
        return path.read_text().split() if path.exists() else []

    if not site.until(lambda: len(starts()) > 1 or site.has("requeue.refused")):
        return Row("requeue", "unknown", f"starts so far: {', '.join(starts()) or 'none'}")
    if site.has("requeue.refused"):
        return Row("requeue", "unknown", "the site refuses it; `rerun` submits another job for the arm instead")
    good = starts()[:2] == ["0", "1"]
    return Row("requeue", "good" if good else "bad", f"restart counts {', '.join(starts())}")


def signalled(site: Site) -> Row:
    if not site.until(lambda: site.has("signal.began")):
        return Row("signal", "unknown", "the job did not start in time")
    if not site.until(lambda: site.has("signal.told")):
        return Row("signal", "bad", "USR2 never came")
    after = site.number("signal.told") - site.number("signal.began")
    return Row(
        "signal",
        "good",
        f"USR2 came after {after:.0f} s of a limit of {LIMIT_SECONDS} s; a lead of {LEAD_SECONDS} s was asked for",
    )


def together(site: Site) -> list[Row]:
    """The rows of the array of two tasks, which run on two nodes if the site has two free."""
    if not site.until(lambda: site.has("together.ended.0", "together.ended.1")):
        return [Row(name, "unknown", "two tasks did not run at the same time") for name in ("claim", "lock", "rename")]
    seen_at = time.time()
    won = [n for n in (0, 1) if site.has(f"claim.won.{n}")]
    nodes = sorted({path.read_text().strip() for path in site.folder.glob("claim.*.*")})
    where = f"between {' and '.join(nodes)}" if len(nodes) > 1 else f"both tasks on {nodes[0]}"
    (first_from, first_to), (second_from, _) = sorted(
        (site.number(f"lock.from.{n}"), site.number(f"lock.to.{n}")) for n in (0, 1)
    )
    apart = second_from >= first_to - 0.5  # the clocks of two nodes may differ
    delay = seen_at - max(site.number(f"renamed.{n}") for n in (0, 1))
    return [
        Row("claim", "good" if len(won) == 1 else "bad", f"{len(won)} of 2 made the folder, {where}"),
        Row(
            "lock",
            "good" if apart else "bad",
            f"held one after the other, {where}" if apart else f"held at once, {where}",
        ),
        Row("rename", "good" if delay < 10 else "bad", f"seen here {max(0.0, delay):.1f} s later"),
    ]


def hop(site: Site) -> Row:
    if not site.until(lambda: site.has("after.began")) or not site.has("together.ended.0", "together.ended.1"):
        return Row("hop", "unknown", "the job that waits did not start in time")
    seconds = site.number("after.began") - max(site.number(f"together.ended.{n}") for n in (0, 1))
    return Row("hop", "good", f"{seconds:.1f} s")


def sandbox(site: Site) -> Row:
    if not site.until(lambda: site.has("sandbox.code")):
        return Row("sandbox", "unknown", "the job did not end in time")
    lines = (site.folder / "sandbox.out").read_text().strip().splitlines()
    good = (site.folder / "sandbox.code").read_text().strip() == "0"
    return Row("sandbox", "good" if good else "bad", lines[-1] if lines else "no output")


def play(overrides: list[str], wait_seconds: float) -> list[Row]:
    """Submit all jobs, wait for them, and judge each check. Jobs that are left are cancelled."""
    from pipeline.config import requests, settings

    chosen = settings.compose(overrides)
    cluster = chosen.cluster
    named = ("partition", "account", "qos", "reservation", "constraint")
    flags = [f"--{name}={getattr(cluster, name)}" for name in named if getattr(cluster, name)]
    two = f"{cluster.gpu_type}:2".removeprefix(":")
    of_site = [
        f"gpu:{kind}:2".replace("::", ":")
        for name, kind, _ in requests.gres_entries(cluster.gres) or []
        if name == "gpu"
    ]
    gpus = [f"--gres={of_site[0]}" if of_site else f"--gpus-per-node={two}"] if cluster.gpus_per_node else []
    ranks = " ".join(map(repr, [sys.executable, str(ROOT / "slurm" / "all_reduce.py"), *overrides]))
    with tempfile.TemporaryDirectory(prefix=".drill-", dir=Path.cwd()) as folder:
        site = Site(Path(folder), flags, wait_seconds)
        try:
            site.submit(REQUEUE, "--job-name=requeue", "--requeue")
            site.submit(SIGNAL, "--job-name=signal", f"--signal=B:USR2@{LEAD_SECONDS}")
            array = site.submit(TOGETHER, "--job-name=together", "--array=0-1", "--exclusive")
            site.submit(AFTER, "--job-name=after", f"--dependency=afterany:{array}")
            setup = "\n".join(cluster.setup)
            text = f"{setup}\n{ranks} > sandbox.out 2>&1\necho $? > sandbox.code"
            site.submit(text, "--job-name=sandbox", "--cpus-per-task=2", "--time=5", *gpus)
            return [*together(site), hop(site), sandbox(site), requeue(site), signalled(site)]
        finally:
            site.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides, such as cluster=slurm_pyxis cluster.partition=gpu"
    )
    parser.add_argument("--wait", type=float, default=600.0, help="seconds to wait for the queue")
    arguments = parser.parse_args()
    if not slurm_clients.controller_answers():
        raise SystemExit("; ".join(site_check.NO_CONTROLLER))
    rows = play(arguments.overrides, arguments.wait)
    for row in rows:
        print(f"{row.name:<10} {row.verdict:<8} {row.seen}")
    print("next: python -m pipeline doctor " + " ".join(arguments.overrides))
    return int(any(row.verdict == "bad" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
