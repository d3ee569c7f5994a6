"""Run one arm of a smoke campaign with real image, sandbox, two gloo ranks, judge and result file. It takes half a minute.

The whole round, eight arms and the meta stage, runs on the testbed in tests/slurm/test_round.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.campaign import files
from pipeline.campaign.errors import Interrupted
from pipeline.campaign.files import read_json, read_json_lines
from pipeline.campaign.layout import Attempt, Campaign
from pipeline.execution import adapter, judge
from pipeline.execution.judge import Decoding
from pipeline.execution.results import read_attributes, read_outcome
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # whole arms
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loop mounts and dropping to an unprivileged uid need root")


def pipeline(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    campaign = Campaign.at(tmp_path_factory.mktemp("campaigns") / "flow")
    done = pipeline("round", campaign.folder, "experiment=smoke", "--no-submit")
    assert done.returncode == 0, done.stderr
    return campaign


@pytest.fixture(scope="module")
def attempt(campaign: Campaign) -> Attempt:
    done = pipeline("worker", campaign.folder, "--round", "r0001", "a2")
    assert done.returncode == 0, done.stderr
    return campaign.round("r0001").attempts("a2")[0]


def test_the_result_is_published_whole_and_names_everything(campaign: Campaign, attempt: Attempt) -> None:
    published = campaign.round("r0001").published("a2")
    assert published.read_bytes() == attempt.result.read_bytes()
    found = read_attributes(published)
    facts = read_json_lines(campaign.log)[0]["facts"]
    assert found["status"] == found["exit_class"] == "completed"
    assert found["image_digest"] == facts["image"]["tree_digest"]
    assert found["runtime_digest"] == facts["runtime_digest"]
    assert (
        found["adapter_digest"]
        == adapter.kept_digest(attempt.adapter_dir)
        == read_json(attempt.sealed)["adapter_digest"]
    )
    outcome = read_outcome(published, files.file_digest(published))
    assert {name: {f: len(marks) for f, marks in sets.items()} for name, sets in outcome.outcomes.items()} == {
        "dev": dict.fromkeys(("roman", "text_cipher", "unit_conversion"), 4),
        "fresh": dict.fromkeys(("roman", "text_cipher", "unit_conversion"), 4),
    }


def test_the_arm_s_override_reached_the_adapter(attempt: Attempt) -> None:
    assert read_json(attempt.adapter_dir / adapter.CONFIG)["r"] == 8  # a2 moves recipe.lora.rank


def test_the_probe_reached_nothing(attempt: Attempt) -> None:
    report = read_json(attempt.probe)
    assert len(report) > 20
    assert not [name for name, check in report.items() if check["reached"]]


def test_the_adapter_is_sealed_before_the_fresh_seed_is_used(attempt: Attempt) -> None:
    items = next(mark["at"] for mark in read_json_lines(attempt.phases) if mark["phase"] == "items")
    assert attempt.sealed.stat().st_mtime <= items + 0.01


def test_dev_items_are_the_same_for_every_arm_and_fresh_differ_from_dev(campaign: Campaign, attempt: Attempt) -> None:
    done = pipeline("worker", campaign.folder, "--round", "r0000", "a1")  # the base: judged as it is, nothing trained
    assert done.returncode == 0, done.stderr
    base = campaign.round("r0000").attempts("a1")[0]
    dev = [line["item_id"] for line in read_json_lines(attempt.completions_dir / "dev.jsonl")]
    assert [line["item_id"] for line in read_json_lines(base.completions_dir / "dev.jsonl")] == dev
    assert read_attributes(campaign.round("r0000").published("a1"))["adapter_digest"] == ""
    seeds = read_json(campaign.seeds)
    assert seeds["dev"] != seeds["fresh/r0001"]
    assert not (base.completions_dir / "fresh.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGUSR2, 75, marks=pytest.mark.long), (signal.SIGKILL, -9)]
)
def test_an_arm_that_ends_while_it_is_judged_is_not_trained_again(campaign: Campaign, number: int, code: int) -> None:
    arm, folder = f"a{4 + (number == signal.SIGKILL)}", campaign.round("r0001")
    command = [sys.executable, "-m", "pipeline", "worker", str(campaign.folder), "--round", "r0001", arm]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not folder.attempts(arm) or not [
            mark for mark in read_json_lines(folder.attempts(arm)[0].phases) if mark["phase"] == "generate_start"
        ]:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(read_json(folder.attempts(arm)[0].claim)["pid"], number)
        process.wait()
    assert process.returncode == code or number == signal.SIGKILL
    assert not folder.published(arm).exists()
    assert pipeline("worker", campaign.folder, "--round", "r0001", arm).returncode == 0
    first, second = folder.attempts(arm)
    phases = [mark["phase"] for mark in read_json_lines(second.phases)]
    assert "train_start" not in phases and phases[-1] == "completed"
    assert read_json(first.sealed)["adapter_digest"] == read_attributes(folder.published(arm))["adapter_digest"]
    assert json.loads(read_attributes(folder.published(arm))["coverage"])["trained_by_attempt"] == 0
    assert len(read_outcome(folder.published(arm), "").outcomes["fresh"]) == 3


def test_an_arm_cut_short_between_decoding_and_its_result_is_published_by_the_next_start(
    campaign: Campaign, attempt: Attempt, tmp_path: Path
) -> None:
    """Everything was decoded and kept, nothing of it scored: the node was lost just then. Rows of other work do not count."""
    copy = Campaign.at(shutil.copytree(campaign.folder, tmp_path / campaign.name))
    folder = copy.round("r0001")
    (first,) = folder.attempts("a2")
    whole = read_outcome(folder.published("a2"), "")
    kept = {path.stem: read_json_lines(path) for path in first.completions_dir.glob("*.jsonl")}

    def cut_short(newest: Attempt, work: str) -> Attempt:
        for path in (folder.published("a2"), newest.result):
            path.unlink()
        newest.decoded_dir.mkdir()
        rows = [{"set": name, **row, "completion": "kept"} for name, rows in kept.items() for row in rows]
        lines = "".join(json.dumps(line) + "\n" for line in [{"work": work}, *rows])
        (newest.decoded_dir / "journal.00.0.jsonl").write_text(lines)
        done = pipeline("worker", copy.folder, "--round", "r0001", "a2")
        assert done.returncode == 0, done.stderr
        return folder.attempts("a2")[-1]

    second = cut_short(first, "that of another adapter")
    assert read_attributes(folder.published("a2"))["attempt"] == 1
    assert read_outcome(folder.published("a2"), "").outcomes == whole.outcomes
    said = second.judge_log.read_text()
    third = cut_short(second, said.partition("it is not of the work ")[2].split()[0])
    assert {row["completion"] for name in kept for row in read_json_lines(third.completions_dir / f"{name}.jsonl")} == {
        "kept"
    }


def test_finished_items_outlive_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "COPY_SECONDS", 0.0)
    first, journal = Decoding(tmp_path / "out", tmp_path / "kept", lambda: False), tmp_path / "out" / "journal.00.jsonl"
    first.restore()
    journal.write_text('{"item_id": "1"}\n')
    (tmp_path / "out" / "progress.jsonl").write_text("{}\n")
    first.watch()
    with journal.open("a") as file:
        file.write('{"item_id": "2"}\n{"it')
    first.watch()
    second = Decoding(tmp_path / "again", tmp_path / "kept", lambda: True)
    second.restore()
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["journal.00.jsonl"]
    assert (tmp_path / "again" / "journal.00.jsonl").read_bytes() == journal.read_bytes()
    with pytest.raises(Interrupted, match="was stopped while judging"):
        second.watch()


def test_journals_are_copied_now_and_then_and_once_more_at_a_stop(tmp_path: Path) -> None:
    stops: list[bool] = []
    decoding = Decoding(tmp_path / "out", tmp_path / "kept", lambda: bool(stops))
    decoding.restore()
    decoding.watch()
    (tmp_path / "out" / "journal.00.jsonl").write_text("row\n")
    decoding.watch()  # too soon after the one before
    assert not (tmp_path / "kept").exists()
    stops.append(True)
    with pytest.raises(Interrupted):
        decoding.watch()
    assert (tmp_path / "kept" / "journal.00.jsonl").read_text() == "row\n"


def test_a_full_disk_costs_kept_items_and_not_the_judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that fails in the middle goes on where it ended; the copies only spare work."""
    monkeypatch.setattr(judge, "COPY_SECONDS", 0.0)
    stops: list[bool] = []
    decoding = Decoding(tmp_path / "out", tmp_path / "kept", lambda: bool(stops))
    decoding.restore()
    (tmp_path / "out" / "journal.00.0.jsonl").write_text('{"item_id": "1"}\n{"item_id": "2"}\n')

    def full(source: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes()[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(judge, "append_new", full)
        decoding.watch()
        stops.append(True)
        with pytest.raises(Interrupted, match="its newest items are not kept: .*No space left"):
            decoding.watch()
    with pytest.raises(Interrupted, match="its finished items are kept"):
        decoding.watch()
    kept = (tmp_path / "kept" / "journal.00.0.jsonl").read_bytes()
    assert kept == (tmp_path / "out" / "journal.00.0.jsonl").read_bytes()


def test_a_journal_that_is_removed_while_it_is_looked_at_is_no_fault(tmp_path: Path) -> None:
    decoding = Decoding(tmp_path / "out", tmp_path / "kept", lambda: False)
    decoding.restore()
    (tmp_path / "out" / "journal.00.jsonl").symlink_to("gone")  # listed, and not there when it is opened
    decoding.watch()
    assert not list((tmp_path / "kept").glob("*"))


def test_a_published_arm_is_not_run_again(campaign: Campaign, attempt: Attempt) -> None:
    done = pipeline("worker", campaign.folder, "--round", "r0001", "a2")
    assert done.returncode == 0
    assert "was published before" in done.stdout
    assert len(campaign.round("r0001").attempts("a2")) == 1


def test_a_job_with_another_plan_s_digest_is_refused_before_it_claims(campaign: Campaign) -> None:
    done = pipeline("worker", campaign.folder, "--round", "r0001", "a7", "--plan", "0" * 64)
    assert done.returncode == 4
    assert "plan.json" in done.stderr
    assert not campaign.round("r0001").attempts("a7")


def test_below_the_quorum_meta_says_what_is_missing_and_decides_nothing(campaign: Campaign, attempt: Attempt) -> None:
    done = pipeline("meta", campaign.folder, "--round", "r0001")
    assert done.returncode == 1
    folder = campaign.round("r0001")
    assert f"{len(list(folder.folder.glob('a?.h5')))} of 8 arms have a score" in done.stdout
    assert "never_started" in done.stdout
    assert not folder.decisions_dir.exists()
    assert not folder.closed.exists()
    assert not campaign.overrides("r0002").exists()


def test_a_trial_that_crashes_is_a_typed_outcome_with_its_traceback_and_no_score(
    campaign: Campaign, tmp_path: Path
) -> None:
    broken = Campaign.at(tmp_path / "broken")
    # How many puzzles the image has, only the trial sees: it holds out more than there are.
    done = pipeline("round", broken.folder, "experiment=smoke", "recipe.holdout_per_family=1000", "--no-submit")
    assert done.returncode == 0, done.stderr
    done = pipeline("worker", broken.folder, "--round", "r0001", "a0")
    assert done.returncode == 1
    found = read_attributes(broken.round("r0001").published("a0"))
    assert (found["status"], found["exit_class"]) == ("failed", "data")
    assert "no generated example of roman is left" in found["traceback"]
    outcome = read_outcome(broken.round("r0001").published("a0"), "")
    assert not outcome.outcomes
    assert json.loads(found["coverage"])["probe"]


def test_a_campaign_is_the_same_through_a_link(campaign: Campaign, attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(campaign.folder)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "worker", str(tmp_path / "link"), "--round", "r0001", "a2"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "was published before" in done.stdout
