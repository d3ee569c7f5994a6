"""Test that an arm saves its state before its job ends, by its own clock, where no signal ever comes."""

import os
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.campaign.errors import Interrupted
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Attempt, Campaign
from pipeline.config import settings
from pipeline.execution import job_end, trial
from pipeline.execution.attempt import Work
from pipeline.execution.job_end import NEVER, JobEnd
from pipeline.execution.results import read_attributes
from tests.execution.test_trial import NoSandbox
from tests.support.paths import ROOT

JOB = "41"
OBEDIENT = """
import pathlib, time
while not pathlib.Path({stop!r}).exists():
    time.sleep(0.02)
pathlib.Path({out!r}, "saved").touch()
raise SystemExit(75)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A job of a site whose clients print what they are called with; its environment says nothing of its end."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def answers(scontrol="", squeue=""):
        for name, text in (("scontrol", scontrol), ("squeue", squeue)):
            (folder / f"{name}.txt").write_text(text)
            (folder / name).write_text(
                f'#!/bin/sh\n[ -z "$SQUEUE_STATES$SLURM_TIME_FORMAT" ] && cat {folder}/{name}.txt\n'
            )
            (folder / name).chmod(0o755)

    answers()
    return answers


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(timespec="seconds")


def end_of(now: float) -> float:
    return JobEnd(now, 30, 60).at - now


def test_case_16_the_end_is_what_the_environment_says_then_slurm_then_the_configuration(site, monkeypatch):
    now = float(int(time.time()))
    assert end_of(now) == 1800
    site(squeue=f"{JOB} {stamp(now + 500)}\n")
    assert end_of(now) == 500
    site(squeue=f"{stamp(now + 500)}\n")  # a client that prints the time alone
    assert end_of(now) == 500
    site(
        scontrol=f"JobId={JOB} JobName=a TimeLimit=00:10:00 EndTime={stamp(now + 600)} Deadline=N/A\n",
        squeue=f"{JOB} {stamp(now + 500)}\n",
    )
    assert end_of(now) == 600
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert end_of(now) == 600
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 700))
    assert end_of(now) == 700
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) - 700))  # inherited from another allocation
    assert end_of(now) == 600
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert end_of(now) == 600


def test_of_an_array_the_line_of_this_task_counts(site):
    now = float(int(time.time()))
    lines = [
        f"JobId={job} ArrayJobId={JOB} ArrayTaskId={n} EndTime={stamp(now + 100 * (n + 1))}"
        for n, job in enumerate(("39", JOB, "40"))
    ]
    site(scontrol="\n".join(lines))
    assert end_of(now) == 200
    site(squeue=f"39 {stamp(now + 100)}\n{JOB} {stamp(now + 200)}\n")
    assert end_of(now) == 200


@pytest.mark.parametrize("text", ["Unknown", "N/A", "NONE", "", "2026-13-41T00:00:00"])
def test_what_is_no_time_is_no_answer(site, text):
    now = time.time()
    site(scontrol=f"JobId={JOB} EndTime={text}\n", squeue=f"{JOB} {text}\n")
    assert end_of(now) == pytest.approx(1800)


def test_a_job_without_a_limit_and_a_machine_without_slurm_have_no_end(site, monkeypatch):
    site(scontrol=f"JobId={JOB} TimeLimit=UNLIMITED EndTime=Unknown\n")
    assert JobEnd(time.time(), 30, 60).at == NEVER and not JobEnd(time.time(), 30, 60).is_near()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert JobEnd(0.0, 30, 60).at == NEVER


def test_a_limit_that_somebody_raised_is_believed_at_the_end(site, monkeypatch, capsys):
    now = time.time()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 2))
    end = JobEnd(now - 100, 30, 60)
    site(scontrol=f"JobId={JOB} EndTime={stamp(now + 3600)}\n")
    assert not end.is_near() and end.at - now > 3000
    monkeypatch.setattr(job_end.time, "time", lambda: now + 3590)
    site()
    assert end.is_near() and "without a signal" in capsys.readouterr().err


def test_the_lead_takes_half_of_a_short_job_at_most(site, monkeypatch):
    now = time.time()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 100))
    end = JobEnd(now, 30, 600)
    assert not end.is_near()
    monkeypatch.setattr(job_end.time, "time", lambda: now + 51)
    assert end.is_near()


def test_case_16_a_trial_is_stopped_before_the_end_although_the_signal_was_swallowed(site, tmp_path, monkeypatch):
    chosen = settings.compose(["experiment=smoke", "cluster.signal_lead_seconds=2"])
    attempt, out = Attempt(tmp_path / "attempt_00"), tmp_path / "out"
    attempt.task_dir.mkdir(parents=True)
    out.mkdir()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 4))
    job = Work(None, None, {}, None, "", None, chosen, attempt)  # type: ignore[arg-type]
    code = OBEDIENT.format(stop=str(attempt.task_dir / "stop"), out=str(out))
    with pytest.raises(Interrupted, match="saved its state"):
        trial.train(NoSandbox(code), attempt, out, 30.0, job.stop_wanted)
    assert (out / "saved").exists() and time.time() < job.end.at


@pytest.mark.slow
@pytest.mark.long  # `make drill` causes the same on a real Slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="loop mounts and dropping to an unprivileged uid need root")
def test_case_16_an_arm_whose_signal_never_comes_resumes_to_the_same_adapter(site, tmp_path, monkeypatch):
    """The job ends while the arm trains. Its worker is told nothing, saves, and ends with 75, on which the job is requeued."""
    overrides = [
        "experiment=smoke",
        "recipe.num_steps=60",
        "recipe.checkpoint_every=60",
        "cluster.checkpoint_minutes=0.001",
    ]
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.path.dirname(sys.executable)}:/usr/bin:/bin")

    def pipeline(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *map(str, words)], cwd=ROOT, capture_output=True, text=True
        )

    campaign = Campaign.at(tmp_path / "one")
    frozen = pipeline("round", campaign.folder, *overrides, "--no-submit")
    assert frozen.returncode == 0, frozen.stderr
    other = Campaign.at(shutil.copytree(campaign.folder, tmp_path / "undisturbed"))
    # It is asked for the first time when the training begins, and says from then on that the job ends five seconds later.
    ends = tmp_path / "ends"
    script = f'#!/bin/sh\n[ -e {ends} ] || date -d "5 seconds" +%Y-%m-%dT%H:%M:%S > {ends}\necho "JobId={JOB} EndTime=$(cat {ends})"\n'
    Path(tmp_path, "bin", "scontrol").write_text(script)
    stopped = pipeline("worker", campaign.folder, "--round", "r0001", "a1")
    assert stopped.returncode == 75, stopped.stderr
    assert "without a signal" in stopped.stderr
    first = campaign.round("r0001").attempts("a1")[0]
    assert read_json(first.interrupted)["what"] and not campaign.round("r0001").published("a1").exists()
    assert not list(first.saved_dir.glob("*/checkpoints/step_000060")) and list(
        first.saved_dir.glob("*/checkpoints/step_*")
    )
    monkeypatch.delenv("SLURM_JOB_ID")
    for each in (campaign, other):
        done = pipeline("worker", each.folder, "--round", "r0001", "a1")
        assert done.returncode == 0, done.stderr
    digests = {read_attributes(each.round("r0001").published("a1"))["adapter_digest"] for each in (campaign, other)}
    assert len(digests) == 1
