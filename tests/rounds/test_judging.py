"""Test what a meta job without GPUs does on a site whose arms have them: what it decides, and what it has a judge job judge."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.__main__ import main
from pipeline.audit import log_schema
from pipeline.audit.findings import Report
from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError, JudgeWanted, SlurmRefused, TrialFailed, WorkFailed
from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Round
from pipeline.campaign.log import Log
from pipeline.cli import job_stages
from pipeline.cluster import slurm_jobs, slurm_submit, stage_command
from pipeline.decision import board_submissions
from pipeline.rounds import control, freeze, judging, launch, meta
from tests.support.campaigns import GPUS, OVERRIDES, fresh_campaign, publish, publish_reference

SUBMISSIONS = ["submission 1", "submission 2", "submission 3"]  # the reference twice, and one arm


@pytest.fixture
def folder(tmp_path: Path) -> Round:
    """The first round, frozen for a site with GPUs, whose arms all have a score and whose reference is judged."""
    campaign = fresh_campaign(tmp_path)
    made = freeze.freeze(campaign, "r0001", [*OVERRIDES, *GPUS])
    publish_reference(campaign, made)
    for number in range(8):
        publish(made, f"a{number}", 15 + number)
    return made


def events(folder: Round, *kinds: str) -> list[tuple[str, list[str]]]:
    records = Log(folder.campaign.log).records()
    return [(record["event"], record["what"]) for record in records if record["event"] in kinds]


def unjudge(folder: Round) -> None:
    (folder.folder / "reference.h5").unlink()


def test_case_06_the_meta_job_asks_for_no_gpu_few_cores_and_a_short_time(folder: Round) -> None:
    texts = {path.stem: path.read_text() for path in folder.slurm_dir.glob("*.sbatch")}
    gpus = {name: line for name in texts for line in texts[name].splitlines() if "--gpus-per-node" in line}
    assert gpus == {
        "array_0": "#SBATCH --gpus-per-node=2", "array_1": "#SBATCH --gpus-per-node=2",
        "reference": "#SBATCH --gpus-per-node=1", "judge": "#SBATCH --gpus-per-node=1",
    }  # fmt: skip
    asked = {line for line in texts["meta"].splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --cpus-per-task=4", "#SBATCH --mem=16G", "#SBATCH --time=180"} <= asked
    assert not any("gpu" in line for line in asked)


@pytest.mark.parametrize("is_judged", [True, False])
@pytest.mark.parametrize("tasks", [{}, {"reference": "5"}, {"judge": "7"}])
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETED"])
def test_a_meta_job_that_looks_at_files_first_waits_for_the_same_jobs(
    folder: Round, slurm: SimpleNamespace, is_judged: bool, tasks: dict[str, str], state: str
) -> None:
    if not is_judged:
        unjudge(folder)
    slurm.states = dict.fromkeys(tasks.values(), state)
    slurm_jobs.record_submission(folder, tasks, "9", "round")
    arguments = SimpleNamespace(campaign=folder.campaign.folder, round=folder.name, asked=[])
    assert job_stages.awaited_judge(arguments) == judging.awaited(folder.campaign, folder)
    waits = state == "RUNNING" and ("judge" in tasks or ("reference" in tasks and not is_judged))
    assert bool(job_stages.awaited_judge(arguments)) == waits


def test_the_meta_job_decides_without_a_gpu(folder: Round) -> None:
    assert meta.close(folder.campaign, folder).state == "decided"
    assert events(folder, "judge_request", "unjudged") == []


def test_a_reference_that_nobody_judged_is_asked_for_once_and_then_done_without(
    folder: Round, slurm: SimpleNamespace
) -> None:
    unjudge(folder)
    for _ in range(2):  # killed before the submission, and run again: the same request
        with pytest.raises(JudgeWanted, match=r"r0001 is not judged yet \(reference\), judging needs a GPU"):
            meta.close(folder.campaign, folder)
    assert events(folder, "judge_request", "unjudged") == [("judge_request", ["reference"])]
    ids = judging.submit(folder.campaign, folder)
    assert ids is not None and judging.submit(folder.campaign, folder) is None, "once"
    (call,) = slurm.calls
    assert (call.arrays, call.reference, call.judge[0], call.meta[0]) == ([], None, "judge", "meta")
    assert call.meta[3:] == ("--asked=reference",)
    assert slurm.kept == ["mark 0"]
    (line,) = read_json_lines(folder.jobs)
    assert (line["tasks"], line["meta"], line["why"], line["ids"]["judges"]) == (
        {"judge": "06"},
        "09",
        "judge",
        ["reference"],
    )
    # The judge job died, so the second meta job goes on without the reference: article 7 needs it in the first round.
    decision = meta.close(folder.campaign, folder)
    assert decision.state == "undecided"
    assert "article 7: the reference recipe has no score on this round's fresh items" in decision.reasons[0]
    assert events(folder, "judge_request", "unjudged")[1:] == [("unjudged", ["reference"])]
    meta.close(folder.campaign, folder)
    assert len(events(folder, "judge_request", "unjudged")) == 2, "told once"
    report = Report()
    assert log_schema.check_records(Log(folder.campaign.log).records(), report) and not report.findings


def test_the_round_decides_once_the_judge_job_has_judged(folder: Round, slurm: SimpleNamespace) -> None:
    judged = (folder.folder / "reference.h5").read_bytes()
    unjudge(folder)
    with pytest.raises(JudgeWanted):
        meta.close(folder.campaign, folder)
    judging.submit(folder.campaign, folder)
    (folder.folder / "reference.h5").write_bytes(judged)
    assert meta.close(folder.campaign, folder).state == "decided"
    assert events(folder, "unjudged") == []


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_the_first_meta_job_run_again_leaves_the_round_to_the_judge_job(
    folder: Round,
    slurm: SimpleNamespace,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was killed after it had submitted, and Slurm requeued it; the meta job after the judge job is another one."""
    unjudge(folder)
    with pytest.raises(JudgeWanted):
        meta.close(folder.campaign, folder)
    judging.submit(folder.campaign, folder)
    slurm.states |= {"06": state, "09": "PENDING"}
    assert main(["status", str(folder.campaign.folder)]) == 0
    assert f"judge: job 06 {state} judges reference" in capsys.readouterr().out
    with pytest.raises(WorkFailed, match=f"judge job 06 of r0001 is {state.lower()}, and meta job 09 decides after it"):
        meta.close(folder.campaign, folder)
    assert main(["chain", str(folder.campaign.folder), "--round", "r0001", "--meta"]) == 0
    assert "meta job 09 decides after it" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "09")
    assert meta.close(folder.campaign, folder).state == "undecided"


