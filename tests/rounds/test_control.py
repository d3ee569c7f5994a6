"""Test what a person does to a round: nothing starts twice, arms with a score stay as they are, and a dry run writes nothing."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError, NoProgress, NotFound, WorkFailed
from pipeline.campaign.files import exclusive_lock, lock_holder, read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_clients, slurm_jobs
from pipeline.cluster.slurm_jobs import Job
from pipeline.execution import resume
from pipeline.model_calls.transcript import Writer
from pipeline.reporting import status
from pipeline.rounds import chain, control, end_campaign, freeze, judging, launch, meta
from pipeline.sandbox import kernel_cache
from tests.support.campaigns import OVERRIDES, fresh_campaign, frozen_campaign, publish, tree
from tests.support.paths import ROOT


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return frozen_campaign(tmp_path)


@pytest.fixture
def folder(campaign: Campaign) -> Round:
    return campaign.round("r0001")


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = slurm_clients.Output("", "it cannot be run", True)
    monkeypatch.setattr(slurm_clients, "run", lambda *command, **_: silent)


def _slurm(monkeypatch: pytest.MonkeyPatch, folder: Round, **states: str) -> None:
    """Submitted to Slurm, which says this of its jobs."""
    ids = {f"{folder.name}/{arm}": f"7_{arm[1]}" for arm in states}
    slurm_jobs.record_submission(folder, ids, "8", "round")
    known = {f"7_{arm[1]}": Job(f"7_{arm[1]}", state, "n2", "", "", "squeue") for arm, state in states.items()}
    known["8"] = Job("8", "PENDING", "", "Dependency", "", "squeue")
    monkeypatch.setattr(slurm_clients, "cluster_name", lambda: "")

    def query_jobs(wanted, names, since):
        return slurm_jobs.Report({i: known.get(i, Job(i, "UNKNOWN", absent=True)) for i in wanted})

    monkeypatch.setattr(slurm_jobs, "query_jobs", query_jobs)


def _claimed(folder: Round, arm: str, pid: int = 0, **claim: str):
    attempt = folder.claim_attempt(arm)
    content = {"host": platform.node(), "pid": pid, "slurm_job_id": "", "node": ""} | claim
    attempt.claim.write_text(json.dumps(content))
    attempt.phases.write_text(json.dumps({"phase": "train", "at": time.time(), "detail": ""}) + "\n")
    return attempt


def test_arms_without_a_score_are_chosen(folder: Round) -> None:
    publish(folder, "a0")
    _claimed(folder, "a3")
    assert control.chosen_arms(folder, []) == [f"a{n}" for n in range(1, 8)]
    assert control.chosen_arms(folder, [], failed=True) == ["a3"]
    with pytest.raises(ConfigError, match="no arm a9. Valid: a0, a1"):
        control.chosen_arms(folder, ["a9"])


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_arm_whose_job_waits_or_runs_is_not_started_beside_it(campaign, folder, monkeypatch, state) -> None:
    _slurm(monkeypatch, folder, a2=state)
    with pytest.raises(ConfigError, match=f"a2 is {state.lower()} as job 7_2"):
        control.rerun(campaign, folder, ["a2"], failed=False, dry_run=True, watch=lambda: None)


def test_arm_with_a_score_is_not_run_again(campaign, folder, no_slurm) -> None:
    publish(folder, "a1")
    with pytest.raises(ConfigError, match="r0001/a1 has a score"):
        control.rerun(campaign, folder, ["a1"], failed=False, dry_run=True, watch=lambda: None)


def test_dry_runs_and_readers_write_nothing(campaign, folder, monkeypatch, capsys) -> None:
    _slurm(monkeypatch, folder, a1="FAILED", a2="PENDING")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail(f"{a} was run"))
    before = tree(campaign.folder)
    for words in (["cancel"], ["rerun", "a1"], ["gc"], ["gc", "--json"], ["status"], ["status", "--json"], ["close"]):
        dry = ["--dry-run"] if words[0] in ("cancel", "rerun", "close") else []
        assert main([words[0], str(campaign.folder), *words[1:], *dry]) == 0
    assert tree(campaign.folder) == before
    said = capsys.readouterr().out
    assert "would: r0001/a2: scancel 7_2" in said and "would: r0001/a1: again, on this machine" in said
    assert "would close r0001 with 0 of 8 arms that have a score; its fresh seed would become public" in said
    assert "`close` would refuse while r0001/a2 as job 7_2, meta as job 8 may still bring a score" in said
    assert "nothing would be decided, because 0 of 8 arms have a score, fewer than the quorum of 5 (article 3)" in said


def test_close_refuses_while_something_of_the_round_runs_and_names_it(campaign, folder, no_slurm, capsys) -> None:
    lock = folder.folder / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock, "pipeline"], cwd=ROOT) as runner:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "pipeline"]) as worker:
            _claimed(folder, "a5", pid=worker.pid)
            while lock_holder(lock) is None and runner.poll() is None:
                time.sleep(0.05)
            assert main(["close", str(campaign.folder)]) == 2
            said = capsys.readouterr().err
            assert f"r0001 still runs: `round` as process {runner.pid}, r0001/a5 as process {worker.pid}" in said
            assert f"`python -m pipeline cancel {campaign.folder} --round r0001`" in said and not folder.closed.exists()
            assert main(["cancel", str(campaign.folder), "a6", "a7"]) == 0
            said = capsys.readouterr().out
            assert f"a6 and a7 cannot be cancelled before the `round` here (process {runner.pid}) begins them" in said
            worker.kill()
        runner.kill()
    assert meta.still_running(folder) == []


def test_what_a_decision_lacks_is_the_quorum_the_standing_recipe_or_the_reference(campaign, folder) -> None:
    for arm in ("a0", "a1", "a2", "a3"):
        publish(folder, arm)
    assert meta.lacking(campaign, folder, 5).startswith("4 of 8 arms have a score, fewer than the quorum of 5")
    publish(folder, "a4")
    assert meta.lacking(campaign, folder, 5) == ""
    without_standing = folder.plan.read_text()
    plan = json.loads(without_standing)
    plan["policy"]["standing"] = [["recipe.lora.rank", "16"]]
    plan["arms"][7]["replicate_of"] = "standing"
    folder.plan.write_text(json.dumps(plan))
    assert "the standing recipe, which the axes are compared with, has no score (a7; article 7)" in meta.lacking(
        campaign, folder, 5
    )
    publish(folder, "a7")
    assert meta.lacking(campaign, folder, 5) == ""
    campaign.round("r0000").published("a0").unlink()
    assert meta.lacking(campaign, folder, 5) == "", "a standing recipe is compared with its own runs"
    folder.plan.write_text(without_standing)
    assert meta.lacking(campaign, folder, 5).startswith("the reference, which the arms are compared with")


def test_cancel_takes_waiting_and_running_jobs_and_the_meta_job(campaign, folder, monkeypatch, tmp_path) -> None:
    _slurm(monkeypatch, folder, a1="FAILED", a2="PENDING", a3="RUNNING")
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert control.cancel(campaign, folder, []) == [
        "r0001/a2: scancel 7_2", "r0001/a3: scancel 7_3", "meta: scancel 8",
    ]  # fmt: skip
    assert (tmp_path / "cancelled").read_text().split() == ["7_2", "7_3", "8"]
    assert control.cancel(campaign, folder, ["a1"]) == []


def test_cancel_ends_a_worker_of_this_machine_and_nobody_else(campaign, folder, no_slurm) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "pipeline"]) as ours:
        with subprocess.Popen(["sleep", "60"]) as other:
            _claimed(folder, "a1", pid=ours.pid)
            _claimed(folder, "a2", pid=other.pid)
            _claimed(folder, "a3", pid=ours.pid, host="elsewhere")
            said = control.cancel(campaign, folder, [])
            assert [line.split(":")[0] for line in said] == ["r0001/a1"]
            assert ours.wait(5) < 0 and other.poll() is None
            other.kill()


HOLD = """
import pathlib, sys, time
from pipeline.campaign.files import exclusive_lock
with exclusive_lock(pathlib.Path(sys.argv[1]), "pipeline"):
    time.sleep(60)
