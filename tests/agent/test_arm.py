"""Arms that agents run: real image, sandboxes, socket and training, and a scripted model that speaks the protocol over HTTP.

A smoke campaign has one scenario an arm. Each arm here takes some ten seconds.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Attempt, Campaign
from pipeline.execution.results import read_attributes, read_outcome
from pipeline.model_calls import transcript
from tests.support.paths import ROOT

KEY = "sk-this-key-must-be-nowhere-1234567890"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCENARIOS = (
    "no_edit,good_edit,broken_then_repaired,editing_the_scorer,endless_loop,training_too_long,rate_limited,no_edit"
)
SHORT = [
    "experiment=smoke",
    "worker=scripted",
    f"worker.scenarios=[{SCENARIOS}]",
    "worker.endpoint.api_key_env=SCRIPTED_KEY",
    "worker.budget.gpu_seconds=4000",
    "worker.budget.wall_seconds=3000",
]


def pipeline(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "SCRIPTED_KEY": KEY})


def made(folder: Path, *words: str) -> Campaign:
    done = pipeline("round", folder, *SHORT, *words, "--no-submit")
    assert done.returncode == 0, done.stderr
    return Campaign.at(folder)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return made(tmp_path_factory.mktemp("campaigns") / "agents")


def run(campaign: Campaign, arm: str) -> Attempt:
    done = pipeline("worker", campaign.folder, "--round", "r0001", arm)
    attempt = campaign.round("r0001").attempts(arm)[-1]
    assert attempt.agent_report.exists(), done.stdout + done.stderr
    return attempt


def report_of(attempt: Attempt) -> dict:
    return read_json(attempt.agent_report)


@pytest.fixture(scope="module")
def good(campaign: Campaign) -> Attempt:
    return run(campaign, "a1")


def test_a_good_edit_is_trained_judged_and_published_as_edited(campaign: Campaign, good: Attempt) -> None:
    report = report_of(good)
    assert report["outcome"] == "completed"
    assert [(each["path"], each["kind"]) for each in report["diff"]["files"]] == [("substrate/data/rows.py", "changed")]
    published = campaign.round("r0001").published("a1")
    assert read_attributes(published)["edited_files"] == 1
    outcome = read_outcome(published, "")
    assert outcome.edited and outcome.scored("fresh") and outcome.scored("dev")
    patch = good.fork_diff.read_text()
    applied = subprocess.run(["git", "apply", "--check", "-"], input=patch, text=True, cwd=ROOT, capture_output=True)
    assert applied.returncode == 0, applied.stderr


def test_an_equivalent_edit_gives_the_bytes_of_the_setting(good: Attempt, tmp_path: Path) -> None:
    """The edit sorts a family's examples by length, which is what recipe.curriculum=short_first does."""
    campaign = Campaign.at(tmp_path / "configured")
    done = pipeline("round", campaign.folder, "experiment=smoke", "recipe.curriculum=short_first", "--no-submit")
    assert done.returncode == 0, done.stderr
    done = pipeline("worker", campaign.folder, "--round", "r0001", "a1")
    assert done.returncode == 0, done.stderr
    configured = campaign.round("r0001").attempts("a1")[0]
    by_agent, by_setting = (read_json(each.task_dir / "task.json")["config"] for each in (good, configured))
    assert (
        by_agent["recipe"].pop("curriculum") == "shuffled" and by_setting["recipe"].pop("curriculum") == "short_first"
    )
    assert by_agent == by_setting
    name = "adapter_model.safetensors"
    assert (good.adapter_dir / name).read_bytes() == (configured.adapter_dir / name).read_bytes()


@pytest.mark.long
def test_a_replay_gives_the_same_adapter_and_writes_nothing(campaign: Campaign, good: Attempt) -> None:
    before = sorted(campaign.folder.rglob("*"))
    done = pipeline("worker", campaign.folder, "--round", "r0001", "a1", "--replay", good.transcript)
    assert done.returncode == 0, done.stdout + done.stderr
    digest = read_json(good.sealed)["adapter_digest"]
    assert "replayed: completed" in done.stdout and digest[:16] in done.stdout and "the same adapter" in done.stdout
    assert sorted(campaign.folder.rglob("*")) == before


