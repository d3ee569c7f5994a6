"""Run one campaign of three rounds on a real Slurm, each started another way: submitit, plain sbatch, Hydra multirun.

The tests run in order and build on one another, as the rounds of a campaign do. With `experiment=smoke`
nothing is learned. The tests show that every way gives the same files, and that a killed worker costs one arm and not the round.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.execution.results import read_attributes
from tests.slurm.playing import ROOT, WAIT_SECONDS, accounted, own, pipeline, run, sbatch, states, wait_for

ARMS = tuple(f"a{index}" for index in range(8))

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(WAIT_SECONDS + 60)]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign.at(own(tmp_path_factory.mktemp("campaigns")) / "drill")


def statuses(campaign: Campaign, round_name: str) -> dict[str, str]:
    folder = campaign.round(round_name)
    paths = {arm: folder.published(arm) for arm in ARMS}
    return {arm: read_attributes(path)["status"] for arm, path in paths.items() if path.exists()}


def decided(campaign: Campaign, round_name: str) -> dict[str, object]:
    decision: dict[str, object] = read_json(campaign.round(round_name).decisions_dir / "00.json")
    assert decision["state"] == "decided"
    return decision


@pytest.mark.usefixtures("testbed")
def test_a_round_through_submitit_survives_a_killed_worker(campaign: Campaign) -> None:
    chosen = ["CLUSTER=testbed", "EXPERIMENT=smoke", f"RUNS={campaign.folder.parent}", f"CAMPAIGN={campaign.name}"]
    output = run("make", "round", *chosen, "OVERRIDES=cluster.meta.partition=cpu")
    folder = campaign.round("r0001")
    record = read_json(folder.submitted)
    assert "next: python -m pipeline status" in output
    victim = folder.folder / "a3" / "attempt_00" / "claim.json"
    wait_for(victim, "a3's claim")
    os.kill(json.loads(victim.read_text())["pid"], signal.SIGKILL)
    wait_for(folder.closed, "the end of r0001")

    assert statuses(campaign, "r0001") == dict.fromkeys([arm for arm in ARMS if arm != "a3"], "completed")
    outcomes = {outcome["arm"]: outcome for outcome in read_json(folder.evidence)["outcomes"][1:]}
    assert (outcomes["a3"]["status"], outcomes["a3"]["exit_class"]) == ("absent", "unfinished")
    assert any("a3 has no score" in reason for reason in decided(campaign, "r0001")["reasons"])
    assert campaign.overrides("r0002").exists()

    main, reference = record["array_job_ids"]
    found = states(main, reference, record["meta_job_id"])
    assert found.pop(f"{main}_3") == "FAILED"
    assert set(found) == {f"{main}_{i}" for i in range(8) if i != 3} | {
        f"{reference}_0",
        f"{reference}_1",
        record["meta_job_id"],
    }
    assert set(found.values()) == {"COMPLETED"}
    assert [
        accounted(job, "Partition")[job] for job in (f"{main}_0", record["reference_job_id"], record["meta_job_id"])
    ] == ["main", "main", "cpu"]
    for arm in ARMS:
        claim = read_json(folder.folder / arm / "attempt_00" / "claim.json")
        assert (claim["cores"], claim["cores_asked"]) == (len(os.sched_getaffinity(0)), 2)


@pytest.mark.usefixtures("testbed")
def test_nothing_is_left_behind(campaign: Campaign) -> None:
    wait_for(campaign.round("r0001").closed, "r0001, made by the test before")
    assert str(campaign.folder) not in Path("/proc/mounts").read_text()
    assert not re.search(r"/(arm|judge|sandbox|pristine|fork)-", Path("/proc/mounts").read_text())


@pytest.mark.usefixtures("testbed")
def test_the_same_round_by_plain_sbatch(campaign: Campaign) -> None:
    output = pipeline("round", campaign.folder, "cluster=testbed", "--no-submit")
    assert f"sbatch --array=0,1,2,3,4,5,6,7 slurm/round.sbatch {campaign.folder} r0002" in output
    array = sbatch("--array=0-7%2", "slurm/round.sbatch", campaign.folder, "r0002")
    meta = sbatch(f"--dependency=afterany:{array}", "slurm/meta.sbatch", campaign.folder, "r0002")
    wait_for(campaign.round("r0002").closed, "the end of r0002")
    assert statuses(campaign, "r0002") == dict.fromkeys(ARMS, "completed")
    assert set(states(array, meta).values()) == {"COMPLETED"}
    decided(campaign, "r0002")


@pytest.mark.usefixtures("testbed")
def test_the_same_round_as_a_hydra_multirun(campaign: Campaign) -> None:
    pipeline("round", campaign.folder, "cluster=testbed", "--no-submit")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=2", "hydra.launcher.timeout_min=30"]
    launcher += ["hydra.launcher.array_parallelism=2"]
    sweep = ["-m", "+round=r0003", "arm=glob(a*)", *launcher]
    pipeline(*sweep, module="pipeline.cli.multirun", CAMPAIGN_DIR=str(campaign.folder))
    pipeline("meta", campaign.folder, "--round", "r0003")
    assert statuses(campaign, "r0003") == dict.fromkeys(ARMS, "completed")
    decided(campaign, "r0003")


@pytest.mark.usefixtures("testbed")
def test_a_changed_image_is_refused_inside_a_job_and_before_one(campaign: Campaign) -> None:
    pipeline("round", campaign.folder, "cluster=testbed", "--no-submit")
    newest = campaign.round(campaign.known_rounds()[-1])
    with open(campaign.image, "r+b") as file:
        file.seek(campaign.image.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    job = sbatch("--array=0", "slurm/round.sbatch", campaign.folder, newest.name)
    wait_for(newest.published("a0"), "a0's outcome")
    assert read_attributes(newest.published("a0"))["exit_class"] == "integrity"
    assert set(states(job).values()) == {"FAILED"}

    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "round", str(campaign.folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert str(campaign.image) in done.stderr
    assert not newest.submitted.exists()