"""


def test_cancel_of_a_whole_round_ends_the_round_here_and_leaves_its_arms_to_it(campaign, folder, no_slurm) -> None:
    """The `round` process would go on with the next arm; it ends its arms itself, so that they save their state."""
    lock = folder.folder / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock, "pipeline"], cwd=ROOT) as runner:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "pipeline"]) as worker:
            _claimed(folder, "a1", pid=worker.pid)
            while lock_holder(lock) is None and runner.poll() is None:
                time.sleep(0.05)
            (line,) = control.cancel(campaign, folder, [], dry_run=True)
            assert line.startswith(f"r0001: SIGTERM to process {runner.pid}") and runner.poll() is None
            assert control.cancel(campaign, folder, []) == [line]
            assert runner.wait(5) < 0 and worker.poll() is None
            # Its name is still in the file, but nobody holds the lock.
            assert str(runner.pid) in lock.read_text()
            assert control.cancel(campaign, folder, [])[0].startswith("r0001/a1")
            assert worker.wait(5) < 0


@pytest.mark.parametrize("text", ["", "process 1 of root on elsewhere\n", "process x", "\0" * 10_000])
def test_a_lock_that_nobody_here_holds_ends_nobody(campaign, folder, no_slurm, text) -> None:
    (folder.folder / ".lock").write_text(text)
    assert control.cancel(campaign, folder, []) == []
    with open(folder.folder / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert control.cancel(campaign, folder, []) == []


def test_cancel_of_a_closed_round_leaves_the_round_process_alone(campaign, folder, no_slurm) -> None:
    folder.closed.write_text("{}")
    with exclusive_lock(folder.folder / ".lock", "test"):
        assert control.cancel(campaign, folder, []) == []


def test_rerun_here_runs_those_arms_and_the_meta_stage(campaign, folder, no_slurm, monkeypatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(
        launch.local_runner,
        "run_local",
        lambda stages, *a: ran.append([s[-3] if s[0] == "worker" else s[0] for s in stages]) or {"meta": 0},
    )
    said = control.rerun(campaign, folder, ["a4", "a6"], failed=False, dry_run=False, watch=lambda: None)
    assert said == ["r0001/a4: again, on this machine", "r0001/a6: again, on this machine"]
    assert ran == [["a4", "a6"], ["meta"]]


def test_logs_are_those_of_the_newest_attempt(folder, no_slurm) -> None:
    with pytest.raises(NotFound, match="r0001/a1 has no log yet"):
        control.logs_of(folder, "a1")
    for text in ("old", "new"):
        _claimed(folder, "a1").trial_log.write_text(text)
    folder.slurm_dir.mkdir(exist_ok=True)
    slurm_jobs.record_submission(folder, {"r0001/a1": "7_1"}, "8", "round")
    (folder.slurm_dir / "7_1_0_log.out").write_text("job")
    assert [path.read_text() for path in control.logs_of(folder, "a1")] == ["new", "job"]
    assert [path.read_text() for path in control.logs_of(folder, "a1", "job")] == ["job"]


def test_logs_of_the_reference_the_meta_job_and_r0000(campaign, folder, no_slurm, capsys) -> None:
    folder.slurm_dir.mkdir(exist_ok=True)
    slurm_jobs.record_submission(folder, {"r0000/a0": "8_0", "reference": "9"}, "10", "round")
    for job_id in ("8_0", "9", "10"):
        (folder.slurm_dir / f"{job_id}_0_log.out").write_text(f"job {job_id}\n")
    folder.meta_dir.mkdir(exist_ok=True)
    (folder.meta_dir / "judge.log").write_text("judged\n")
    name = str(campaign.folder)
    for words, shown in ((["meta", "--which", "job"], "job 10\n"), (["reference", "--which", "job"], "job 9\n"),
                         (["a0", "--round", "r0000"], "job 8_0\n"), (["reference", "--which", "judge"], "judged\n")):  # fmt: skip
        assert main(["logs", name, *words]) == 0
        assert capsys.readouterr().out == shown
    assert main(["logs", name, "meta", "--which", "trial"]) == 2
    assert "r0001/meta has no trial log yet" in capsys.readouterr().err


def test_garbage_is_what_scored_arms_no_longer_need(campaign, folder) -> None:
    for arm in ("a0", "a1"):
        attempt = _claimed(folder, arm)
        (attempt.saved_dir / "000000").mkdir(parents=True)
        (attempt.saved_dir / "000000" / "state").write_bytes(b"x" * 1000)
    publish(folder, "a0")
    found = [(path, size) for path, size in end_campaign.garbage(campaign) if path.name == "checkpoints"]
    assert found == [(folder.folder / "a0/attempt_00/checkpoints", 1000)]
    end_campaign.remove(found)
    assert not found[0][0].exists() and (folder.folder / "a1/attempt_00/checkpoints/000000/state").exists()


def test_garbage_has_this_machine_s_kernels_of_the_image(campaign, folder, tmp_path, monkeypatch) -> None:
    """Damaged ones at any time, whole ones when no round follows, and never those of another image."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    image = folder.frozen_plan().image_digest[:16]
    store = kernel_cache.store_of("")
    for name in (f"{image}-gpu-1", f".{image}-gpu-1.damaged.n1.7", "0" * 16 + "-gpu-1"):
        (store / name / "tree").mkdir(parents=True)
        (store / name / "tree" / "kernel.so").write_bytes(b"x" * 100)

    def found() -> list[tuple[str, int]]:
        return [(path.name, size) for path, size in end_campaign.garbage(campaign) if path.parent == store]

    assert found() == [(f".{image}-gpu-1.damaged.n1.7", 100)]
    monkeypatch.setattr(type(campaign), "has_ended", True)
    assert found() == [(f".{image}-gpu-1.damaged.n1.7", 100), (f"{image}-gpu-1", 100)]