def test_what_is_no_transcript_is_not_replayed(campaign: Campaign, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text('{"a": 1}')
    for name, words in (("nowhere.jsonl", "is no file"), ("texts.json", "has no event of a transcript")):
        done = pipeline("worker", campaign.folder, "--round", "r0001", "a1", "--replay", tmp_path / name)
        assert done.returncode and words in done.stderr and "Traceback" not in done.stderr


def test_the_key_is_in_no_file(campaign: Campaign, good: Attempt) -> None:
    found = [path for path in campaign.folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not found


def test_the_first_request_says_nothing_of_round_arm_or_site(campaign: Campaign, good: Attempt) -> None:
    first = next(record for record in transcript.load(good.transcript).records if record["kind"] == "request")
    text = transcript.content_of(first).decode()
    for word in (str(campaign.folder), campaign.name, "r0001", '"a1"', os.uname().nodename, "dev_items", "vault"):
        assert word not in text, word
    assert json.loads(text)["messages"][0]["role"] == "system"


@pytest.mark.long
def test_a_broken_edit_is_repaired(campaign: Campaign) -> None:
    report = report_of(run(campaign, "a2"))
    assert report["outcome"] == "completed" and report["usage"]["full_runs"] == 1 and report["usage"]["smoke_runs"] >= 2
    assert any(each["repaired"] for each in report["manifest"]["failed"])


@pytest.mark.parametrize(
    ("arm", "outcome", "why"),
    [
        ("a3", "agent_closed_path", "article 16 refused its full run, because its edits (substrate/answers.py)"),
        (
            "a4",
            "agent_watchdog",
            "watchdog_repeats: the same call with the same arguments gave the same result 5 times",
        ),
        pytest.param("a5", "agent_gpu_seconds", " of 30 rank-seconds were used", marks=pytest.mark.long),
    ],
)
def test_a_bad_session_ends_as_what_it_is(campaign: Campaign, arm: str, outcome: str, why: str, tmp_path: Path) -> None:
    if outcome == "agent_gpu_seconds":
        campaign = made(tmp_path / "agents", "worker.budget.gpu_seconds=30")
    attempt = run(campaign, arm)
    assert report_of(attempt)["outcome"] == outcome
    found = read_attributes(campaign.round("r0001").published(arm))
    assert (found["status"], found["exit_class"]) == ("failed", outcome)
    assert why in found["traceback"] and "it handed in its manifest" not in found["traceback"]
    if outcome == "agent_closed_path":
        said = [each["what"] for each in transcript.load(attempt.transcript).records if each["kind"] == "tool_result"]
        assert any("article 16" in what and "substrate/answers.py" in what for what in said)


@pytest.mark.long
def test_a_rate_limit_is_waited_for(campaign: Campaign) -> None:
    attempt = run(campaign, "a6")
    kinds = [each.get("failure") for each in transcript.load(attempt.transcript).records if each["kind"] == "failure"]
    assert report_of(attempt)["outcome"] == "completed" and "endpoint_limit" in kinds


@pytest.mark.long
def test_who_repeats_a_recipe_edits_nothing_and_counts_as_it(campaign: Campaign) -> None:
    attempt = run(campaign, "a0")
    assert report_of(attempt)["diff"]["files"] == []
    assert not read_outcome(campaign.round("r0001").published("a0"), "").edited
    first = next(record for record in transcript.load(attempt.transcript).records if record["kind"] == "request")
    assert re.search("repeats a recipe, so you may edit nothing", transcript.content_of(first).decode())


def test_a_finished_session_is_sealed_though_its_worker_is_to_stop(campaign: Campaign) -> None:
    """The signal comes while the manifest is handed in. The next attempt judges the adapter and asks no model."""
    words = [sys.executable, "-m", "pipeline", "worker", str(campaign.folder), "--round", "r0001", "a7"]
    worker = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "SCRIPTED_KEY": KEY}, stderr=subprocess.PIPE, text=True
    )
    attempts = campaign.round("r0001").attempts
    while not any(
        '"name":"finish"' in path.read_text() for each in attempts("a7") if (path := each.transcript).exists()
    ):
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.002)
    worker.send_signal(signal.SIGUSR2)
    _, said = worker.communicate(timeout=300)
    first = attempts("a7")[0]
    assert (first.folder / "interrupted.json").exists() and first.sealed.exists(), said
    assert report_of(first)["outcome"] == "completed"
    again = run(campaign, "a7")
    found = read_attributes(campaign.round("r0001").published("a7"))
    assert found["status"] == "completed" and json.loads(found["coverage"])["trained_by_attempt"] == 0
    assert again.transcript.read_bytes() == first.transcript.read_bytes()


@pytest.mark.long
def test_an_attempt_that_goes_on_after_the_seal_knows_what_was_edited(campaign: Campaign, good: Attempt) -> None:
    """Killed while it was judged, an arm judges its sealed adapter again. Without its report it would count as its recipe."""
    published = campaign.round("r0001").published("a1")
    before, digest = report_of(good), read_json(good.sealed)["adapter_digest"]
    for path in (published, good.result):
        path.unlink()
    (good.folder / "interrupted.json").write_text(json.dumps({"what": "a kill"}))
    again = run(campaign, "a1")
    assert again.number == good.number + 1 and read_json(again.sealed)["adapter_digest"] == digest
    assert json.loads(read_attributes(published)["coverage"])["trained_by_attempt"] == good.number
    assert read_attributes(published)["edited_files"] == 1 and read_outcome(published, "").edited
    assert report_of(again) == before and again.transcript.read_bytes() == good.transcript.read_bytes()
    for path in (published, again.result, again.agent_report, good.agent_report):
        path.unlink()
    done = pipeline("worker", campaign.folder, "--round", "r0001", "a1")
    assert done.returncode == 4 and "does not say what was edited" in done.stderr
