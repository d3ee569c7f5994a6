"""Play `status`, `cancel` and `rerun` end to end against scripted answers of Slurm: files of answers/cases, printed by stand-ins on PATH."""

import json

import pytest

from pipeline.__main__ import main
from pipeline.campaign.layout import Campaign
from pipeline.cluster import slurm_jobs
from pipeline.rounds import launch
from tests.cluster.test_captured_answers import ANSWERS, expected, texts
from tests.support.campaigns import frozen_campaign
from tests.support.slurm_stand_ins import Clients

CASES = sorted(path.parent for path in (ANSWERS / "cases").glob("*/expect"))
SHOWN = {"waits": "queued", "runs": "starting", "ended": "lost"}


@pytest.fixture
def campaign(tmp_path, monkeypatch) -> Campaign:
    """Its arms a0 to a7 were submitted as 41_0 to 41_7, and none has begun."""
    monkeypatch.setattr(launch, "is_local", lambda folder: False)
    campaign = frozen_campaign(tmp_path)
    ids = {f"r0001/a{number}": f"41_{number}" for number in range(8)}
    slurm_jobs.record_submission(campaign.round("r0001"), ids, "", "round")
    return campaign


@pytest.mark.parametrize("folder", CASES, ids=[path.name for path in CASES])
def test_case_01_commands_act_on_what_is_true(campaign: Campaign, clients: Clients, folder, capsys) -> None:
    clients(**texts(folder), scancel="")
    truth = expected(folder)
    name = str(campaign.folder)
    assert main(["status", name, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    arms = {row["job"]: row for row in said["arms"]}
    for job_id, (word, kind) in truth.items():
        if kind != "unknown":
            shown = "cancelled" if word == "CANCELLED" else SHOWN[kind]
            assert arms[job_id]["state"] == shown, arms[job_id]
        else:
            assert arms[job_id]["state"] in ("unknown", "waiting")
    assert main(["cancel", name, "--dry-run"]) == 0
    cancelled = capsys.readouterr().out
    for job_id, (_, kind) in truth.items():
        assert (f"scancel {job_id}\n" in cancelled) is (kind != "ended")
    for job_id, (_, kind) in truth.items():
        arm = f"a{job_id[-1]}"
        code = main(["rerun", name, arm, "--dry-run"])
        printed = capsys.readouterr()
        if kind == "ended":
            assert code == 0 and f"would: r0001/{arm}: one more job" in printed.out
        else:
            assert code != 0 and job_id in printed.err, printed


def test_case_03_status_tells_the_first_line_of_what_slurm_complained_of(
    campaign: Campaign, clients: Clients, capsys
) -> None:
    clients(
        squeue="JOBID|STATE|NODELIST|REASON|START_TIME\n",
        scontrol=1,
        sacct="",
        errors={"sacct": "error: give me a start date"},
    )
    assert main(["status", str(campaign.folder)]) == 0
    said = capsys.readouterr().out
    assert "not all of Slurm's answer could be had" in said and "sacct: error: give me a start date" in said
    assert "scontrol ended with exit code 1" in said
    assert main(["status", str(campaign.folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["slurm_complaints"]) == 2


def test_case_01_queries_run_in_a_clean_environment_with_our_own_start_date(
    campaign: Campaign, clients: Clients, monkeypatch, capsys
) -> None:
    for variable in ("SQUEUE_STATES", "SACCT_FORMAT", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS", "SCANCEL_STATE"):
        monkeypatch.setenv(variable, "of-the-profile")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    asked = clients(squeue="", scontrol="", sacct="")
    for name in ("squeue", "sacct"):
        program = clients.folder / name
        program.write_text(program.read_text() + f"env > {clients.folder}/{name}.env\n")
    assert main(["status", str(campaign.folder)]) == 0
    for name in ("squeue", "sacct"):
        environ = (clients.folder / f"{name}.env").read_text()
        assert "of-the-profile" not in environ and "SLURM_CONF=/etc/slurm/slurm.conf" in environ
    (sacct,) = (line for line in asked.read_text().splitlines() if line.startswith("sacct"))
    day = sacct.split("-S ")[1].split()[0]
    assert len(day) == 10 and day.count("-") == 2


def test_rerun_of_a_job_that_slurm_has_forgotten_is_allowed(
    campaign: Campaign, clients: Clients, monkeypatch, capsys
) -> None:
    clients(squeue="JOBID|STATE|NODELIST|REASON|START_TIME\n", scontrol="No jobs in the system\n", sacct=1)
    assert main(["rerun", str(campaign.folder), "a3", "--dry-run"]) == 0
    # Where another user submitted it, the site may only hide it.
    monkeypatch.setattr("os.getuid", lambda: 4321)
    assert main(["rerun", str(campaign.folder), "a3", "--dry-run"]) != 0
    assert "another user submitted it" in capsys.readouterr().err


def test_a_scancel_of_what_ended_meanwhile_is_no_failure(campaign: Campaign, clients: Clients, capsys) -> None:
    waits = "JOBID|STATE|NODELIST|REASON|START_TIME\n41_[0-7]|PENDING||Priority|N/A\n"
    for stderr, code in (("error: Kill job error on job id 41_0: Job/step already completing or completed", 0),
                         ("error: Kill job error on job id 41_0: Access/permission denied", 1)):  # fmt: skip
        clients(squeue=waits, scontrol="", scancel=1, errors={"scancel": stderr})
        assert (main(["cancel", str(campaign.folder), "a0"]) != 0) == bool(code)
        assert ("permission denied" in capsys.readouterr().err) == bool(code)


HEADER = "JOBID|STATE|NODELIST|REASON|START_TIME\n"


def test_a_cancelled_arm_is_not_lost_and_says_who_cancelled_it(campaign: Campaign, clients: Clients, capsys) -> None:
    """a1 to a7 waited; a0 ran and saved its state."""
    name, folder = str(campaign.folder), campaign.round("r0001")
    attempt = folder.claim_attempt("a0")
    attempt.claim.write_text(json.dumps({"host": "n1", "slurm_job_id": "41_0", "pid": 1}))
    attempt.phases.write_text(json.dumps({"phase": "train", "at": 1.0, "detail": ""}) + "\n")
    attempt.interrupted.write_text("{}")
    ended = "JobID|State|NodeList|ExitCode|End\n41_0|CANCELLED by 0|n1|0:0|2026-11-27T06:02:12\n41_[1-7]|CANCELLED by 99999|None assigned|0:0|x\n"
    clients(squeue=HEADER, scontrol="No jobs in the system\n", sacct=ended)
    assert main(["status", name, "--json"]) == 0
    arms = {row["arm"]: (row["state"], row["detail"]) for row in json.loads(capsys.readouterr().out)["arms"]}
    assert arms["a0"] == ("cancelled", "by root; its state is saved; `rerun` with its name starts it")
    assert arms["a3"] == ("cancelled", "by uid 99999; `rerun` with its name starts it")
    assert main(["status", name]) == 0
    said = capsys.readouterr().out
    assert (
        f"a person cancelled a0, a1, a2, a3, a4, a5, a6, a7, so nothing starts them again by itself; this does: python -m pipeline rerun {name} a0 a1"
        in said
    )
    assert "ended without a score" not in said
    assert main(["rerun", name, "--failed", "--dry-run"]) == 0
    assert "a0: no job, because a person cancelled it" in capsys.readouterr().out
    assert main(["rerun", name, "a0", "a3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "r0001/a0: one more job" in said and "r0001/a3: one more job" in said


def test_cancel_records_who_did_it_for_sites_without_accounting(campaign: Campaign, clients: Clients, capsys) -> None:
    name = str(campaign.folder)
    clients(squeue=f"{HEADER}41_[0-7]|PENDING||Priority|N/A\n", scontrol="", scancel="ok", sacct=None)
    assert main(["cancel", name, "a3"]) == 0
    clients(
        squeue=f"{HEADER}41_[0-2,4-7]|PENDING||Priority|N/A\n",
        scontrol="JobId=41 ArrayJobId=41 ArrayTaskId=0-2,4-7 JobState=PENDING",
        sacct=None,
    )
    capsys.readouterr()
    assert main(["status", name, "--json"]) == 0
    arms = {row["arm"]: row for row in json.loads(capsys.readouterr().out)["arms"]}
    assert (
        arms["a3"]["state"] == "cancelled"
        and arms["a3"]["detail"].startswith("by root;")
        and arms["a4"]["state"] == "queued"
    )


def test_status_shows_the_reference_and_the_meta_job(campaign: Campaign, clients: Clients, capsys) -> None:
    folder = campaign.round("r0001")
    slurm_jobs.record_submission(folder, {"r0000/a1": "42_1", "reference": "43"}, "44", "round")
    clients(
        squeue=f"{HEADER}41_[0-7]|PENDING||Priority|N/A\n42_1|RUNNING|n2|None|x\n43|RUNNING|n1|None|x\n44|PENDING||Dependency|N/A\n",
        scontrol="",
        sacct=None,
    )
    assert main(["status", str(campaign.folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["jobs"] == {
        "reference": {"job": "43", "state": "RUNNING", "node": "n1", "detail": ""},
        "meta": {
            "job": "44",
            "state": "PENDING",
            "node": "",
            "detail": "Dependency: it waits for other jobs of the round",
        },
    }
    assert [(row["arm"], row["state"], row["job"]) for row in said["r0000"]] == [
        ("a0", "completed", ""),
        ("a1", "starting", "42_1"),
    ]
    assert main(["status", str(campaign.folder)]) == 0
    shown = capsys.readouterr().out
    assert (
        "reference: job 43 RUNNING n1\n" in shown
        and "meta: job 44 PENDING Dependency: it waits for other jobs" in shown
    )