def test_status_puts_files_before_slurm_s_word(campaign, folder, monkeypatch) -> None:
    for arm in ("a0", "a1", "a2"):
        _claimed(folder, arm, slurm_job_id="7")
    publish(folder, "a0")
    words = {
        "a0": "FAILED",
        "a1": "RUNNING",
        "a2": "NODE_FAIL",
        "a3": "PENDING",
        "a4": "RUNNING",
        "a5": "CANCELLED",
        "a6": "UNKNOWN",
    }
    known = {f"r0001/{arm}": Job(arm, word, "n2") for arm, word in words.items()}
    rows = {row.arm: row for row in status.round_status(campaign, folder, known)}
    assert {arm: row.state for arm, row in rows.items()} == {
        "a0": "completed", "a1": "running", "a2": "unknown", "a3": "queued", "a4": "starting", "a5": "cancelled", "a6": "waiting", "a7": "waiting",
    }  # fmt: skip
    assert rows["a2"].detail == "job a2 ended as NODE_FAIL, and Slurm may start it again" and rows["a1"].node == "n2"


def test_silence_has_a_deadline(campaign, folder, monkeypatch) -> None:
    attempt = _claimed(folder, "a1", slurm_job_id="7", host="elsewhere")
    assert status.round_status(campaign, folder)[1].state == "running"
    long_ago = time.time() - 2 * status.SILENT_SECONDS
    attempt.phases.write_text(json.dumps({"phase": "train", "at": long_ago, "detail": ""}) + "\n")
    os.utime(attempt.phases, (long_ago, long_ago))
    assert status.round_status(campaign, folder)[1].state == "unknown"
    running = {"r0001/a1": Job("7_1", "RUNNING", "n2")}
    assert status.round_status(campaign, folder, running)[1].state == "running"