def test_a_submission_that_was_never_recorded_is_known_to_its_own_meta_job(
    folder: Round, slurm: SimpleNamespace
) -> None:
    """The first meta job was killed between sbatch and its record, and the judge job died too."""
    unjudge(folder)
    with pytest.raises(JudgeWanted):
        meta.close(folder.campaign, folder)
    assert meta.close(folder.campaign, folder, asked=["reference"]).state == "undecided"
    assert events(folder, "judge_request", "unjudged") == [
        ("judge_request", ["reference"]),
        ("unjudged", ["reference"]),
    ]


def test_where_this_job_has_gpus_the_meta_stage_judges_itself(folder: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    unjudge(folder)
    folder.campaign.round("r0000").claim_attempt("a0")
    monkeypatch.setattr(judging.devices, "of_node", lambda *words: None)
    monkeypatch.setattr(judging.judge, "judge_once", lambda *words: pytest.fail("it judges"))
    with pytest.raises(pytest.fail.Exception, match="it judges"):
        meta.close(folder.campaign, folder)


def test_a_person_who_closes_the_round_asks_for_nothing(folder: Round) -> None:
    unjudge(folder)
    assert meta.close(folder.campaign, folder, by_person=True).state == "closed"
    assert events(folder, "judge_request", "unjudged") == []


def test_one_thing_that_cannot_be_judged_does_not_stop_the_rest(folder: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    def fail(*words: object) -> None:
        raise TrialFailed("judge_failed", "substrate.generate ended with exit code 1")

    monkeypatch.setattr(judging, "unjudged", lambda campaign, folder: ["reference", "submission 3"])
    monkeypatch.setattr(judging, "judge_reference", fail)
    monkeypatch.setattr(judging.local_board, "score", lambda campaign, number, stop: done.append(number))
    lines: list[str] = []
    assert judging.judge_left(folder.campaign, folder, lambda: False, lines.append) == ["reference"]
    assert done == [3]
    assert (
        lines[0].startswith("reference could not be judged: substrate.generate")
        and lines[1] == "submission 3 is judged"
    )


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([("judge_request", ["weather"])], "'weather' is nothing that a judge job judges"),
        ([("judge_request", [["reference"]])], "['reference'] is nothing that a judge job judges"),
        ([("unjudged", [[]])], "[] is nothing that a judge job judges"),
        ([("unjudged", [])], "it names nothing"),
        ([("judge_request", ["reference", "reference"])], "it names reference twice"),
        ([("judge_request", ["submission 99999"])], "submission 99999 is not reserved"),
        (
            [("judge_request", ["reference"]), ("judge_request", ["reference"])],
            "reference was asked for before",
        ),
        ([("unjudged", ["reference"])], "no judge job was asked for reference"),
    ],
)
def test_the_audit_knows_where_a_request_may_stand(
    folder: Round, records: list[tuple[str, list[str]]], words: str
) -> None:
    log = Log(folder.campaign.log)
    for event, what in records:
        log.append(event, round="r0001", what=what)
    report = Report()
    log_schema.check_records(log.records(), report)
    assert words in str(report.findings)


