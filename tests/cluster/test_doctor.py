"""Test `doctor` on a stand-in site: what it checks there, and that it names every fault with a cure."""

import errno
import os
import re
import subprocess

import pytest

from pipeline.campaign import shared_path
from pipeline.cluster import doctor, sandbox_check, site_check, slurm_clients
from pipeline.config import settings
from pipeline.sandbox import runtime_needs
from tests.support.campaigns import changed_byte, fresh_campaign

CONFIG = """Configuration data as of 2026-11-24T04:00:00
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = here
JobRequeue              = {requeue}
MaxArraySize            = {size}
SLURM_VERSION           = 22.05.8
"""
SITE = ["cluster=slurm", "experiment=smoke", "cluster.gpus_per_node=0"]
HEALTHY = {"seen": "seen", "clock": "100.5", "runtime": "Python 3.11.7", "absent": "", "fuse": "open", "namespaces": "open",
           "bytes": str(2**40), "kind": "xfs", "gpus": "8", "errors": "0 0 0 0 0 0 0 0", "end": "n7"}  # fmt: skip


@pytest.fixture(autouse=True)
def no_rehearsal(monkeypatch):
    """test_sandbox_check.py plays the sandbox; here that would take half a second each time."""
    monkeypatch.setattr(
        sandbox_check, "examine", lambda chosen: [site_check.Check("sandbox: network", "good", "played")]
    )


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Programs of a site whose node is this machine; called with what is wrong with it."""

    def install(
        requeue="1", size="1001", partitions="main|1-00:00:00|8|gpu:8|up\n", srun=True, jobs="No jobs in the system", refuses=""
    ):  # fmt: skip
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "config").write_text(CONFIG.format(requeue=requeue, size=size))
        (folder / "partitions").write_text(partitions)
        for name, text in {
            "scontrol": f'case "$*" in ping) echo "Slurmctld(primary) at here is UP";; *job*) echo "{jobs}";; *) cat {folder}/config;; esac',
            "squeue": "echo 'JOBID|STATE|NODELIST|REASON|START_TIME'",
            "sacct": "echo 'JobID|State|NodeList|ExitCode|End'",
            "sinfo": f"cat {folder}/partitions",
            "sacctmgr": "echo here",
            "sbatch": f"""echo "$@" >> {folder}/asked