def test_a_job_that_slurm_does_not_know_is_unknown_after_a_while(campaign, folder) -> None:
    slurm_jobs.record_submission(folder, {"r0001/a1": "7_1"}, "8", "round")
    silent = {"r0001/a1": Job("7_1", "UNKNOWN")}
    assert status.round_status(campaign, folder, silent)[1].state == "waiting"
    os.utime(folder.jobs, (0, time.time() - 2 * status.SILENT_SECONDS))
    row = status.round_status(campaign, folder, silent)[1]
    assert (row.state, row.detail) == ("unknown", "Slurm does not know job 7_1")


def test_gpu_hours_are_those_used_and_the_forecast(tmp_path, capsys) -> None:
    campaign = fresh_campaign(tmp_path)
    folder = freeze.freeze(campaign, "r0001", [*OVERRIDES, "cluster=slurm", "cluster.gpus_per_node=2"])
    attempt = folder.claim_attempt("a1")
    began = time.time() - 7200
    marks = [
        {"phase": "claim", "at": began, "detail": ""},
        {"phase": "failed", "at": began + 3600, "detail": "crashed"},
    ]
    attempt.phases.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    os.utime(attempt.phases, (began, began))
    assert main(["status", str(campaign.folder), "--json"]) == 0
    hours = json.loads(capsys.readouterr().out)["gpu_hours"]
    assert hours["used"] == 2.0  # an hour of two
    assert hours["forecast"] > 0 and hours["source"].startswith("assumed")
    assert main(["status", str(campaign.folder)]) == 0
    assert "GPU-hours of the round's arms: 2.00 used; " in capsys.readouterr().out


