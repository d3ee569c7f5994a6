"""Case 11: every long option of sbatch(1) is known: refused, replaced by a key, or passed on; comments that sbatch reads are refused."""

from copy import deepcopy

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.config import settings
from pipeline.config.request_rules import INSTEAD, SET_HERE, TAKEN

# What sbatch(1) of Slurm 22.05 lists.
OPTIONS = """acctg-freq batch bb bbf cluster-constraint comment container contiguous cores-per-socket cpu-freq cpus-per-gpu deadline delay-boot
exclusive export export-file get-user-env gid gpu-bind gpu-freq gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint ignore-pbs
kill-on-invalid-dep mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-requeue ntasks-per-core
ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode parsable power prefer priority profile propagate reboot requeue reservation signal
sockets-per-node spread-job switches test-only thread-spec threads-per-core time-min tmp uid usage use-min-nodes wait-all-nodes wckey wrap
account extra-node-info constraint chdir nodefile gpus hold job-name licenses clusters nodes overcommit quiet core-spec version wait array begin
cpus-per-task dependency error help input no-kill ntasks output partition qos oversubscribe time verbose nodelist exclude distribution""".split()


def refusal(**changes: object) -> str:
    config = deepcopy(settings.compose(["cluster=slurm"]).to_dict())
    config["cluster"].update(changes)
    try:
        settings.typed(config)
    except ConfigError as error:
        return str(error)
    return ""


def test_case_11_every_option_of_sbatch_is_in_one_class():
    known = [*INSTEAD, *SET_HERE, *TAKEN]
    assert sorted(set(OPTIONS) - set(known)) == [] and len(known) == len(set(known))


@pytest.mark.parametrize(
    "name", ["tasks-per-node", "cluster-constraint", "hold", "uid", "gid", "no_kill", "chdir", "container", "verbose", "tasks_per_node", "workdir"]
)  # fmt: skip
def test_case_11_flags_with_which_a_job_would_not_run_as_planned_are_refused(name):
    assert "flags that the pipeline does not need itself" in refusal(sbatch={name: "1"})
    config = settings.compose(["cluster=slurm"]).to_dict()
    config["cluster"]["meta"]["sbatch"] = {name: True}
    with pytest.raises(ConfigError, match="cluster.meta.sbatch"):
        settings.typed(config)


@pytest.mark.parametrize(
    ("name", "long"),
    [
        ("ho", "hold"),
        ("tasks", "tasks-per-node"),
        ("cluster-c", "cluster-constraint"),
        ("gpus-per-t", "gpus-per-task"),
        ("exclud", "exclude"),
    ],
)
def test_case_11_shortened_flags_pass_no_rule(name, long):
    assert f"sbatch takes --{name} for --{long}" in refusal(sbatch={name: "1"})


def test_case_11_other_flags_and_those_of_plugins_are_given_as_they_are():
    one = {
        "bb": "x",
        "begin": "now+1hour",
        "mail-type": "END",
        "nodelist": "n1",
        "container-image": "x",
        "tmp": "1G",
        "exclusive": "",
    }
    assert refusal(sbatch=one) == ""


@pytest.mark.parametrize(
    "line",
    ["#BSUB -J x", "#PBS -N x", "#SBATCH -J x", "#SLURM -J x", "true\n#PBS -l walltime=1", "#BB create", "#DW jobdw"],
)
def test_case_11_comments_that_sbatch_reads_are_refused_in_setup(line):
    assert "a flag of sbatch belongs into cluster.sbatch" in refusal(setup=["module load x", line])
    assert refusal(setup=["# PBS was here before", "echo '#PBS'", "#module"]) == ""
