"""Test submission without Slurm: the recorded sbatch texts, a stand-in sbatch, and stages as local processes."""

import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.campaign.errors import NotFound, WorkFailed
from pipeline.cluster import local_runner, sbatch_parameters, slurm_clients, slurm_submit, stage_command
from pipeline.sandbox.devices import NodeDevices
from tests.support.paths import GOLDEN, ROOT
from tests.support.resources import CPU, SMALL

RECORDED = GOLDEN / "sbatch.txt"
FOLDER, CODE = Path("/runs/demo/rounds/r0001/slurm"), Path("/runs/demo/code/0123456789abcdef")
ARRAYS = [[("worker", "/runs/demo", "r0001", f"a{n}") for n in range(8)],
          [("worker", "/runs/demo", "r0000", f"a{n}") for n in range(2)]]  # fmt: skip
META = ("meta", "/runs/demo", "r0001")
REFERENCE = ("reference", "/runs/demo", "r0001")
GPU = replace(
    CPU,
    partition="gpu",
    account="lab",
    gpus_per_node=8,
    gpus=8,
    gpu_type="h200",
    cpus_per_task=64,
    mem="900G",
    time_limit_minutes=240,
)
LARGE = sbatch_parameters.Resources(
    "big-r0001", {"worker": GPU, "reference": replace(GPU, gpus=2), "judge": replace(GPU, gpus=4), "agent": replace(GPU, gpus=1),
     "meta": replace(CPU, partition="cpu", account="lab", mem="16G")},
    600, nodes=2, arms_at_once=4, setup=("module load cuda",),
)  # fmt: skip
STAND_IN = """#!/bin/sh
count=$(($(cat {folder}/count 2>/dev/null || echo 100) + 1))
echo $count > {folder}/count
env > {folder}/$count.env
cp "$1" {folder}/$count.sh
[ $count = {refused} ] && {{ echo "sbatch: error: Invalid account" >&2; exit 1; }}
echo "Submitted batch job $count"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A PATH whose sbatch records what it is given; called with a job number, it refuses that one."""
    folder = tmp_path / "cluster"
    folder.mkdir()

    def install(refused: int = 0) -> Path:
        programs = {"sbatch": STAND_IN.format(folder=folder, refused=refused), "srun": "#!/bin/sh\n",
                    "scontrol": "#!/bin/sh\nexit 1\n", "squeue": "#!/bin/sh\necho 'ARRAY_JOB_ID|COMMENT'\n",
                    "scancel": f'#!/bin/sh\necho "$@" > {folder}/cancelled\n'}  # fmt: skip
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")
        return folder

    return install


@pytest.fixture
def code_dir(tmp_path) -> Path:
    """Frozen code whose every stage runs the Python text that stands where the campaign's folder would."""
    package = tmp_path / "code" / "pipeline"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import os, sys, time, signal\nfrom pathlib import Path\nexec(sys.argv[2])\n")
    return package.parent


def arms(*texts: str) -> list[stage_command.Stage]:
    return [("worker", text, "r0001", f"a{number}") for number, text in enumerate(texts)]


def test_the_sbatch_text_is_the_recorded_one():
    """Two clusters, what a CPU site and a GPU site are given."""
    text = "".join(
        f"=== {resources.job_name} {name}\n{body}\n"
        for resources in (SMALL, LARGE)
        for name, body in sbatch_parameters.sbatch_texts(FOLDER, CODE, ARRAYS, resources).items()
    ).replace(shlex.quote(sys.executable), "PYTHON")
    if os.environ.get("RENEW_GOLDEN"):
        RECORDED.write_text(text)
    assert text == RECORDED.read_text(), (
        f"the text given to sbatch is not that of {RECORDED}; where that is meant, renew it with "
        "`RENEW_GOLDEN=1 python -m pytest tests/cluster/test_slurm_submit.py` and read the difference before committing"
    )


def test_a_judge_job_waits_for_nothing_and_the_meta_job_waits_for_it(stand_in, tmp_path):
    cluster = stand_in()
    judge, meta = ("judge", "/runs/demo", "r0001"), (*META, "--asked=reference")
    ids = slurm_submit.submit(tmp_path / "slurm", CODE, [], meta, LARGE, judge=judge)
    assert (ids["judge_job_id"], ids["meta_job_id"], ids["array_job_ids"]) == ("101", "102", [])
    texts = [(cluster / f"{number}.sh").read_text() for number in (101, 102)]
    assert "#SBATCH --gpus-per-node=h200:4\n" in texts[0] and "--dependency" not in texts[0]
    assert "#SBATCH --job-name=big-r0001-judge\n" in texts[0]
    assert "#SBATCH --dependency=afterany:101\n" in texts[1] and "gpus" not in texts[1]


