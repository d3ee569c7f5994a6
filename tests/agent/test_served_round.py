"""An arm whose agent asks the model that its round serves: the commands that a person types, on one machine, with a stand-in for vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.execution.results import read_attributes
from pipeline.model_calls import model_server, transcript
from tests.support.paths import ROOT
from tests.support.served import Site

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # a busy machine runs an arm for minutes
SHORT = ("worker.server.wait_seconds=300", "worker.budget.gpu_seconds=4000", "worker.budget.wall_seconds=3000")


def pipeline(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.make(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def campaign(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    campaign = Campaign.at(tmp_path_factory.mktemp("campaigns") / "served")
    done = pipeline("round", campaign.folder, *site.words(*SHORT), "--no-submit")
    assert done.returncode == 0, done.stderr
    return campaign


def test_an_arm_is_run_by_the_served_model_through_a_restart(site: Site, campaign: Campaign) -> None:
    """The round on this machine starts the server beside the arm, and ends it. The server dies once in the middle of the session."""
    folder = campaign.round("r0001")
    (site.weights / "dies_after").write_text("2")
    done = pipeline("rerun", campaign.folder, "a1", "--round", "r0001")
    attempt = folder.attempts("a1")[-1]
    assert attempt.agent_report.exists(), done.stdout + done.stderr + (folder.logs_dir / "r0001_a1.log").read_text()
    assert read_json(attempt.agent_report)["outcome"] == "completed"
    assert read_attributes(folder.published("a1"))["status"] == "completed"
    kinds = [each["failure"] for each in transcript.load(attempt.transcript).records if each["kind"] == "failure"]
    assert kinds and set(kinds) <= {"endpoint_broken", "endpoint_unreachable", "endpoint_tls"}
    said = (folder.logs_dir / "serve.log").read_text()
    assert said.count("is served at https://localhost:") == 2 and "3 starts are left" in said
    assert not folder.server_address.exists() and not folder.server_key.exists()
    assert model_server.gpu_seconds(folder) == 0 and len(list(folder.server_dir.glob("use_*.json"))) == 1


def test_no_key_is_in_any_file_of_the_campaign(site: Site, campaign: Campaign) -> None:
    keys = (site.weights / "keys").read_text().split()
    assert len(keys) == 2 and len(set(keys)) == 2
    for path in campaign.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(key.encode() in content for key in keys), path
            assert path.is_relative_to(campaign.vault) or b"BEGIN PRIVATE KEY" not in content, path


def test_an_arm_without_a_server_fails_at_once_as_what_it_is(site: Site, campaign: Campaign, tmp_path: Path) -> None:
    folder = campaign.round("r0001")
    program = site.runtime / "bin" / "vllm"
    program.rename(tmp_path / "vllm")
    done = pipeline("rerun", campaign.folder, "a2", "--round", "r0001")
    found = read_attributes(folder.published("a2"))
    assert (found["status"], found["exit_class"]) == ("failed", "agent_endpoint"), done.stderr
    failure = next(
        each for each in transcript.load(folder.attempts("a2")[-1].transcript).records if each["kind"] == "failure"
    )
    assert failure["failure"] == "endpoint_not_served" and "bin/vllm is missing" in failure["what"]
    assert "bin/vllm is missing" in (folder.logs_dir / "serve.log").read_text()