case "$*" in *"{refuses or "nothing"}"*) echo "allocation failure: Invalid feature specification" >&2; exit 1;; esac
echo "sbatch: Job 9 to start at 2026-11-28T10:00:00 using 2 processors on nodes n1 in partition main" >&2""",
            "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"' if srun else "exit 1",
        }.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.chdir(tmp_path)

    return install


def examined(*overrides, campaign=None):
    found = doctor.examine(settings.compose([*SITE, *overrides]), campaign)
    assert all(check.cure for check in found if check.verdict == "bad")
    return {check.name: check for check in found}


def test_case_03_doctor_shows_the_line_of_slurm_that_nobody_can_read(site):
    site(jobs="JobId=7 JobState=RUNNING\nslurm_load_jobs: the moon is full")
    (check,) = (check for check in examined().values() if check.name == "job states")
    assert (
        check.verdict == "bad"
        and "scontrol printed a line that cannot be read: slurm_load_jobs: the moon is full" in check.found
    )


def test_a_site_that_is_fit_has_nothing_bad(site, monkeypatch):
    for name in [name for name in os.environ if re.match("SBATCH_|SRUN_", name)]:
        monkeypatch.delenv(name)
    site()
    found = examined()
    assert [check for check in found.values() if check.verdict == "bad"] == []
    assert {"slurmctld", "MaxArraySize", "JobRequeue", "accounting", "time limit", "nodes", "shared file system", "clock skew",
            "runtime on a node", "mounts on a node", "user namespaces on a node", "scratch on a node", "disk", "scratch",
            "leaking variables", "secrets in the environment", "configuration",
            "sandbox: network", "file locks", "ignored variables"} <= set(found)  # fmt: skip
    assert found["runtime on a node"].found.startswith("Python 3")
    assert found["request of meta"].found.startswith("sbatch: Job 9 to start")


def test_sbatch_is_asked_about_each_request_and_nothing_is_submitted(site, tmp_path):
    site(partitions="main|1-00:00:00|8|gpu:h200:8(S:0-1)|up\ncpu|infinite|8|(null)|up\n")
    own = [
        "cluster.gpus_per_node=h200:2",
        "cluster.partition='main,cpu'",
        "+cluster.sbatch.exclusive=true",
        "cluster.meta.partition=cpu",
        "parallelism.judge_tp=1",
    ]
    found = examined(*own)
    assert {
        found[name].verdict
        for name in ("GPUs a node", "time limit", "time limit of meta", "request of worker", "request of meta")
    } == {"good"}
    assert {"runtime on a node", "runtime on a node of meta"} <= set(found)
    assert "request of judge" not in found  # it is the reference's
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert len(asked) == 3 and all(line.startswith("--test-only ") for line in asked)
    assert {"--gpus-per-node=h200:2", "--exclusive", "--partition=main,cpu", "--time=720"} <= set(asked[0].split())
    assert "--gpus-per-node=h200:1" in asked[1]
    assert "--partition=cpu" in asked[2] and "gpu" not in asked[2]


SHARED = ["cluster.gpus_per_node=8", "parallelism=tp2", "cluster.cpus_per_task=64"]  # two GPUs and 16 cores an arm
BIG = "main|1-00:00:00|2|gpu:8|up|{}|2000000\n"


@pytest.mark.parametrize(
    ("row", "config", "overrides", "arms", "nodes", "why"),
    [
        (BIG.format(64), "", ["cluster.mem=1600G"], 4, 2, "400 of 1,953 GiB of memory"),
        (BIG.format("64+"), "", ["cluster.mem=1600G"], 4, 2, "16 of 64 cores"),
        (BIG.format(64), "", [], 1, 8, "1,953 of 1,953 GiB of memory, the site's default"),
        (BIG.format(64), "DefMemPerCPU = 4000", [], 4, 2, "62 of 1,953 GiB of memory, the site's default"),
        (BIG.format(64), "DefMemPerNode = 900000", [], 2, 4, "879 of 1,953"),
        (BIG.format(64), "JobDefaults = DefCpuPerGPU=8,DefMemPerGPU=400000", [], 2, 4, "781 of 1,953"),
        (BIG.format(64), "SelectTypeParameters = CR_CORE", [], 4, 2, "2 of 8 GPUs, 16 of 64 cores$"),
        (BIG.format(32), "", ["cluster.mem=1600G"], 2, 4, "16 of 32 cores"),
        (BIG.format(64), "", ["cluster.mem=1600G", "+cluster.sbatch.exclusive=true"], 1, 8, "gives a job the whole node"),
        (BIG.format(64), "", ["cluster.mem=1600G", "+cluster.sbatch.exclusive=user"], 4, 2, "2 of 8 GPUs"),
        (BIG.format(64), "", ["cluster.mem=1600G", "parallelism=tp1"], 8, 1, "1 of 8 GPUs"),
        ("main|1-00:00:00|2|gpu:8|up\n", "", ["cluster.mem=1600G"], 4, 2, "2 of 8 GPUs$"),
    ],
)  # fmt: skip
def test_doctor_counts_the_arms_that_a_node_takes_and_the_nodes_of_a_round(
    site, tmp_path, row, config, overrides, arms, nodes, why
):
    site(partitions=row)
    (tmp_path / "bin" / "config").write_text(f"{CONFIG.format(requeue=1, size=1001)}{config}\n")
    chosen = settings.compose([*SITE, *SHARED, *overrides])
    found = {check.name: check for check in site_check.examine(chosen)}
    assert found["arms a node"].found.startswith(f"{arms}: ") and re.search(why, found["arms a node"].found)
    assert found["nodes"].found == f"2; an arm needs 1, all arms at once need {nodes}"
    fills = arms == 8 // chosen.cluster.gpus or chosen.cluster.is_exclusive
    assert found["arms a node"].verdict == ("good" if fills else "unknown")
    assert fills or "cluster.mem" in found["arms a node"].cure


def test_all_that_sbatch_complains_of_is_shown_and_bounded(site, tmp_path):
    site(refuses="--cpus-per-task=4 ")
    sbatch = tmp_path / "bin" / "sbatch"
    reason = (
        'echo "lua: your project may not use this partition" >&2; echo "lua: ask at help@site" >&2; echo "allocation'
    )
    sbatch.write_text(sbatch.read_text().replace('echo "allocation', reason))
    found = examined()["request of meta"]
    assert found.found == (
        "lua: your project may not use this partition; lua: ask at help@site; allocation failure: Invalid feature specification"
    )
    long = slurm_clients.Output("", failed=True, stderr="begin\n" + "word\n" * 9999 + "end\x1b[31m").complaint
    assert len(long) < 1100 and long.startswith("begin; word") and long.endswith("end?[31m")


@pytest.mark.parametrize(
    ("wrong", "overrides", "name", "verdict", "words"),
    [
        ({"size": "8"}, [], "MaxArraySize", "bad", "the site must allow 9"),
        ({"requeue": "0"}, [], "JobRequeue", "unknown", "`rerun` goes on from the checkpoint"),
        ({"partitions": "main|30:00|8|(null)|up\n"}, [], "time limit", "bad", "a lower cluster.time_limit_minutes"),
        ({"partitions": "main|1-00:00:00|8|gpu:4|up\n"}, ["cluster.gpus_per_node=8"], "GPUs a node", "bad", "as the nodes have them"),
        ({}, ["cluster.partition=gpu"], "partition", "bad", "cluster.partition="),
        ({}, ["cluster.meta.partition=cpu"], "partition of meta", "bad", "cluster.meta.partition="),
        ({"partitions": "main|1-00:00:00|8|gpu:8|up\ncpu|10:00|8|(null)|up\n"}, ["cluster.meta.partition=cpu"], "time limit of meta", "bad",
         "cluster.meta.time_limit_minutes"),
        ({"partitions": "main|1-00:00:00|8|gpu:a100:8(S:0-1),gpu:h200:2(S:0,1)|up\n"}, ["cluster.gpus_per_node=h200:4"], "GPUs a node", "bad",
         "as the nodes have them"),
        ({"partitions": "main|1-00:00:00|8|gpu:1g.5gb:1|up\n"}, ["cluster.gpus_per_node=2"], "GPUs a node", "bad", "as the nodes have them"),
        ({"refuses": "--constraint=a100|h100"}, ["cluster.constraint=a100|h100"], "request of worker", "bad", "cluster.partition, account"),
        ({"refuses": "--cpus-per-task=4 "}, [], "request of meta", "bad", "cluster.meta.partition"),
        ({}, ["external=command", "external.command=[score]", "external.timeout_seconds=7200"], "time of the meta job", "unknown",
         "cluster.meta.time_limit_minutes"),
        ({}, ["cluster.gpus_per_node=2", "cluster.judge.gpus=0", "parallelism.judge_tp=1"], "configuration", "bad", "cluster.judge.gpus=1"),
        ({}, ["cluster.runtime=[apptainer-of-the-site,exec,python3]"], "runtime on a node", "bad", "cluster.runtime"),
        ({}, ["cluster.scratch_dir=/absent"], "scratch on a node", "bad", "cluster.scratch_dir"),
        ({"srun": False}, [], "a node", "unknown", "the queue is full"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_site_has_its_name_and_cure(site, wrong, overrides, name, verdict, words):
    site(**wrong)
    check = examined(*overrides)[name]
    assert check.verdict == verdict and words in check.cure


@pytest.mark.parametrize(
    ("answers", "name", "verdict"),
    [
        ({"seen": ""}, "shared file system", "bad"),
        ({"clock": "97.9"}, "clock skew", "bad"),
        ({"clock": "103.1"}, "clock skew", "bad"),
        ({"runtime": "bash: python3: command not found"}, "runtime on a node", "bad"),
        ({"runtime": "Python 3.12.3 lacks h5py 3.0 (result files)"}, "runtime on a node", "bad"),
        ({"runtime": f"Python 3.12.3: torch 2.9.0; {runtime_needs.PLAIN_SCAN}"}, "kernel of the scan", "unknown"),
        (
            {"runtime": f"Python 3.12.3: torch 2.9.0; {runtime_needs.NO_COMPILER} gcc is gone; mamba-ssm 2.3"},
            "compiler for kernels",
            "unknown",
        ),
        ({"absent": "squashfuse "}, "mounts on a node", "unknown"),
        ({"fuse": "closed"}, "mounts on a node", "unknown"),
        ({"namespaces": "unshare: unshare failed: Operation not permitted"}, "user namespaces on a node", "bad"),
        ({"bytes": "1000"}, "scratch on a node", "bad"),
        ({"kind": "lustre"}, "scratch on a node", "bad"),
        ({"gpus": "1"}, "GPUs on a node", "unknown"),
        ({"errors": "0 0 0 2 0 0 0 0"}, "GPU health", "bad"),
    ],
)
def test_what_a_node_answers(answers, name, verdict):
    cluster = settings.compose(["cluster=slurm", "experiment=smoke"]).cluster
    well = {check.name: check for check in site_check.checks_of_answers(HEALTHY, cluster, 100, 101)}
    assert {check.verdict for check in well.values()} == {"good"}
    ill = {check.name: check for check in site_check.checks_of_answers(HEALTHY | answers, cluster, 100, 101)}
    assert ill.pop(name).verdict == verdict
    well.pop(name)
    if name == "runtime on a node":
        for unknown in ("kernel of the scan", "compiler for kernels"):  # where no runtime answers
            well.pop(unknown)
    assert {each: check.verdict for each, check in ill.items()} == {each: check.verdict for each, check in well.items()}


def test_the_runtime_s_words_are_filled_in_on_the_node(tmp_path):
    """And nothing else in them is the shell's."""
    program = tmp_path / "a program"
    program.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    program.chmod(0o755)
    overrides = ["cluster=slurm", "experiment=smoke", "cluster.setup=['export IMAGE=\"/shared/run time.sif\"']"]
    cluster = settings.compose(overrides).cluster
    cluster.runtime = [str(program), "$IMAGE", 'a "b" `c` \\d', "python3"]
    done = subprocess.run(
        ["bash", "-c", site_check.questions(cluster, tmp_path / "canary")], capture_output=True, text=True
    )
    asked = f'DOCTOR runtime=</shared/run time.sif><a "b" `c` \\d><python3><{runtime_needs.__file__}>\n'
    assert asked in done.stdout


