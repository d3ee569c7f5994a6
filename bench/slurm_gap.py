"""What a round costs beside its arms: from the frozen plan to the queue, from the meta job's start to the next round's jobs, from
round to round. On the Slurm of SLURM_CONF:

    eval "$(python3 slurm/testbed/testbed.py up)" && .venv/bin/python -m bench.slurm_gap

Campaigns run by themselves (campaign.auto). Their arms are cancelled as soon as they are queued and results are published in their
place, so that nothing trains: what is left is Slurm and ours. Slurm's share is the time in which no process of ours runs.
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
                f"{what} did not come in {WAIT_SECONDS:.0f} s; see `squeue --all` and the folder that is named above"
            )
        time.sleep(0.005)


def born(path: Path) -> float:
    """When a file was made, seconds since the epoch: Slurm makes a job's log as the job starts."""
    return float(
        subprocess.run(["stat", "--format=%.9W", str(path)], capture_output=True, text=True, check=True).stdout
    )


def play(folder: Round) -> tuple[float, float]:
    """Take the arms' place in a submitted round; (when its first arm started, when its results were there)."""
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
    """This round's `reference.h5`, and r0000 as it is."""
    first = folder.campaign.round("r0000").published("a0")
    before = first.read_bytes()
    publish_reference(folder.campaign, folder)
    first.write_bytes(before)


def campaign(parent: Path, number: int, num_rounds: int) -> list[dict[str, float]]:
    """Seconds of each hop of a campaign's rounds."""
    made = Campaign.at(parent / f"gap{number}")
    command = [sys.executable, "-m", "pipeline", "round", str(made.folder), *OVERRIDES, f"campaign.rounds={num_rounds}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = []
    folder = made.round("r0001")
    _, ended = play(folder)
    for name in (f"r{n:04d}" for n in range(2, num_rounds + 1)):
        following = made.round(name)
        until(following.submitted.exists, f"{name} in the queue")
        log = folder.slurm_dir / f"{read_json(folder.submitted)['meta_job_id']}_0_log.out"
        meta_started, queued = born(log), following.submitted.stat().st_mtime
        next_started, next_ended = play(following)
        found.append(
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
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of each campaign, 8 at most")
    parser.add_argument("--campaigns", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where nodes can read it; default: a temporary folder")
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
