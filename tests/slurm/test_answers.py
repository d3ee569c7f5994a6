"""One round on a real Slurm whose clients are as sites have them: an sbatch that takes the array and reports a time-out, one that prints a
banner, a profile that filters squeue, and a step that is cancelled under an arm whose script ends with 0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.execution.results import read_attributes
from tests.slurm.playing import ROOT, WAIT_SECONDS, own, pipeline, queued, run, submissions, training, until, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(WAIT_SECONDS + 60)]

SBATCH = """#!/bin/sh
said=$({real} "$@") || exit
if [ ! -e {folder}/called ]; then
    touch {folder}/called
    echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
    exit 1
fi
echo "Your account 4711 has used job 12 of its 900 hours."
echo "$said"
"""
# The script of an arm ends with 0 whatever its step does.
SMALL = ["cluster=testbed", "experiment=smoke", "recipe.num_steps=60", "recipe.checkpoint_every=15", "recipe.warmup_steps=5",
         "cluster.setup=[\"trap 'exit 0' EXIT\"]"]  # fmt: skip


@pytest.mark.usefixtures("testbed")
def test_case_01_04_05_a_round_with_the_clients_of_a_site(tmp_path_factory: pytest.TempPathFactory) -> None:
    campaign = Campaign.at(own(tmp_path_factory.mktemp("campaigns")) / "site")
    wrapped = own(tmp_path_factory.mktemp("wrapped"))
    real = run("sh", "-c", "command -v sbatch").strip()
    (wrapped / "sbatch").write_text(SBATCH.format(real=real, folder=wrapped))
    (wrapped / "sbatch").chmod(0o755)
    profile = {"PATH": f"{wrapped}:{os.environ['PATH']}", "SQUEUE_STATES": "RUNNING", "SLURM_TIME_FORMAT": "relative"}
    assert "my runs %j/site' holds '%'" in _refused("round", campaign.folder.parent / "my runs %j" / "site", *SMALL)

    pipeline("round", campaign.folder, *SMALL, **profile)
    folder = campaign.round("r0001")
    record = read_json(folder.submitted)
    (array, first), meta = record["array_job_ids"], record["meta_job_id"]
    assert (wrapped / "called").exists() and {job.split("_")[0] for job in queued()} <= {
        array,
        first,
        meta,
        record["reference_job_id"],
    }

    rows = _arms(campaign, profile)
    assert {row["state"] for row in rows} <= {"queued", "starting", "running"} and "queued" in {
        row["state"] for row in rows
    }
    waiting = [row["arm"] for row in rows if row["state"] == "queued"][-1]  # only two run at a time
    assert "is pending as job" in _refused("rerun", campaign.folder, waiting, "--dry-run", **profile)

    training(folder, "a0", steps=5)
    step = f"{array}_0.0"
    subprocess.run(["scancel", "--signal=KILL", step], check=True)
    until(lambda: f"{array}_0" not in queued(), "the end of a0's job", 60)
    until(lambda: _arms(campaign, profile)[0]["state"] == "lost", "a0 to be lost", 60)
    assert (
        "CANCELLED step 0" in _arms(campaign, profile)[0]["detail"]
        or "FAILED step 0" in _arms(campaign, profile)[0]["detail"]
    )
    assert f"{folder.name}/a0: one more job" in pipeline(
        "rerun", campaign.folder, "--failed", "a0", "--dry-run", **profile
    )
    again = pipeline("rerun", campaign.folder, "a0", **profile)
    assert f"{folder.name}/a0: job" in again and len(submissions(folder)) == 2

    wait_for(folder.closed, "the end of the round")
    statuses = [read_attributes(folder.published(f"a{number}"))["status"] for number in range(8)]
    assert statuses == ["completed"] * 8
    marks = sorted(path.suffix for path in Path(folder.slurm_dir, "submissions").iterdir())
    assert marks == [".kept", ".kept"]


def _arms(campaign: Campaign, profile: dict[str, str]) -> list[dict[str, str]]:
    said: list[dict[str, str]] = json.loads(
        pipeline("status", campaign.folder, "--round", "r0001", "--json", **profile)
    )["arms"]
    return said


def _refused(*arguments: object, **environment: str) -> str:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    return done.stderr