def test_a_running_agent_shows_what_it_used_of_its_budget_and_its_steps_as_those_of_the_full_run(
    campaign, folder
) -> None:
    """The step was shown beside the phase `agent`, and read as a number of answers."""
    attempt = _claimed(folder, "a1", pid=os.getpid())
    attempt.phases.write_text(json.dumps({"phase": "agent", "at": time.time(), "detail": ""}) + "\n")
    attempt.progress.write_text(
        json.dumps({"phase": "train", "step": 30, "num_steps": 30, "loss": 0.5, "tokens": 9, "seconds": 1.0}) + "\n"
    )
    attempt.agent_dir.mkdir()
    writer = Writer(attempt.transcript)
    writer.append("answer", b'{"kind":"answer"}', call=0, tries=1, prompt_tokens=60_000, answer_tokens=306)
    writer.append("tool_result", b"", tool=0, ok=True, failure="", what="", truncated=False, facts={"gpu_seconds": 58})
    row = status.round_status(campaign, folder)[1]
    assert (row.phase, status.step_in_words(row)) == ("agent", "(full run: step 30/30)")
    assert row.detail == "agent: 1 of 40 answers, 60,306 of 400,000 tokens, 58 of 1,800 seconds of runs"
    writer.append("answer", b"", call=1, tries=1, prompt_tokens=1, answer_tokens=1)
    writer.close()
    assert "2 of 40 answers, 60,308 of" in status.round_status(campaign, folder)[1].detail


def test_dead_process_of_this_machine_is_lost(campaign, folder) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    _claimed(folder, "a1", pid=gone.pid)
    row = status.round_status(campaign, folder)[1]
    assert (row.state, row.detail) == ("lost", "its process has ended")


def test_closing_by_hand_keeps_the_policy(campaign, folder, monkeypatch) -> None:
    """Three arms of eight: below the quorum."""
    for arm in ("a0", "a1", "a2"):
        publish(folder, arm)
    absent = judging.Outcome("reference", "reference", "absent", "never_started")
    monkeypatch.setattr(judging, "evaluate_reference", lambda *a: pytest.fail("no reference is evaluated"))
    monkeypatch.setattr(judging, "reference_outcome", lambda *a, **k: absent)
    assert meta.close(campaign, folder).state == "undecided" and not folder.closed.exists()
    decision = meta.close(campaign, folder, by_person=True)
    assert decision.state == "closed" and "closed by hand" in decision.reasons[-1]
    assert folder.closed.exists() and read_json(folder.closed)["fresh_seed"]
    assert campaign.overrides("r0002").exists()
    again = tree(campaign.folder)
    assert meta.close(campaign, folder, by_person=True) == decision
    assert tree(campaign.folder) == again


