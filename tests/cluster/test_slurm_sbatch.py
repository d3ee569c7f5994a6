"""Test that no submission is lost or started twice, with an sbatch that takes jobs and says something else."""

import re
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.cluster import slurm_answers, slurm_sbatch, slurm_submit
from pipeline.cluster.slurm_clients import Output
from tests.support.resources import SMALL

CODE = Path("/campaigns/demo/code")
ARRAYS = [[("worker", "/campaigns/demo", "r0001", f"a{n}") for n in range(8)]]
META = ("meta", "/campaigns/demo", "r0001")


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def submit(tmp_path: Path) -> dict[str, object]:
    return slurm_submit.submit(tmp_path / "slurm", CODE, ARRAYS, META, SMALL)


TIMED_OUT = (
    'take; echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
)


def test_case_04_a_job_that_slurm_took_without_saying_so_is_adopted(cluster, tmp_path: Path) -> None:
    folder = cluster(TIMED_OUT)
    ids = submit(tmp_path)
    assert (ids["array_job_ids"], ids["meta_job_id"]) == (["101"], "102") and not lines(folder / "cancelled")
    assert ids["task_job_ids"] == [[f"101_{n}" for n in range(8)]]
    assert (tmp_path / "slurm" / "101_7_submitted.pkl").exists() and (tmp_path / "slurm" / "102_submission.sh").exists()


@pytest.mark.parametrize(
    "said",
    ["echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", "exit 1", "exit 0", "kill -9 $$"],
)
def test_case_04_other_ways_to_take_a_job_in_silence(cluster, tmp_path: Path, said: str) -> None:
    cluster(f"take; {said}")
    assert submit(tmp_path)["array_job_ids"] == ["101"]


def test_case_04_a_hanging_sbatch(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_sbatch, "SBATCH_SECONDS", 0.3)
    cluster("take; exec sleep 5")
    assert submit(tmp_path)["meta_job_id"] == "102"


def test_case_04_what_a_refused_round_left_is_cancelled_and_would_refuse_to_work(cluster, tmp_path: Path) -> None:
    refusal = '{ echo "sbatch: warning: x" >&2; echo "sbatch: error: Invalid account" >&2; exit 1; }'
    folder = cluster(f'[ $count = 102 ] && {refusal}; take; echo "Submitted batch job $count"')
    with pytest.raises(
        WorkFailed, match="sbatch refused .*: sbatch: warning: x; sbatch: error: Invalid account. Check `sinfo`"
    ):
        submit(tmp_path)
    assert set(lines(folder / "cancelled")) == {"101"} and not lines(folder / "queue")
    (path,) = (tmp_path / "slurm" / "submissions").glob("*.taken_back")
    script = (tmp_path / "slurm" / "101_submission.sh").read_text()
    assert f"export POSTRAIN_TAKEN_BACK={path}\n" in script


def test_case_04_a_job_of_a_submission_taken_back_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "5f.taken_back").touch()
    monkeypatch.setenv("POSTRAIN_TAKEN_BACK", str(tmp_path / "5f.taken_back"))
    with pytest.raises(SystemExit) as stop:
        slurm_submit.run_stage("worker", "/nowhere", "r0001", "a0")
    assert stop.value.code == WorkFailed.exit_code and "was taken back" in capsys.readouterr().err


def test_case_04_jobs_of_a_process_that_was_killed_before_it_recorded_them_are_cancelled_by_the_next(
    cluster, tmp_path: Path, capsys
) -> None:
    folder = cluster('take; echo "Submitted batch job $count"')
    first = submit(tmp_path)  # killed here: nobody recorded the ids
    second = submit(tmp_path)
    assert second["array_job_ids"] == ["103"] and set(lines(folder / "cancelled")) == {"101", "102"}
    assert "cancelled 101, 102: jobs of a submission that was cut short" in capsys.readouterr().err
    slurm_submit.keep(tmp_path / "slurm", str(second["submission"]))
    third = submit(tmp_path)  # killed after it was recorded, before `keep`
    slurm_submit.submit(tmp_path / "slurm", CODE, ARRAYS, META, SMALL, recorded=[str(third["submission"])])
    assert set(lines(folder / "cancelled")) == {"101", "102"}
    assert (tmp_path / "slurm" / "submissions" / f"{first['submission']}.taken_back").exists()


BANNER = 'take; echo "Your account 4711 used job 12 of 900 hours."; echo "Submitted batch job $count"; echo "See job 77 at https://x/13"'


@pytest.mark.parametrize(
    "said",
    [
        BANNER, 'take; echo "$count"', 'take; echo "$count;alpha"', 'take; echo "Submitted batch job $count on cluster alpha"',
        'take; echo "Submitted batch job $count"; echo 900', 'take; echo "job 7 is fine"', 'echo 900; take; echo "Submitted batch job $count"',
    ],
)  # fmt: skip
def test_case_05_a_banner_never_gives_the_id(cluster, tmp_path: Path, said: str) -> None:
    cluster(said)
    assert (submit(tmp_path)["array_job_ids"], submit(tmp_path)["meta_job_id"]) == (["101"], "104")


def test_case_05_an_id_of_another_name_is_refused(cluster, tmp_path: Path) -> None:
    folder = cluster('echo "7|somebody-else|" >> $(dirname $0)/queue; echo "Submitted batch job 7"')
    with pytest.raises(WorkFailed, match="no line is the id of a job named demo-r0001-arms"):
        submit(tmp_path)
    assert lines(folder / "queue") == ["7|somebody-else|"]  # it is not ours to cancel


def test_case_05_where_slurm_cannot_be_asked_a_clean_line_is_believed() -> None:
    assert slurm_answers.parse_sbatch("banner 1\nSubmitted batch job 41\n") == "41"
    assert slurm_answers.parse_sbatch("Submitted batch job 41 by you, job 3\n") == ""
    assert slurm_sbatch.job_of("demo", "mark", Output("Submitted batch job 41\n")) == "41"


@pytest.mark.parametrize("name", ["my runs %j", "50%", "%", "new\nline", "tab\t", "back\\slash", "bell\a"])
def test_case_14_a_path_that_slurm_would_read_otherwise_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="which Slurm would read as something else. Move the campaign"):
        slurm_submit.check_names([Path("/data") / name], "demo-r0001")


@pytest.mark.parametrize(
    "name", ["demo", "München", "a.b_c-d+e=f@g", "with,comma", "my runs", "o'd \"q", "$HOME", "a;b&c", "#x", "a*"]
)
def test_case_14_other_paths_pass(name: str) -> None:
    slurm_submit.check_names([Path("/data") / name], "demo-r0001")


def test_case_14_a_comma_in_a_job_s_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("'a,b-r0001' holds ','")):
        slurm_submit.check_names([Path("/data/x")], "a,b-r0001")


def test_a_job_does_not_cancel_its_own_submission_although_nobody_recorded_it(
    cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cluster('take; echo "Submitted batch job $count"')
    first = submit(tmp_path)  # never kept
    mark = tmp_path / "slurm" / "submissions" / f"{first['submission']}.taken_back"
    monkeypatch.setenv("POSTRAIN_TAKEN_BACK", str(mark))
    submit(tmp_path)
    assert not lines(folder / "cancelled") and not mark.exists()
    monkeypatch.delenv("POSTRAIN_TAKEN_BACK")
    submit(tmp_path)
    assert set(lines(folder / "cancelled")) >= {"101", "102"} and mark.exists()
