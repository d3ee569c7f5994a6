"""Test what each kind of job asks of Slurm: how the requests of roles are filled in, and what is refused before a round is frozen."""

import shutil
from copy import deepcopy
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.cluster.sbatch_parameters import flags_of
from pipeline.config import fit, requests, settings
from pipeline.config.requests import ROLES

ONE_GPU = ["cluster=slurm", "cluster.gpus_per_node=1", "parallelism.tp=1"]


def composed(*overrides: str) -> settings.Settings:
    return settings.compose(["cluster=slurm", *overrides])


@cache
def _site() -> dict[str, Any]:
    return composed().to_dict()


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a GPU site with other values of some keys below `cluster`, as a file of the site could have them."""
    config = deepcopy(_site())
    for key, value in changes.items():
        *path, last = key.split(".")
        reduce(getitem, path, config["cluster"])[last] = value
    return config


def flags(role: str, *overrides: str) -> dict[str, str | bool]:
    chosen = composed(*overrides)
    return flags_of(chosen.cluster.request(role))


def test_case_06_each_role_has_its_own_partition_gpus_cores_memory_time_and_flags():
    chosen = composed(
        "cluster.partition=gpu", "cluster.account=lab", "cluster.gpus_per_node=h200:8", "cluster.mem=900G",
        "cluster.worker.time_limit_minutes=1-12:00:00", "cluster.worker.sbatch={exclude:n3}", "cluster.reference.gpus_per_node=2",
        "cluster.reference.mem_per_gpu=100G", "cluster.meta.partition=cpu", "cluster.meta.cpus_per_task=3", "cluster.meta.sbatch={nice:100}",
    )  # fmt: skip
    cluster = chosen.cluster
    common = {"account": "lab", "cpus-per-task": "64"}
    assert [flags_of(cluster.request(role)) for role in ROLES] == [
        {**common, "partition": "gpu", "gpus-per-node": "h200:8", "mem": "900G", "exclude": "n3"},
        {**common, "partition": "gpu", "gpus-per-node": "h200:2", "mem-per-gpu": "100G"},
        {"account": "lab", "partition": "cpu", "cpus-per-task": "3", "mem": "16G", "nice": "100"},
    ]
    assert [cluster.request(role).time_limit_minutes for role in ROLES] == [2160, 720, 180]


def test_the_meta_job_is_small_by_default_and_takes_nothing_that_only_gpus_need():
    own = [
        "cluster.gpus_per_node=h200:8",
        "cluster.cpus_per_gpu=12",
        "cluster.mem_per_gpu=100G",
        "cluster.sbatch={gpu-bind:closest,nice:5}",
    ]
    assert flags("meta", *own) == {"cpus-per-task": "4", "mem": "16G", "nice": "5"}
    assert flags("worker", *own) == {
        "gpus-per-node": "h200:8", "cpus-per-gpu": "12", "mem-per-gpu": "100G", "gpu-bind": "closest", "nice": "5",
    }  # fmt: skip
    assert composed(*own).cluster.cpus_per_task == 96
    assert flags("meta", "cluster.gres='gpu:8,lscratch:100'")["gres"] == "lscratch:100"


def test_a_meta_job_may_hold_what_an_arm_holds_as_before():
    null = [f"cluster.meta.{name}=null" for name in ("gpus_per_node", "cpus_per_task", "mem", "time_limit_minutes")]
    cluster = composed(*null).cluster
    assert cluster.meta == cluster.reference == cluster.request("worker")


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["cluster.gpus_per_node=4", "cluster.gpu_type=a100"], {"gpus-per-node": "a100:4"}),
        (["cluster.gres='gpu:h200:8,lscratch:100'"], {"gres": "gpu:h200:8,lscratch:100"}),
        (["cluster.gres='lscratch:100G'"], {"gres": "lscratch:100G", "gpus-per-node": "8"}),
        ([*ONE_GPU, "cluster.gres='gres/gpu:a100_1g.5gb:1'"], {"gres": "gpu:a100_1g.5gb:1"}),
        ([*ONE_GPU, "cluster.gpus_per_node='1g.5gb:1'"], {"gpus-per-node": "1g.5gb:1"}),
        ([*ONE_GPU, "cluster.gres='shard:4'"], {"gres": "shard:4"}),
        (["cluster.sbatch={gpus_per_task:'h200:8'}"], {"gpus-per-task": "h200:8"}),
        (["cluster.mem_per_cpu=4GB"], {"mem-per-cpu": "4GB", "gpus-per-node": "8"}),
        (["cluster.mem=0"], {"mem": "0", "gpus-per-node": "8"}),
        (["cluster.constraint=a100|h100"], {"constraint": "a100|h100", "gpus-per-node": "8"}),
        (["+cluster.sbatch.exclusive=true", "+cluster.sbatch.hold=false"], {"exclusive": True, "gpus-per-node": "8"}),
        (["cluster.sbatch={licenses:'matlab:1,ansys:2',mem-bind:local}"],
         {"licenses": "matlab:1,ansys:2", "mem-bind": "local", "gpus-per-node": "8"}),
    ],
)  # fmt: skip
def test_case_06_gpus_memory_and_further_flags_are_asked_for_in_every_form(overrides, asked):
    assert {name: value for name, value in flags("worker", *overrides).items() if name != "cpus-per-task"} == asked


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("240", 240), ("4:30", 5), ("4:00:00", 240), ("1-12", 2160), ("1-12:30", 2190), ("1-12:00:01", 2161), ("0:59", 1)],
)
def test_times_are_read_as_sbatch_reads_them(text, minutes):
    assert requests.minutes_of(text, "time") == minutes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus_per_node": "h200"}, "cluster.gpus_per_node = h200. Valid: a number, or a type and a number"),
        ({"gpus_per_node": "h200:8", "gpu_type": "a100"}, "Give one type"),
        ({"gpus_per_node": "a100:4,h200:4"}, "Valid: a number, or a type and a number"),
        ({"gres": "gpu:h200:4"}, "cluster.gres = gpu:h200:4. Valid: cluster.gpus_per_node = 8 GPUs"),
        (
            {"gres": "gpu:8", "gpu_type": "h200"},
            "cluster.gpu_type = h200. Valid: empty, and cluster.gpus_per_node = 8 without a type, because cluster.gres = gpu:8 asks for the GPUs",
        ),
        (
            {"gpus_per_node": "h200:8", "gres": "gpu:h200:8,lscratch:100"},
            "cluster.gpus_per_node = h200:8, and cluster.gres = gpu:h200:8,lscratch:100. Name the type once: cluster.gpus_per_node=8 beside",
        ),
        ({"gres": "gpu:a:b:8"}, "Valid: names with a type and a number"),
        ({"gres": "gpu:8,"}, "Valid: names with a type and a number"),
        (
            {"mem": "900G", "mem_per_gpu": "100G"},
            "cluster.mem and mem_per_gpu = 900G and 100G. Valid: one of them",
        ),
        ({"mem": 900}, "cluster.mem = 900. Valid: a whole number with its unit, such as 900G"),
        ({"mem": "1.5T"}, "a whole number with its unit"),
        ({"mem_per_cpu": 0}, "cluster.mem_per_cpu = 0. Valid: a whole number with its unit"),
        (
            {"meta.mem_per_gpu": "1G", "meta.mem": ""},
            "cluster.meta.mem_per_gpu = 1G. Valid: empty, because cluster.meta.gpus",
        ),
        ({"meta.cpus_per_gpu": 4}, "cluster.meta.cpus_per_gpu = 4. Valid: 0, because cluster.meta.gpus_per_node = 0"),
        ({"meta.cpus_per_task": 0}, "cluster.meta.cpus_per_task = 0. Valid: a number > 0"),
        ({"reference.gpus_per_node": -1}, "cluster.reference.gpus_per_node = -1. Valid: a number >= 0"),
        ({"time_limit_minutes": "2h"}, "cluster.time_limit_minutes = 2h. Valid: whole minutes, or a time"),
        ({"time_limit_minutes": "UNLIMITED"}, "Valid: whole minutes, or a time"),
        ({"meta.time_limit_minutes": 0}, "cluster.meta.time_limit_minutes = 0. Valid: a number > 0"),
        (
            {"sbatch": {"array": "0-3"}},
            "cluster.sbatch.array = 0-3. Valid: flags that the pipeline does not need itself",
        ),
        (
            {"sbatch": {"open_mode": "truncate"}},
            "cluster.sbatch.open-mode = truncate. Valid: flags that the pipeline does not need itself",
        ),
        ({"sbatch": {"ntasks_per_node": 8}}, "flags that the pipeline does not need itself"),
        ({"sbatch": {"export": "NONE"}}, "flags that the pipeline does not need itself"),
        ({"sbatch": {"parsable": True}}, "could not read what sbatch prints with it"),
        ({"sbatch": {"depend": "afterok:1"}}, "whole names of flags; sbatch takes --depend for --dependency"),
        ({"sbatch": {"partition": "gpu"}}, "cluster.sbatch.partition = gpu. Valid: cluster.partition in its place"),
        (
            {"meta.sbatch": {"time": 5}},
            "cluster.meta.sbatch.time = 5. Valid: cluster.meta.time_limit_minutes in its place",
        ),
        ({"sbatch": {"gpus": 8}}, "Valid: cluster.gpus_per_node in its place"),
        ({"sbatch": {"p": "gpu"}}, "the long name of a flag"),
        ({"sbatch": {"--exclude": "n3"}}, "the long name of a flag of sbatch, without the dashes"),
        ({"sbatch": {"exclude": ["n1", "n2"]}}, "several are joined by commas"),
        ({"sbatch": "exclusive"}, "cluster.sbatch = exclusive. Valid: names and values"),
        (
            {"sbatch": {"gpus_per_task": 4}},
            "cluster.sbatch.gpus-per-task = 4. Valid: the number of cluster.gpus_per_node, 8",
        ),
        ({"meta.sbatch": {"gpu_bind": "closest"}}, "Valid: flags that a job without GPUs may have"),
        ({"worker": {"stall_minutes": 3}}, "there is no setting cluster.worker.stall_minutes"),
        ({"meta.mem_gb": 3}, "there is no setting cluster.meta.mem_gb. Similar settings: cluster.meta.mem"),
        ({"meta": 5}, "cluster.meta = 5. Valid: keys and values"),
        ({"setup": ["module load cuda", "#SBATCH --array=0-3"]}, "a flag of sbatch belongs into cluster.sbatch"),
    ],
)
def test_what_sbatch_would_misunderstand_is_refused_by_its_key_with_a_cure(changes, words):
    with pytest.raises(ConfigError) as error:
        settings.typed(changed(changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_flag_that_is_not_there_yet_is_added_with_a_plus():
    with pytest.raises(ConfigError, match=r"cluster.sbatch.exclude is not set yet. Write \+cluster.sbatch.exclude="):
        composed("cluster.sbatch.exclude=n3")
    assert composed("+cluster.sbatch.exclude=n3").cluster.sbatch == {"exclude": "n3"}


@pytest.mark.parametrize("value", ["two\nlines", "a\\b", " gpu", "gpu\t", "\x00"])
@pytest.mark.parametrize("key", ["partition", "constraint", "reference.account", "sbatch.exclude"])
def test_a_value_that_sbatch_would_read_otherwise_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"cluster.{key} = .* without a backslash"):
        settings.typed(changed({"sbatch": {"exclude": "n1"}, key: value}))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.gpus_per_node=4"], "2 ranks .* do not fill nodes of 4 GPUs"),
        (["cluster.gpus_per_node=2", "cluster.reference.gpus_per_node=0"], "cluster.reference.gpus_per_node = 0, but judging the reference"),
        (["cluster.gpus_per_node=1", "cluster.network=fabric", "parallelism.judge_tp=2"], "judging takes parallelism.judge_tp = 2 GPUs of one"),
        (["cluster.gpus_per_node=2", "cluster.network=fabric", "cluster.ranks_per_node=1"], "cluster.ranks_per_node = 1, but an arm asks for 2"),
        (["cluster.gpus_per_node=0", "cluster.reference.gpus_per_node=8"], "cluster.reference.gpus_per_node = 8, but arms have no GPU"),
        (["cluster.gpus_per_node=0", "cluster.meta.gpus_per_node=1"], "cluster.meta.gpus_per_node = 1, but arms have no GPU"),
        (["cluster.gpus_per_node=2", "parallelism.judge_tp=2", "cluster.meta.gpus_per_node=1"], "cluster.meta.gpus_per_node = 1, but a meta job"),
        (["cluster.gpus_per_node=2", "external=local"], "external=local is judged by the meta job.* Set cluster.meta.gpus_per_node=1"),
        (["cluster.gpus_per_node=2", "cluster.meta.time_limit_minutes=10"], "cluster.meta.time_limit_minutes = 10, but a job is told to stop 600 s"),
        (["cluster.gpus_per_node=2", "external=kaggle", "external.wait_seconds=10800"], "external.wait_seconds = 10800, but the meta job"),
    ],
)  # fmt: skip
def test_ranks_gpus_and_what_the_meta_job_judges_are_compared_before_a_round(overrides, words):
    with pytest.raises(ConfigError, match=words):
        fit.check_sizes(composed(*overrides))


def test_the_local_board_is_judged_where_the_meta_job_has_gpus_or_nobody_has():
    fit.check_sizes(composed("cluster.gpus_per_node=2", "external=local", "cluster.meta.gpus_per_node=1"))
    fit.check_sizes(composed("cluster.gpus_per_node=0", "external=local"))


def test_a_frozen_configuration_is_read_as_it_was_composed():
    chosen = composed(
        "cluster.gpus_per_node=h200:8", "cluster.cpus_per_gpu=12", "cluster.mem_per_gpu=9G", "cluster.sbatch={gpu-bind:closest,exclusive:true}",
        "cluster.worker.partition=gpu", "cluster.worker.sbatch={exclude:n3}", "cluster.meta.sbatch={nice:5}", "cluster.time_limit_minutes=4:00:00",
    )  # fmt: skip
    text = settings.to_yaml(chosen)
    assert settings.to_yaml(settings._of_text(text)) == text
    assert chosen.cluster.reference.sbatch == {"gpu-bind": "closest", "exclusive": ""}


def test_a_round_that_was_frozen_before_roles_had_requests_is_still_shown():
    """Only `status`, `logs`, `doctor` and `gc` read it with newer code."""
    config = composed("cluster.meta.gpus_per_node=null").to_dict()
    new = ("reference", "meta", "gpu_type", "gres", "cpus_per_gpu", "mem", "mem_per_gpu", "mem_per_cpu", "sbatch")
    config["cluster"] = {name: value for name, value in config["cluster"].items() if name not in new} | {"mem_gb": 900}
    cluster = settings.typed(config).cluster
    assert cluster.meta == cluster.reference == cluster.request("worker")
    assert flags_of(cluster.meta) == {"gpus-per-node": "8", "cpus-per-task": "64", "mem": "900G"}


@pytest.mark.parametrize("text", ["time_limit_minutes: 4:00:00\n", "meta: {time_limit_minutes: 12:30, mem: 4G}\n"])
def test_a_time_that_yaml_would_take_for_a_number_is_refused(tmp_path, text):
    source = Path(shutil.copytree(settings.SOURCE, tmp_path / "conf"))
    (source / "cluster" / "mine.yaml").write_text(f"defaults: [slurm]\n{text}")
    with pytest.raises(
        ConfigError, match=r"mine.yaml has time_limit_minutes: (4:00:00|12:30), which YAML reads as .* into quotes: "
    ):
        settings.compose(["cluster=mine"], source=source)
    (source / "cluster" / "mine.yaml").write_text('defaults: [slurm]\ntime_limit_minutes: "4:00:00"\n')
    assert settings.compose(["cluster=mine"], source=source).cluster.time_limit_minutes == 240