@pytest.mark.parametrize(
    ("overrides", "paused", "closed", "why"),
    [
        ([], False, True, "campaign.auto is off"),
        (["campaign.auto=true"], True, True, "paused"),
        (["campaign.auto=true"], False, False, "r0001 is not closed"),
        (["campaign.auto=true", "campaign.rounds=1"], False, True, "r0001 was the last round"),
    ],
)
def test_chain_says_why_it_stops(tmp_path, overrides, paused, closed, why) -> None:
    from tests.support.campaigns import fresh_campaign

    campaign = fresh_campaign(tmp_path)
    folder = freeze.freeze(campaign, "r0001", [*OVERRIDES, *overrides])
    if paused:
        chain.pause(campaign)
    if closed:
        folder.closed.write_text("{}")
    assert str(chain.chain(campaign, folder)).startswith(why)


def test_chain_submits_the_next_round_with_the_same_cluster(tmp_path, monkeypatch) -> None:
    from tests.support.campaigns import fresh_campaign

    campaign = fresh_campaign(tmp_path)
    operational = ["cluster=testbed", "campaign.auto=true", "campaign.rounds=3"]
    folder = freeze.freeze(campaign, "r0001", [*OVERRIDES, *operational])
    folder.closed.write_text("{}")
    campaign.overrides("r0002").write_text("# @package _global_\nround: r0002\n")
    monkeypatch.setattr(launch, "submit", lambda campaign, following: {"meta_job_id": "9", "array_job_ids": ["8"]})
    assert chain.chain(campaign, folder) == {"round": "r0002", "meta_job_id": "9", "array_job_ids": ["8"]}
    assert read_json(campaign.round("r0002").operational) == operational


def _kept(folder: Round, arm: str, step: int | None) -> None:
    attempt = _claimed(folder, arm)
    if step is not None:
        out = attempt.folder / "out"
        (out / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        resume.keep_state(out, attempt.saved_dir)


@pytest.mark.parametrize(
    ("steps", "restarts", "refused"),
    [
        ([10, 10], 2, True),
        ([None, None], 2, True),
        ([10, 20], 2, False),
        ([10, 10], 1, False),
        ([10], 2, False),
        ([20, 10], 5, True),
    ],
)
def test_two_starts_to_the_same_point_are_enough(folder, steps, restarts, refused) -> None:
    for step in steps:
        _kept(folder, "a1", step)
    before = folder.attempts("a1")[::-1]
    if not refused:
        resume.check_progress(before, restarts)
        return
    with pytest.raises(NoProgress, match="two starts in a row ended at the same point") as error:
        resume.check_progress(before, restarts)
    assert error.value.exit_code == 93


def test_state_is_kept_at_each_new_checkpoint_and_the_old_one_goes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resume, "KEEP_SECONDS", 0.0)
    out, saved = tmp_path / "out", tmp_path / "saved"
    (out / "checkpoints" / "partial").mkdir(parents=True)
    keeper = resume.Keeper(out, saved)
    keeper.keep_if_new()
    assert not saved.exists()
    for number, step in enumerate((5, 10)):
        (out / "checkpoints" / f"step_{step:06d}").mkdir()
        (out / "progress.jsonl").write_text(str(step))
        keeper.keep_if_new()
        keeper.keep_if_new()
        assert [path.name for path in saved.iterdir()] == [f"{number:06d}"]
        assert (saved / f"{number:06d}" / "progress.jsonl").read_text() == str(step)


def test_state_that_cannot_be_kept_now_is_tried_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resume, "KEEP_SECONDS", 0.0)
    out, saved = tmp_path / "out", tmp_path / "saved"
    (out / "checkpoints").mkdir(parents=True)
    keeper = resume.Keeper(out, saved)
    (out / "checkpoints" / "step_000005").mkdir()
    saved.write_text("in the way")
    keeper.keep_if_new()
    saved.unlink()
    keeper.keep_if_new()
    assert [path.name for path in saved.iterdir()] == ["000000"]


def test_only_plain_files_of_a_trial_are_kept_and_only_so_much(tmp_path, monkeypatch) -> None:
    out, saved = tmp_path / "out", tmp_path / "saved"
    (out / "checkpoints" / "step_000005").mkdir(parents=True)
    (out / "checkpoints" / "step_000005" / "state").write_bytes(b"x" * 100)
    os.mkfifo(out / "pipe")
    (out / "link").symlink_to("/etc/passwd")
    (out / "folder").symlink_to("/etc")
    resume.keep_state(out, saved)
    kept = sorted(str(path.relative_to(saved)) for path in saved.rglob("*"))
    assert kept == ["000000", *(f"000000/checkpoints{end}" for end in ("", "/step_000005", "/step_000005/state"))]
    monkeypatch.setattr(resume, "MAX_STATE_BYTES", 2**20)
    with open(out / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="more than 1048576 bytes"):
        resume.keep_state(out, saved)
    assert [path.name for path in saved.iterdir() if path.name.isdigit()] == ["000000"]