def test_the_server_of_the_agents_model_comes_first_and_nobody_waits_for_it(stand_in, tmp_path):
    cluster = stand_in()
    server = ("serve", "/runs/demo", "r0001", "a1=0", "a2=0")
    ids = slurm_submit.submit(tmp_path / "slurm", CODE, ARRAYS[:1], META, LARGE, server=server)
    assert (ids["agent_job_id"], ids["array_job_ids"], ids["meta_job_id"]) == ("101", ["102"], "103")
    texts = [(cluster / f"{number}.sh").read_text() for number in (101, 102, 103)]
    assert "#SBATCH --gpus-per-node=h200:1\n" in texts[0] and "#SBATCH --job-name=big-r0001-agent\n" in texts[0]
    assert "--dependency" not in texts[0] + texts[1] and "#SBATCH --dependency=afterany:102\n" in texts[2]
    assert stage_command.command(server)[-6:] == ["serve", "/runs/demo", "--round", "r0001", "a1=0", "a2=0"]


def test_where_sbatch_refuses_an_arm_the_server_is_cancelled_with_the_others(stand_in, tmp_path):
    cluster = stand_in(refused=102)
    with pytest.raises(WorkFailed, match="Invalid account"):
        slurm_submit.submit(tmp_path / "slurm", CODE, ARRAYS[:1], META, SMALL, server=("serve", "/runs/demo", "r0001"))
    assert "101" in (cluster / "cancelled").read_text().split()


def test_what_is_submitted_is_what_is_shown(stand_in, tmp_path):
    cluster = stand_in()
    folder = tmp_path / "slurm"
    ids = slurm_submit.submit(folder, CODE, ARRAYS, META, SMALL, REFERENCE)
    mark = ids.pop("submission")
    assert ids == {
        "kind": "slurm", "array_job_ids": ["101", "102"], "reference_job_id": "103", "judge_job_id": "", "agent_job_id": "", "meta_job_id": "104",
        "task_job_ids": [[f"101_{n}" for n in range(8)], ["102_0", "102_1"]],
    }  # fmt: skip
    shown = sbatch_parameters.sbatch_texts(folder, CODE, ARRAYS, SMALL)
    waits = {"reference": "102", "meta": "101:102:103"}
    for number, name in ((101, "array_0"), (102, "array_1"), (103, "reference"), (104, "meta")):
        given, expected = (set(text.split("\n")) for text in ((cluster / f"{number}.sh").read_text(), shown[name]))
        (comment,) = (line for line in given if line.startswith(f"#SBATCH --comment=submission={mark}."))
        directives = {line for line in given ^ expected if line.startswith("#SBATCH")} - {comment}
        shown_waits = {"reference": "<id of array_1>", "meta": "<ids of the arrays and of the reference job>"}
        assert directives == ({f"#SBATCH --dependency='afterany:{shown_waits[name]}'", f"#SBATCH --dependency=afterany:{waits[name]}"}
                              if name in waits else set())  # fmt: skip
        assert {line for line in expected if line.startswith("export")} <= given


def test_a_round_is_submitted_whole_or_not_at_all(stand_in, tmp_path):
    for refused, cancelled in ((101, None), (102, "101"), (103, "101 102"), (104, "101 102 103")):
        cluster = stand_in(refused)
        with pytest.raises(WorkFailed, match="sbatch refused .*Invalid account. Check `sinfo`"):
            slurm_submit.submit(tmp_path / "slurm", CODE, ARRAYS, META, SMALL, REFERENCE)
        record = cluster / "cancelled"
        assert (record.read_text().strip() if record.exists() else None) == cancelled
        (cluster / "count").unlink()


def test_the_caller_s_slurm_variables_and_secrets_do_not_leak(stand_in, tmp_path, monkeypatch):
    for name in (
        "SBATCH_PARTITION",
        "SLURM_JOB_ID",
        "SRUN_DEBUG",
        "CUDA_VISIBLE_DEVICES",
        "POSTRAIN_GPUS",
        "HF_TOKEN",
        "KAGGLE_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
    ):
        monkeypatch.setenv(name, "of-the-caller")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    before = dict(os.environ)
    cluster = stand_in()
    before["PATH"] = os.environ["PATH"]
    slurm_submit.submit(tmp_path / "slurm", CODE, ARRAYS[:1], META, SMALL)
    seen = (cluster / "101.env").read_text()
    written = [path.read_bytes() for path in (tmp_path / "slurm").iterdir() if path.is_file()]  # texts and pickles
    assert "of-the-caller" not in seen and written
    assert not any(b"of-the-caller" in content for content in written)
    assert "SLURM_CONF=/etc/slurm/slurm.conf" in seen
    assert dict(os.environ) == before


