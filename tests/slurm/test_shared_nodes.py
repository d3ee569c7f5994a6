"""Play a round whose arms share nodes: each binds its own GPUs, the meta job has none, and a judge job judges for a dead reference job.

The GPUs are pretended (with_gpus.sh), so training and judging run on the CPU. Everything else is real: what Slurm gives to each job, the
sandboxes and their probes, the judge job and the meta job after it.
"""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.execution.results import read_attributes
from tests.slurm.playing import ROOT, WAIT_SECONDS, accounted, own, pipeline, states, wait_for

ARMS = tuple(f"a{index}" for index in range(8))
OVERRIDES = [
    "cluster=testbed", "experiment=smoke", "parallelism=tp1", "cluster.gpus_per_node=8", "cluster.cpus_per_task=16", "cluster.meta.partition=cpu",
    f"cluster.runtime=[{ROOT}/tests/slurm/with_gpus.sh,{sys.executable}]",
]  # fmt: skip

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(WAIT_SECONDS + 60)]


@pytest.mark.usefixtures("testbed")
def test_arms_share_a_node_and_a_judge_job_judges_for_a_dead_reference_job(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    campaign = Campaign.at(own(tmp_path_factory.mktemp("campaigns")) / "shared")
    pipeline("round", campaign.folder, *OVERRIDES)
    folder = campaign.round("r0001")
    first = read_json(folder.submitted)
    subprocess.run(["scancel", first["reference_job_id"]], check=True)
    wait_for(folder.closed, "the end of r0001")

    # Two arms at once on one node have GPUs of their own.
    spans, shared = {}, 0
    for arm in ARMS:
        attempt = folder.attempts(arm)[0]
        marks = [mark["at"] for mark in read_json_lines(attempt.phases)]
        gpus = json.loads(read_attributes(folder.published(arm))["coverage"])["gpus"]
        assert len(gpus.split(",")) == 1
        spans[arm] = (read_json(attempt.claim)["node"], gpus, marks[0], marks[-1])
        probe = read_json(attempt.probe)
        assert not probe["devices"]["reached"] and not probe["make a device"]["reached"]
    for (node, gpus, start, end), (other, others, begin, stop) in combinations(spans.values(), 2):
        if node == other and start < stop and begin < end:
            shared += 1
            assert gpus != others
    assert shared, "no two arms shared a node, so this shows nothing"

    # The reference's job is dead, the meta job without GPUs had it judged, and the meta job after the judge job decided.
    (judged,) = [line for line in read_json_lines(folder.jobs) if line["why"] == "judge"]
    judge, second = judged["tasks"]["judge"], judged["meta"]
    found = states(first["reference_job_id"], first["meta_job_id"], judge, second)
    assert found.pop(first["reference_job_id"]).startswith("CANCELLED")
    assert set(found.values()) == {"COMPLETED"} and len(found) == 3
    ids = ",".join([first["meta_job_id"], judge, second])
    allocated, partition = accounted(ids, "AllocTRES"), accounted(ids, "Partition")
    assert "gres/gpu=1" in allocated[judge]
    for meta in (first["meta_job_id"], second):
        assert "gpu" not in allocated[meta] and partition[meta] == "cpu"
    events = [(record["event"], record["what"]) for record in Log(campaign.log).records() if "what" in record]
    assert events == [("judge_request", ["reference"])]
    assert read_json(folder.decisions_dir / "00.json")["state"] == "decided"
    assert Path(folder.folder / "reference.h5").exists()
    pipeline("audit", campaign.folder)