def rerun(folder: Round, *arms: str, dry_run: bool = False) -> list[str]:
    return control.rerun(folder.campaign, folder, arms, failed=False, dry_run=dry_run, watch=lambda: None)


def test_rerun_has_the_reference_judged_and_the_meta_job_again(folder: Round, slurm: SimpleNamespace) -> None:
    assert rerun(folder) == [] and slurm.calls == []
    unjudge(folder)
    assert rerun(folder, dry_run=True) == ["reference: one more job"] and slurm.calls == []
    assert rerun(folder) == ["reference: job 08"]
    (call,) = slurm.calls
    assert (call.arrays, call.reference[0], call.meta[0]) == ([], "reference", "meta")
    assert (call.requests["reference"].gpus, call.requests["meta"].gpus) == (1, 0)
    (line,) = read_json_lines(folder.jobs)
    assert (line["tasks"], line["meta"], line["why"]) == ({"reference": "08"}, "09", "rerun")


def test_rerun_of_arms_brings_the_reference_only_where_no_job_of_it_waits_or_runs(
    folder: Round, slurm: SimpleNamespace
) -> None:
    unjudge(folder)
    folder.published("a3").unlink()
    assert rerun(folder, "a3") == ["r0001/a3: job 070_0"]
    assert slurm.calls[-1].reference is None
    assert rerun(folder) == ["r0001/a3: job 170_0", "reference: job 18"]
    for number, state in enumerate(
        ("PENDING", "RUNNING", "UNKNOWN", "PREEMPTED"), start=2
    ):  # the last two may come back
        slurm.states["18"] = state
        assert rerun(folder) == [f"r0001/a3: job {number}70_0"]
        assert slurm.calls[-1].reference is None


def test_resources_of_a_round_are_those_of_its_frozen_file(folder: Round) -> None:
    assert {role: request.gpus for role, request in launch.resources(folder).requests.items()} == {
        "worker": 2, "reference": 1, "judge": 1, "meta": 0,
    }  # fmt: skip


def test_a_local_board_on_a_site_with_gpus_is_taken_at_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*OVERRIDES, *GPUS, "external=local", "external.rows=6", "parallelism.judge_tp=1"]
    assert main(["round", str(tmp_path / "boarded"), *overrides, "--dry-run", "--json"]) == 0
    texts = json.loads(capsys.readouterr().out)["sbatch"]
    assert "#SBATCH --gpus-per-node=1\n" in texts["judge.sbatch"] and "gpus" not in texts["meta.sbatch"]


