"""Test that a result which another machine published, and this one does not see yet, is waited for before anything follows from its absence."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, NoProgress
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.records import Decision
from pipeline.cluster import slurm_jobs
from pipeline.cluster.slurm_jobs import Job
from pipeline.execution import multinode, results, resume
from pipeline.reporting import status
from pipeline.rounds import control, freeze, judging, meta
from tests.support.campaigns import fresh_campaign, publish, publish_reference

WAIT_SECONDS = 20


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose eight arms have published, and in which files of other machines may come twenty seconds late."""
    campaign = fresh_campaign(tmp_path_factory.mktemp("template"))
    folder = freeze.freeze(campaign, "r0001", [f"cluster.file_wait_seconds={WAIT_SECONDS}"])
    publish_reference(campaign, folder)
    publish(campaign.round("r0000"), "a1")
    for number in range(8):
        publish(folder, f"a{number}", 38 if number == 2 else 20)
    return campaign.folder


@pytest.fixture
def campaign(template: Path, tmp_path: Path) -> Campaign:
    return Campaign.at(shutil.copytree(template, tmp_path / template.name))


@pytest.fixture
def folder(campaign: Campaign) -> Round:
    return campaign.round("r0001")


def late(path: Path, seconds: float = 0.5) -> subprocess.Popen[bytes]:
    """Take a file away; a process of another machine puts it back later."""
    aside = path.with_name(f"aside-{path.name}")
    path.rename(aside)
    return subprocess.Popen(["sh", "-c", f"sleep {seconds}; mv '{aside}' '{path}'"])


def slurm_says(monkeypatch: pytest.MonkeyPatch, folder: Round, **states: str) -> None:
    """Submitted to Slurm, which says this of its arms, and of the reference's job."""
    ids = {
        name if name == "reference" else f"{folder.name}/{name}": f"7_{number}" for number, name in enumerate(states)
    }
    slurm_jobs.record_submission(folder, ids, "8", "round")
    known = {job: Job(job, state, "n2") for job, state in zip(ids.values(), states.values(), strict=True)}
    said = slurm_jobs.Report({name: known.get(name, Job(name, "UNKNOWN")) for name in [*known, "8"]})
    monkeypatch.setattr(slurm_jobs, "query_jobs", lambda wanted, names, since: said)


def close(campaign: Campaign, folder: Round) -> tuple[Decision, list[str], float]:
    began, lines = time.monotonic(), list[str]()
    decision = meta.close(campaign, folder, report_line=lines.append)
    return decision, lines, time.monotonic() - began


@pytest.mark.parametrize("name", ["a2.h5", "reference.h5"])
def test_case_15_the_meta_stage_waits_for_a_result_that_is_not_seen_yet(campaign, folder, monkeypatch, name):
    slurm_says(monkeypatch, folder, a2="COMPLETED", reference="COMPLETED")
    monkeypatch.setattr(judging, "evaluate_reference", lambda *_: pytest.fail("the reference was judged a second time"))
    with late(folder.folder / name):
        decision, lines, _ = close(campaign, folder)
    assert (decision.state, decision.kept, lines) == ("decided", "a2", [])


def test_case_15_the_newest_of_two_results_is_waited_for(campaign, folder):
    """This machine still sees the failed first attempt, and the second has published a score."""
    attempt = folder.claim_attempt("a2")
    folder.published("a2").rename(attempt.result)
    publish(folder, "a2", None)
    failed = folder.published("a2").read_bytes()
    folder.published("a2").write_bytes(attempt.result.read_bytes())
    with late(folder.published("a2")):
        folder.published("a2").write_bytes(failed)
        assert not control.is_seen(folder, "a2")
        assert close(campaign, folder)[0].kept == "a2"


def test_the_reference_s_job_waits_for_the_one_that_trained_it(campaign, folder):
    with late(campaign.round("r0000").published("a0")):
        assert judging.judge_reference(campaign, folder, lambda: False).status == "completed"


