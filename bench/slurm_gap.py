"""Measure the time that a round takes beside its arms, on the Slurm of SLURM_CONF.

    eval "$(python3 slurm/testbed/testbed.py up)" && .venv/bin/python -m bench.slurm_gap

Campaigns run by themselves (campaign.auto). The benchmark cancels their arms as soon as they start and publishes results in their place, so
that nothing trains and only the time of Slurm and of the pipeline is left. Slurm's share is the time in which no process of the pipeline
runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign, Round
from tests.support.campaigns import publish, publish_reference

OVERRIDES = ("experiment=smoke", "cluster=testbed", "campaign.auto=true")
WAIT_SECONDS = 120.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(
                f"waited {WAIT_SECONDS:.0f} s for {what} in vain; `squeue --all` shows whether its job waits or failed"
            )
        time.sleep(0.005)


def born(path: Path) -> float:
    """When a file was made, in seconds since the epoch. Slurm makes a job's log when the job starts."""
    return float(
        subprocess.run(["stat", "--format=%.9W", str(path)], capture_output=True, text=True, check=True).stdout
    )


def play(folder: Round) -> tuple[float, float]:
    """Publish results in place of a submitted round's arms. Returns when its first arm started and when its results were published."""
    record = read_json(folder.submitted)
    array = record["array_job_ids"][0]
    until(lambda: list(folder.slurm_dir.glob(f"{array}_[0-7]_0_log.out")), "the first arm's start")
    started = min(born(path) for path in folder.slurm_dir.glob(f"{array}_[0-7]_0_log.out"))
    if folder.number == 1:
        publish_reference(folder.campaign, folder)
    else:
        publish_reference_again(folder)
    for n in range(8):
        publish(folder, f"a{n}", 20)
    subprocess.run(["scancel", *record["array_job_ids"], record["reference_job_id"]], check=True)
    return started, time.time()


def publish_reference_again(folder: Round) -> None:
    """Publish this round's `reference.h5` and leave r0000 as it is."""
    first = folder.campaign.round("r0000").published("a0")
    before = first.read_bytes()
    publish_reference(folder.campaign, folder)
    first.write_bytes(before)


def campaign(parent: Path, number: int, num_rounds: int) -> list[dict[str, float]]:
    """Run a campaign. Returns the seconds of each measured step, for each round after the first."""
    new = Campaign.at(parent / f"gap{number}")
    command = [sys.executable, "-m", "pipeline", "round", str(new.folder), *OVERRIDES, f"campaign.rounds={num_rounds}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    hops = []
    folder = new.round("r0001")
    _, ended = play(folder)
    for name in (f"r{n:04d}" for n in range(2, num_rounds + 1)):
        following = new.round(name)
        until(following.submitted.exists, f"{name} in the queue")
        log = folder.slurm_dir / f"{read_json(folder.submitted)['meta_job_id']}_0_log.out"
        meta_started, queued = born(log), following.submitted.stat().st_mtime
        next_started, next_ended = play(following)
        hops.append(
            {
                "plan frozen to all jobs queued": queued - following.plan.stat().st_mtime,
                "meta's start to all jobs queued": queued - meta_started,
                "Slurm: last arm's end to meta's start": meta_started - ended,
                "Slurm: jobs queued to the first arm's start": next_started - queued,
                "idle between rounds: last arm's end to the first arm's start": next_started - ended,
            }
        )
        folder, ended = following, next_ended
    until(folder.closed.exists, f"the end of {folder.name}")
    return hops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each campaign, 8 at most")
    parser.add_argument("--campaigns", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="a folder that the nodes can read; a temporary folder by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gap-", dir=arguments.dir, ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        every = [hop for n in range(arguments.campaigns) for hop in campaign(Path(folder), n, arguments.rounds)]
    medians = {name: statistics.median(hop[name] for hop in every) for name in every[0]}
    if arguments.json:
        print(json.dumps({"n": len(every), "medians_seconds": medians, "all": every}, indent=1))
        return
    print(f"medians of {len(every)}, seconds (smallest to largest)")
    for name, median in medians.items():
        values = sorted(hop[name] for hop in every)
        print(f"  {name:<62} {median:6.2f}  ({values[0]:.2f} to {values[-1]:.2f})")


if __name__ == "__main__":
    main()