def test_the_environment_comes_back_after_an_error(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(RuntimeError), slurm_submit.clean_environment():
        assert "SLURM_JOB_ID" not in os.environ
        os.environ["NEW"] = "inside"
        raise RuntimeError
    assert os.environ["SLURM_JOB_ID"] == "7"
    assert "NEW" not in os.environ


def test_without_sbatch_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFound, match="sbatch and srun are not on PATH. Run on a login node, or use cluster=local"):
        slurm_submit.submit(tmp_path / "slurm", CODE, ARRAYS, META, SMALL)
    assert not (tmp_path / "slurm").exists()
    assert slurm_clients.controller_answers() is False
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm_submit.requeue_this_job() == "forbidden"


def test_a_failed_stage_does_not_stop_the_others(code_dir, tmp_path):
    stages = arms("raise SystemExit(3)", "print('worked')", "os.kill(os.getpid(), 9)", "raise SystemExit(75)", "")
    calls: list[float] = []
    codes = local_runner.run_local(stages, code_dir, 2, tmp_path / "logs", lambda: calls.append(time.monotonic()))
    assert codes == {"r0001_a0": 3, "r0001_a1": 0, "r0001_a2": -9, "r0001_a3": 75, "r0001_a4": 0}
    assert (tmp_path / "logs" / "r0001_a1.log").read_text() == "worked\n"
    assert calls


def test_as_many_stages_run_side_by_side_as_are_allowed(code_dir, tmp_path):
    running = tmp_path / "running"
    running.mkdir()
    text = f"""
me = Path({str(running)!r}, str(os.getpid())); me.touch()
time.sleep(0.3)
print(len(list(me.parent.iterdir())), flush=True)
me.unlink()"""
    local_runner.run_local(arms(*[text] * 5), code_dir, 2, tmp_path / "logs")
    seen = [int(path.read_text()) for path in (tmp_path / "logs").iterdir()]
    assert len(seen) == 5
    assert max(seen) == 2