def test_variables_that_leak_and_secrets_are_named_without_their_values(site, monkeypatch):
    site()
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    found = examined()
    assert (found["leaking variables"].verdict, found["leaking variables"].found) == ("bad", "SBATCH_PARTITION")
    assert "HF_TOKEN" in found["secrets in the environment"].found
    assert not any("hunter2" in check.found + check.cure for check in found.values())


def test_case_17_every_variable_that_the_pipeline_ignores_is_named(site, monkeypatch):
    """Whatever hides them: what jobs are submitted without, what questions to Slurm are asked without, what a stage sets itself."""
    site()
    for name in ("SBATCH_QOS", "SRUN_DEBUG", "SLURM_PARTITION", "SQUEUE_STATES", "SACCT_FORMAT", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS",
                 "MY_API_KEY", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "SOURCE_DATE_EPOCH"):  # fmt: skip
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("SLURM_CONF", "hunter2")
    found = examined()["ignored variables"]
    assert (found.verdict, "hunter2" in found.found, "SLURM_CONF" in found.found) == ("good", False, False)
    of_jobs, of_questions, of_stages = found.found.partition(" (")[0].split("; ")
    assert {"SBATCH_QOS", "SRUN_DEBUG", "SLURM_PARTITION", "MY_API_KEY", "AWS_SECRET_ACCESS_KEY"} <= set(
        re.findall(r"\w+", of_jobs)
    )
    assert set(re.findall(r"[A-Z_]{5,}", of_questions)) >= {
        "SQUEUE_STATES",
        "SACCT_FORMAT",
        "SLURM_TIME_FORMAT",
        "SLURM_CLUSTERS",
    }
    assert of_stages.endswith("PYTHONPATH, SOURCE_DATE_EPOCH")