def test_the_local_boards_submissions_go_to_the_judge_job_and_their_scores_into_the_decision(
    boarded: Round, slurm: SimpleNamespace
) -> None:
    campaign = boarded.campaign
    with pytest.raises(
        JudgeWanted, match=r"not judged yet \(submission 1, submission 2, submission 3\), judging needs a GPU"
    ):
        meta.close(campaign, boarded)
    ids = judging.submit(campaign, boarded)
    assert ids is not None and ids["judges"] == SUBMISSIONS
    sent = board_submissions.submissions_in(Log(campaign.log).records())
    assert {each.state for each in sent} == {"reserved"}, "nothing was sent, so nothing failed"
    # The judge job judged it; the second meta job's board gives the stored score without a GPU.
    for each in sent:
        folder = campaign.board_dir / f"{each.number:04d}"
        folder.mkdir(parents=True)
        score = {"number": each.number, "adapter_digest": each.adapter_digest, "score": "0.50"}
        (folder / "score.json").write_bytes(canonical.encoded(score))
    assert meta.close(campaign, boarded).state == "decided"
    known = board_submissions.submissions_in(Log(campaign.log).records())
    assert [(each.state, each.printed) for each in known] == [("scored", "0.50")] * 3, known[0].why


def test_a_dead_judge_job_leaves_the_round_without_a_board_score(boarded: Round, slurm: SimpleNamespace) -> None:
    campaign = boarded.campaign
    with pytest.raises(JudgeWanted):
        meta.close(campaign, boarded)
    judging.submit(campaign, boarded)
    assert meta.close(campaign, boarded).state == "decided"
    known = board_submissions.submissions_in(Log(campaign.log).records())
    assert all(each.state == "failed" and each.why.startswith("local_board: ") for each in known)
    assert events(boarded, "judge_request", "unjudged") == [
        ("judge_request", SUBMISSIONS), ("unjudged", SUBMISSIONS),
    ]  # fmt: skip


def test_a_submission_that_could_not_be_judged_costs_no_judge_job_in_a_later_round(
    boarded: Round, slurm: SimpleNamespace
) -> None:
    campaign = boarded.campaign
    with pytest.raises(JudgeWanted):
        meta.close(campaign, boarded)
    judging.submit(campaign, boarded)
    assert meta.close(campaign, boarded).state == "decided"
    overrides = [*OVERRIDES, *GPUS, "external=local", "external.rows=6", "external.submissions=1"]
    second = freeze.freeze(campaign, "r0002", overrides)
    publish_reference(campaign, second)
    for number in range(8):
        publish(second, f"a{number}", 15 + number, adapter_digest=f"{number + 8:x}" * 64)
    with pytest.raises(JudgeWanted, match=r"r0002 is not judged yet \(submission 4\)"):
        meta.close(campaign, second)
    ids = judging.submit(campaign, second)
    assert ids is not None and ids["judges"] == ["submission 4"]
    assert meta.close(campaign, second).state == "decided"
    report = Report()
    assert log_schema.check_records(Log(campaign.log).records(), report) and not report.findings


def test_an_earlier_meta_job_leaves_the_round_to_the_one_after_a_waiting_reference_job(
    folder: Round, slurm: SimpleNamespace
) -> None:
    unjudge(folder)
    assert rerun(folder) == ["reference: job 08"]
    slurm.states |= {"08": "PENDING", "09": "PENDING"}
    with pytest.raises(WorkFailed, match="reference job 08 of r0001 is pending, and meta job 09 decides after it"):
        meta.close(folder.campaign, folder)
    slurm.states["09"] = "CANCELLED"
    with pytest.raises(WorkFailed, match="meta job 09 has ended, so run the meta stage again after it"):
        meta.close(folder.campaign, folder)
    assert events(folder, "judge_request", "unjudged") == []
    slurm.states["08"] = "FAILED"
    with pytest.raises(JudgeWanted):
        meta.close(folder.campaign, folder)


def test_what_somebody_types_as_asked_for_and_nobody_asked_for_is_not_believed(folder: Round) -> None:
    unjudge(folder)
    with pytest.raises(JudgeWanted):
        meta.close(folder.campaign, folder, asked=["reference", "submission 1"])
    assert events(folder, "judge_request", "unjudged") == [("judge_request", ["reference"])]