def test_who_goes_on_with_a_round_of_this_machine_is_told(tmp_path, capsys):
    """A process that lives does, else the next `round`; what runs is not started a second time, and a name that is none is told."""
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    write_file(folder.submitted, json.dumps({"kind": "local", "pid": 2**22 + 1}))
    assert main(["status", str(campaign.folder)]) == 0
    assert f"this resumes it: python -m pipeline round {campaign.folder}" in capsys.readouterr().out
    lives = subprocess.Popen([sys.executable, "-c", "input()  # pipeline"], stdin=subprocess.PIPE)
    try:
        write_file(folder.submitted, json.dumps({"kind": "local", "pid": lives.pid}))
        until_named(lives.pid)
        assert main(["status", str(campaign.folder)]) == 0
        assert f"runs here as process {lives.pid} and decides by itself" in capsys.readouterr().out
        attempt = folder.claim_attempt("a1")
        claim = {"host": platform.node(), "pid": lives.pid, "slurm_job_id": ""}
        write_file(attempt.claim, json.dumps(claim))
        with pytest.raises(ConfigError, match=f"r0001/a1 runs here as process {lives.pid}"):
            control.rerun(campaign, folder, ["a1"], failed=False, dry_run=True, watch=lambda: None)
    finally:
        lives.communicate(b"\n")
    assert main(["logs", str(campaign.folder), "b9"]) == 2
    assert "r0001 has no arm b9. Valid: a0" in capsys.readouterr().err


def until_named(pid: int) -> None:
    """Until a process that was just started is known by its command."""
    while b"pipeline" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.01)


def test_following_the_logs_of_an_arm_ends_with_it(folder, no_slurm, capsys) -> None:
    made = folder.claim_attempt("a1")
    made.folder.joinpath("trial.log").write_text("done\n")
    publish(folder, "a1", 10)
    assert main(["logs", str(folder.campaign.folder), "a1", "--follow", "--round", folder.name]) == 0
    assert "done" in capsys.readouterr().out


def test_a_round_whose_slurm_is_silent_is_not_run_again(folder, no_slurm, capsys) -> None:
    slurm_jobs.record_submission(folder, {f"{folder.name}/a1": "7_1"}, "8", "round")
    folder.claim_attempt("a1")
    with pytest.raises(WorkFailed, match="Slurm does not answer"):
        control.rerun(folder.campaign, folder, ["a1"], failed=False, dry_run=True, watch=lambda: None)
    assert main(["status", str(folder.campaign.folder)]) == 0
    assert "Slurm does not answer, so states come from files alone" in capsys.readouterr().out


def test_the_time_of_a_resumed_round_counts_what_was_before(campaign, folder, monkeypatch, capsys) -> None:
    """Two arms at once for 100 s, a pause of 1000 s, and one more attempt of 50 s before this command began."""
    from pipeline.cli import round_display

    for arm, spans in {"a1": [(1000, 1100), (2100, 2150)], "a2": [(1020, 1090)]}.items():
        for begin, end in spans:
            attempt = folder.claim_attempt(arm)
            marks = [{"phase": "train", "at": begin, "detail": ""}, {"phase": "failed", "at": end, "detail": "x"}]
            attempt.phases.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
            os.utime(attempt.phases, (begin, begin))
    assert status.worked_seconds([folder], before=5000.0) == 150
    assert status.worked_seconds([folder], before=1050.0) == 50
    assert status.breakdown([folder])["training"] == 220
    round_display.report_end("runs/x", campaign, folder, 30.0, 150.0)
    assert (
        "r0001 took 180 s (150 s before it was interrupted, 30 s since); of the workers' time: "
        in capsys.readouterr().out
    )