def test_a_folder_whose_locks_keep_nobody_out_is_bad(site, monkeypatch):
    site()
    assert examined()["file locks"].verdict == "good"
    monkeypatch.setattr(shared_path.fcntl, "flock", lambda *_: None)  # as NFS mounted with `nolock`
    assert "at once" in examined()["file locks"].found

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(shared_path.fcntl, "flock", refuse)
    assert "-o flock" in examined()["file locks"].cure


def test_weights_that_are_not_in_the_image_are_asked_for(site):
    site()
    assert "weights_dir is empty" in examined("model.weights=base/weights.json")["base weights"].found
    assert "base weights" not in examined()


@pytest.mark.slow
def test_a_campaign_s_digests_are_checked(site, tmp_path):
    site()
    campaign = fresh_campaign(tmp_path)
    assert {
        examined(campaign=campaign)[name].verdict
        for name in ("frozen facts", "frozen code", "image", "frozen plans", "vault")
    } == {"good"}
    (changed,) = campaign.folder.glob("**/pipeline/decision/decide.py")
    with changed_byte(changed):
        assert examined(campaign=campaign)["frozen code"].verdict == "bad"
    with changed_byte(campaign.round("r0000").config):
        assert examined(campaign=campaign)["frozen plans"].verdict == "bad"
    campaign.vault.chmod(0o755)
    assert examined(campaign=campaign)["vault"].cure == f"chmod 700 {campaign.vault}"


def test_without_a_controller_the_site_is_one_bad_check(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path) + ":/usr/bin:/bin")
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    found = examined()
    assert "login node" in found["slurmctld"].cure and "a node" not in found


def test_an_arm_is_weighed_against_this_machine():
    def found(*overrides):
        return next(check for check in doctor.examine(settings.compose(overrides)) if check.name == "memory of an arm")

    assert found("experiment=demo").verdict == "good"
    large = found("cluster=local", "experiment=nano_30b")
    assert large.verdict == "bad" and "2 ranks need" in large.found and "plan-memory" in large.cure