def test_what_never_comes_is_given_up_and_named(campaign, folder, monkeypatch):
    folder.published("a5").unlink()
    (campaign.round("r0000").published("a1")).unlink()
    monkeypatch.setattr(control, "wait_until", lambda is_seen, seconds, folders: seconds == WAIT_SECONDS and is_seen())
    decision, lines, _ = close(campaign, folder)
    assert lines == ["r0000/a1, r0001/a5: no result was seen here within 20 s (cluster.file_wait_seconds)"]
    assert decision.state == "decided"  # seven of eight are enough


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_an_arm_that_has_not_ended_is_not_waited_for(campaign, folder, monkeypatch, state):
    folder.published("a5").unlink()
    slurm_says(monkeypatch, folder, a5=state)
    assert close(campaign, folder)[2] < WAIT_SECONDS / 2


def test_on_one_machine_nothing_is_waited_for(campaign, folder, monkeypatch):
    monkeypatch.setattr(control, "ask_slurm", lambda folder: pytest.fail("Slurm was asked"))
    folder.published("a5").unlink()
    assert control.await_results(folder, [(folder, "a5")], 0) == []


def test_case_15_rerun_starts_no_arm_whose_job_completed_and_whose_result_comes_late(campaign, folder, monkeypatch):
    options = {"failed": False, "dry_run": True, "watch": lambda: None}
    slurm_says(monkeypatch, folder, a4="COMPLETED")
    with late(folder.published("a4")):
        assert control.rerun(campaign, folder, [], **options) == []
    with late(folder.published("a4")), pytest.raises(ConfigError, match="a4 has a score"):
        control.rerun(campaign, folder, ["a4"], **options)


def test_case_15_a_completed_job_without_a_visible_result_is_not_lost(campaign, folder):
    folder.published("a4").unlink()
    attempt = folder.claim_attempt("a4")
    attempt.phases.write_text(json.dumps({"phase": "score", "at": time.time(), "detail": ""}) + "\n")
    folder.published("a3").unlink()
    known = {f"r0001/{arm}": Job(arm, "COMPLETED", "n2") for arm in ("a3", "a4")}
    rows = {row.arm: row for row in status.round_status(campaign, folder, known)}
    assert {rows[arm].state for arm in ("a3", "a4")} == {"unknown"}
    assert "is not seen here yet" in rows["a4"].detail


def test_case_15_a_checkpoint_that_is_not_seen_yet_is_no_lack_of_progress(folder):
    for step in (10, 20):
        attempt = folder.claim_attempt("a1")
        out = attempt.folder / "out"
        (out / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        resume.keep_state(out, attempt.saved_dir)
    before = folder.attempts("a1")[::-1]
    with late(before[0].saved_dir):
        resume.check_progress(before, 2, WAIT_SECONDS)
    before[0].saved_dir.rename(before[0].folder / "gone")
    with pytest.raises(NoProgress, match="cluster.checkpoint_minutes"):
        resume.check_progress(before, 2, 0.2)


def test_case_15_a_probe_s_report_of_another_node_may_come_late(tmp_path):
    report = tmp_path / "00" / "1.probe.json"
    report.parent.mkdir()
    report.write_text("{}")
    with late(report):
        assert multinode.check_probes(tmp_path, 2, WAIT_SECONDS) == "2 nodes"


def test_a_result_that_was_replaced_is_read_anew(folder):
    """Also where the other file has the same size and time, as the cache of a network file system may say."""
    path, other = folder.published("a1"), folder.published("a2")
    assert results.read_attributes(path)["arm"] == "a1"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    os.replace(other, path)
    os.utime(path, ns=times)
    assert results.read_attributes(path)["arm"] == "a2"


def test_rerun_starts_no_second_judging_of_the_reference_whose_result_comes_late(campaign, folder, monkeypatch):
    monkeypatch.setattr(control.launch, "is_local", lambda folder: False)
    slurm_says(monkeypatch, folder, a4="COMPLETED", reference="COMPLETED")
    with late(folder.folder / "reference.h5"):
        assert control.rerun(campaign, folder, [], failed=False, dry_run=True, watch=lambda: None) == []