def test_arms_that_run_at_the_same_time_on_one_machine_have_gpus_of_their_own(code_dir, tmp_path):
    running = tmp_path / "running"
    running.mkdir()
    text = f"""
me = Path({str(running)!r}, os.environ["POSTRAIN_GPUS"])
me.touch(exist_ok=False)
time.sleep(0.2)
me.unlink()"""
    shares = local_runner.shared_out(NodeDevices(gpus=(1, 2, 4, 5, 7), env={"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}), 2, 8)
    codes = local_runner.run_local(arms(*[text] * 5), code_dir, 2, tmp_path / "logs", gpus=shares)
    assert shares == ["1,2", "4,5"] and local_runner.gpus_by_arm(0, 0) == []
    assert list(codes.values()) == [0] * 5


def test_logs_of_an_earlier_run_are_kept(code_dir, tmp_path):
    for word in ("first", "second"):
        local_runner.run_local([("meta", f"print({word!r})", "r0001")], code_dir, 1, tmp_path / "logs")
    assert (tmp_path / "logs" / "meta.log").read_text() == "first\nsecond\n"


def test_a_stage_runs_from_the_frozen_code_alone(code_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where another package `pipeline` is
    local_runner.run_local([("meta", "print(sys.path[0], __file__)", "r0001")], code_dir, 1, tmp_path / "logs")
    assert (tmp_path / "logs" / "meta.log").read_text() == f"{code_dir} {code_dir / 'pipeline' / '__main__.py'}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_when_the_round_is_stopped_every_running_stage_is_ended_first(code_dir, tmp_path, number):
    text = f"""
signal.signal(signal.SIGTERM, lambda *_: (Path({str(tmp_path)!r}, 'saved-' + sys.argv[5]).touch(), sys.exit(75)))
Path({str(tmp_path)!r}, 'up-' + sys.argv[5]).touch()
time.sleep(60)"""
    program = f"""
from pathlib import Path
from pipeline.cluster.local_runner import run_local
run_local({arms(text, text, text)!r}, Path({str(code_dir)!r}), 2, Path({str(tmp_path / "logs")!r}))"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("up-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, words = process.communicate(timeout=30)
    assert words.strip().endswith(b"KeyboardInterrupt")
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-a0", "saved-a1"]


def test_a_signal_that_comes_where_python_swallows_exceptions_is_not_lost(code_dir, tmp_path):
    """SIGTERM while a weakref callback runs: what a handler raises there never reaches the loop."""

    class Thing:
        pass

    def watch() -> None:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        assert reference() is None

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        local_runner.run_local(arms("time.sleep(60)"), code_dir, 1, tmp_path / "logs", watch)
    assert time.monotonic() - began < 30
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def job(code_dir: Path, text: str, **environment: str) -> subprocess.Popen[bytes]:
    """A process that does what submitit does inside a job."""
    program = "import sys; from pipeline.cluster.slurm_submit import run_stage; run_stage('worker', sys.argv[1], 'r0001', 'a0')"
    return subprocess.Popen(
        [sys.executable, "-c", program, text],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(code_dir), **environment},
        stdout=subprocess.PIPE,
    )


@pytest.mark.parametrize("code", [0, 1, 4])
def test_a_job_ends_with_the_code_of_its_stage(code_dir, code):
    with job(code_dir, f"raise SystemExit({code})") as process:
        assert process.wait(timeout=30) == code


def test_a_signal_to_the_job_reaches_the_stage_and_an_interrupted_stage_is_requeued(code_dir, tmp_path):
    controller(tmp_path)
    text = "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    process = job(code_dir, text, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="41")
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=30) == 75
    assert (tmp_path / "asked").read_text() == "requeue 41\n"


def controller(folder: Path, state: str = "RUNNING", reason: str = "None", refused: int = 0) -> None:
    """A stand-in scontrol that knows the job so, and writes down what it is asked to do."""
    text = f"""#!/bin/sh
[ "$2" = show ] && echo "JobId=41 JobName=arms JobState={state} Reason={reason} Requeue=1 Restarts=0" && exit
echo "$@" > {folder}/asked
exit {refused}
"""
    (folder / "scontrol").write_text(text)
    (folder / "scontrol").chmod(0o755)


@pytest.mark.parametrize(
    ("state", "reason", "end"),
    [("COMPLETING", "None", "ended"), ("PENDING", "BeginTime", "ended"), ("COMPLETING", "TimeLimit", "requeued")],
)
def test_a_job_that_somebody_cancelled_or_requeued_is_left_so(code_dir, tmp_path, state, reason, end, monkeypatch):
    controller(tmp_path, state, reason)
    with job(code_dir, "sys.exit(75)", PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="41") as process:
        assert process.wait(timeout=30) == 75
    assert (tmp_path / "asked").exists() == (end == "requeued")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert slurm_submit.requeue_this_job() == end


@pytest.mark.parametrize(("refused", "task", "continued"), [(1, "0", True), (0, "0", False), (1, "1", False)])
def test_where_requeueing_is_refused_the_first_task_has_another_job_go_on(code_dir, tmp_path, refused, task, continued):
    controller(tmp_path, refused=refused)
    text = f"Path({str(tmp_path)!r}, sys.argv[1]).write_text(' '.join(sys.argv[3:])); sys.exit(75)"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_PROCID": task}
    with job(code_dir, text, **environment) as process:
        assert process.wait(timeout=30) == 75
    assert (tmp_path / "rerun").exists() == continued
    if continued:
        assert (tmp_path / "rerun").read_text() == "--round r0001 a0"


def test_the_name_of_this_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_submit.this_job() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert slurm_submit.this_job() == "41"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_submit.this_job() == "40_3"


def test_the_last_task_of_an_array_requeues_itself_and_not_the_array(tmp_path, monkeypatch):
    """Of that task SLURM_JOB_ID is the id of the whole array."""
    text = f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
[ "$2" = show ] && echo "JobId=41 ArrayJobId=40 ArrayTaskId=0 JobName=arms JobState=COMPLETED Reason=None" &&
    echo "JobId=40 ArrayJobId=40 ArrayTaskId=3 JobName=arms JobState=RUNNING Reason=None"
exit 0
"""
    (tmp_path / "scontrol").write_text(text)
    (tmp_path / "scontrol").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/bin:/usr/bin",
        "SLURM_JOB_ID": "40",
        "SLURM_ARRAY_JOB_ID": "40",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert slurm_submit.requeue_this_job() == "requeued"
    assert (tmp_path / "asked").read_text().splitlines() == ["--oneliner show job 40_3", "requeue 40_3"]