def test_a_reference_file_that_was_lost_after_its_outcome_was_logged_is_named(folder: Round) -> None:
    judged = (folder.folder / "reference.h5").read_bytes()
    folder.published("a0").rename(folder.folder / "kept")
    for number in range(1, 4):  # below the quorum, so the round stays open
        folder.published(f"a{number}").unlink()
    assert meta.close(folder.campaign, folder).state == "undecided"
    unjudge(folder)
    with pytest.raises(IntegrityError, match="reference.h5 is missing, although the log has its outcome"):
        meta.close(folder.campaign, folder)
    assert events(folder, "judge_request", "unjudged") == []
    (folder.folder / "reference.h5").write_bytes(judged)
    assert meta.close(folder.campaign, folder).state == "undecided"


def test_close_says_that_a_round_without_a_standing_recipe_needs_the_reference(
    folder: Round, slurm: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    close = ["close", str(folder.campaign.folder), "--dry-run"]
    assert main(close) == 0 and "the round would be decided" in capsys.readouterr().out
    unjudge(folder)
    assert main(close) == 0
    said = capsys.readouterr().out
    assert "nothing would be decided, because the reference" in said and "pipeline rerun" in said
    assert "the round would be decided" not in said
    assert meta.close(folder.campaign, folder, by_person=True).state == "closed"
    report = Report()
    assert log_schema.check_records(Log(folder.campaign.log).records(), report) and not report.findings


def test_an_outcome_that_nobody_was_asked_for_is_found(folder: Round) -> None:
    log = Log(folder.campaign.log)
    missing = {"arm": "reference", "role": "reference", "status": "absent", "exit_class": "not_judged"}
    log.append("outcome", round="r0001", arm="reference", outcome=missing)
    report = Report()
    log_schema.check_records(log.records(), report)
    assert "nobody was asked to judge it" in str(report.findings)
    log.append("judge_request", round="r0001", what=["reference"])
    log.append("outcome", round="r0001", arm="reference", outcome=missing | {"status": "completed", "exit_class": ""})
    log.append("unjudged", round="r0001", what=["reference"])
    log.append("outcome", round="r0001", arm="reference", outcome=missing)
    report = Report()
    log_schema.check_records(log.records(), report)
    assert ["reference has its score" in found.what for found in report.findings] == [False, True, True]


def test_a_meta_job_records_the_submission_that_it_belongs_to(
    folder: Round, slurm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain that submitted it was killed before its record: nothing of it is asked for, or cancelled, again."""
    monkeypatch.setattr(slurm_submit, "keep", lambda place, mark: (place / "submissions" / f"{mark}.open").unlink())
    unjudge(folder)
    with pytest.raises(JudgeWanted):
        meta.close(folder.campaign, folder)
    assert judging.requested(folder.campaign, folder) == ["reference"]
    mark = folder.slurm_dir / "submissions" / "5f0c.open"
    mark.parent.mkdir(parents=True)
    mark.touch()
    monkeypatch.setenv("POSTRAIN_TAKEN_BACK", str(mark.with_suffix(".taken_back")))
    monkeypatch.setenv("SLURM_JOB_ID", "09")
    for _ in range(2):
        judging.record_own(folder, ["reference"])
    (line,) = read_json_lines(folder.jobs)
    assert (line["meta"], line["why"], line["ids"]) == ("09", "found", {"submission": "5f0c", "judges": ["reference"]})
    assert judging.submit(folder.campaign, folder) is None and slurm.calls == []
    assert not mark.exists()


def test_a_round_goes_on_where_no_judge_job_can_be_submitted(
    folder: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"
    script = f'echo "$*" >> {calls}; case "$*" in *--asked*) exit 0;; esac; exit 1'
    monkeypatch.setattr(stage_command, "command", lambda stage: ["/bin/sh", "-c", script, *stage])
    unjudge(folder)
    with pytest.raises(JudgeWanted):
        meta.close(folder.campaign, folder)

    def refuse(*words: object, **options: object) -> None:
        raise SlurmRefused("sbatch refused judge: Invalid partition")

    monkeypatch.setattr(slurm_submit, "submit", refuse)
    assert main(["chain", str(folder.campaign.folder), "--round", "r0001", "--meta"]) == 0
    assert calls.read_text().splitlines()[1].endswith("r0001 --no-pages --asked=reference")
    assert "no judge job is submitted, and the round goes on without what it would judge" in capsys.readouterr().out
