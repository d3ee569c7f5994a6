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
        "cluster.worker.time_limit_minutes=1-12:00:00", "cluster.worker.sbatch={exclude:n3}", "cluster.reference.gpus=2",
        "cluster.reference.mem_per_gpu=100G", "cluster.meta.partition=cpu", "cluster.meta.cpus_per_task=3", "cluster.meta.sbatch={nice:100}",
    )  # fmt: skip
    cluster = chosen.cluster
    common = {"account": "lab", "partition": "gpu"}
    assert [flags_of(cluster.request(role)) for role in ROLES] == [
        {**common, "gpus-per-node": "h200:2", "cpus-per-task": "16", "mem": "225G", "exclude": "n3"},
        {**common, "gpus-per-node": "h200:2", "cpus-per-task": "16", "mem-per-gpu": "100G"},
        {**common, "gpus-per-node": "h200:1", "cpus-per-task": "8", "mem": "115200M"},
        {**common, "gpus-per-node": "h200:1", "cpus-per-task": "8", "mem": "115200M"},
        {"account": "lab", "partition": "cpu", "cpus-per-task": "3", "mem": "16G", "nice": "100"},
    ]
    assert [cluster.request(role).time_limit_minutes for role in ROLES] == [2160, 720, 720, 720, 180]


def test_the_meta_job_is_small_by_default_and_takes_nothing_that_only_gpus_need():
    own = [
        "cluster.gpus_per_node=h200:8",
        "cluster.cpus_per_gpu=12",
        "cluster.mem_per_gpu=100G",
        "cluster.sbatch={gpu-bind:closest,nice:5}",
    ]
    assert flags("meta", *own) == {"cpus-per-task": "4", "mem": "16G", "nice": "5"}
    assert flags("worker", *own) == {
        "gpus-per-node": "h200:2", "cpus-per-gpu": "12", "mem-per-gpu": "100G", "gpu-bind": "closest", "nice": "5",
    }  # fmt: skip
    assert composed(*own).cluster.cpus_per_task == 24
    assert flags("meta", "cluster.gres='gpu:8,lscratch:100'")["gres"] == "lscratch:100"


def test_a_meta_job_of_which_nothing_is_said_gets_the_cores_and_memory_of_one_gpu():
    null = [f"cluster.meta.{name}=null" for name in ("cpus_per_task", "mem", "time_limit_minutes")]
    assert flags("meta", *null, "cluster.mem=800G") == {"cpus-per-task": "8", "mem": "100G"}


@pytest.mark.parametrize(
    ("layout", "gpus", "nodes", "cores", "memory"),
    [("tp1", 1, 1, 8, "100G"), ("tp2", 2, 1, 16, "200G"), ("tp4_ep4", 4, 1, 32, "400G"), ("tp4_dp2", 8, 1, 64, "800G"),
     ("tp4_ep8", 8, 2, 64, "800G")],
)  # fmt: skip
def test_an_arm_asks_for_its_gpus_and_the_same_share_of_a_node(layout, gpus, nodes, cores, memory):
    """What an arm needs and what a node has are different settings, so one file of a site serves every layout."""
    network = "fabric" if nodes > 1 else "loopback"
    chosen = composed("experiment=nano_30b", f"parallelism={layout}", f"cluster.network={network}", "cluster.mem=800G")
    fit.check_sizes(chosen)
    assert chosen.num_nodes == nodes
    assert flags_of(chosen.cluster.request("worker")) == {
        "gpus-per-node": str(gpus), "cpus-per-task": str(cores), "mem": memory,
    }  # fmt: skip
    assert chosen.cluster.reference.gpus == chosen.cluster.judge.gpus == chosen.parallelism.judge_tp
    assert chosen.cluster.meta.gpus == 0
    again = settings.typed(chosen.to_dict())
    assert again == chosen, "a frozen configuration is not scaled a second time"
    frozen = settings.to_yaml(chosen)
    assert settings.to_yaml(again) == frozen


def test_what_a_role_says_itself_is_asked_for_as_it_is():
    own = ["cluster.worker.cpus_per_task=5", "cluster.worker.mem=7G", "cluster.mem=800G"]
    assert flags("worker", *own) == {"gpus-per-node": "2", "cpus-per-task": "5", "mem": "7G"}
    assert flags("judge", *own) == {"gpus-per-node": "1", "cpus-per-task": "8", "mem": "100G"}


def test_the_fabric_network_is_refused_where_arms_share_a_node():
    with pytest.raises(
        ConfigError, match="cluster.network = fabric. Valid: loopback, because an arm takes 2 of a node's 8 GPUs"
    ):
        composed("cluster.network=fabric")


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["cluster.gpus_per_node=4", "cluster.gpu_type=a100"], {"gpus-per-node": "a100:2"}),
        (["cluster.gres='gpu:h200:8,lscratch:100'"], {"gres": "gpu:h200:2,lscratch:100"}),
        (["cluster.gres='lscratch:100G'"], {"gres": "lscratch:100G", "gpus-per-node": "2"}),
        ([*ONE_GPU, "cluster.gres='gres/gpu:a100_1g.5gb:1'"], {"gres": "gpu:a100_1g.5gb:1"}),
        ([*ONE_GPU, "cluster.gpus_per_node='1g.5gb:1'"], {"gpus-per-node": "1g.5gb:1"}),
        ([*ONE_GPU, "cluster.gres='shard:4'"], {"gres": "shard:4"}),
        (["cluster.sbatch={gpus_per_task:'h200:8'}"], {"gpus-per-task": "h200:2"}),
        (["cluster.mem_per_cpu=4GB"], {"mem-per-cpu": "4GB", "gpus-per-node": "2"}),
        (["cluster.mem=0", "cluster.meta.mem=1G", "cluster.sbatch={exclusive:true}"], {"mem": "0", "gpus-per-node": "2", "exclusive": True}),
        (["cluster.constraint=a100|h100"], {"constraint": "a100|h100", "gpus-per-node": "2"}),
        (["+cluster.sbatch.exclusive=true", "+cluster.sbatch.hold=false"], {"exclusive": True, "gpus-per-node": "2"}),
        (["cluster.sbatch={licenses:'matlab:1,ansys:2',mem-bind:local}"],
         {"licenses": "matlab:1,ansys:2", "mem-bind": "local", "gpus-per-node": "2"}),
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
        (
            {"gres": "gpu:h200:4"},
            "cluster.gres = gpu:h200:4. Valid: cluster.gpus_per_node = 8 GPUs, of which each job asks for those that it needs",
        ),
        (
            {"gres": "gpu:2", "gpu_type": "h200"},
            "cluster.gpu_type = h200. Valid: empty, and cluster.gpus_per_node = 8 without a type, because cluster.gres = gpu:2 asks for the GPUs",
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
            "cluster.meta.mem_per_gpu = 1G. Valid: empty, because this job asks for no GPU",
        ),
        ({"meta.cpus_per_gpu": 4}, "cluster.meta.cpus_per_gpu = 4. Valid: 0, because this job asks for no GPU"),
        ({"meta.cpus_per_task": 0}, "cluster.meta.cpus_per_task = 0. Valid: a number > 0"),
        ({"reference.gpus_per_node": -1}, "cluster.reference.gpus_per_node = -1. Valid: a number >= 0"),
        ({"reference.gpus": 9}, "cluster.reference.gpus = 9. Valid: 0 to cluster.reference.gpus_per_node = 8"),
        (
            {"mem": "0"},
            "cluster.mem = 0. Valid: the memory of a node with its unit, such as 900G, or mem_per_gpu: this job gets 2 of the node's 8",
        ),
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
            "cluster.sbatch.gpus-per-task = 4. Valid: the GPUs of a node or of the job, 2",
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
        (["cluster.gpus_per_node=4", "parallelism.dp=3", "cluster.network=fabric"], "6 ranks .* fit into no node, and do not fill nodes of 4 GPUs"),
        (["cluster.reference.gpus=0"], "cluster.reference.gpus = 0, but judging takes parallelism.judge_tp = 1 GPUs"),
        (["parallelism.judge_tp=2", "cluster.judge.gpus=1"], "cluster.judge.gpus = 1, but judging takes parallelism.judge_tp = 2 GPUs"),
        (["cluster.gpus_per_node=1", "cluster.network=fabric", "parallelism.judge_tp=2", "cluster.reference.gpus_per_node=2",
          "cluster.judge.gpus_per_node=2"], "judging takes parallelism.judge_tp = 2 GPUs of one node, but an arm has 1"),
        (["cluster.worker.gpus=8"], "cluster.worker.gpus = 8, but an arm has 2 ranks"),
        (["cluster.gpus_per_node=2", "cluster.meta.time_limit_minutes=10"], "cluster.meta.time_limit_minutes = 10, but a job is told to stop 600 s"),
        (["cluster.gpus_per_node=2", "external=kaggle", "external.wait_seconds=10800"], "external.wait_seconds = 10800, but the meta job"),
    ],
)  # fmt: skip
def test_ranks_gpus_and_what_the_meta_job_judges_are_compared_before_a_round(overrides, words):
    with pytest.raises(ConfigError, match=words):
        fit.check_sizes(composed(*overrides))


@pytest.mark.parametrize(
    "flags", ["exclusive: user", "exclusive: mcs", "oversubscribe: true", "oversubscribe: true, exclusive: true"]
)
def test_an_arm_of_several_nodes_has_them_alone(flags):
    large = ["parallelism=tp4_ep8", "cluster.network=fabric", "cluster.gpus_per_node=8", f"cluster.sbatch={{{flags}}}"]
    with pytest.raises(
        ConfigError,
        match=r"cluster.sbatch.(exclusive|oversubscribe) = \w+. Valid: .*shares them with nobody, nor with its own user",
    ):
        composed(*large)
    assert composed(*large[:-1], "cluster.sbatch={exclusive: true}").cluster.is_exclusive
    assert composed("parallelism=tp1", "cluster.gpus_per_node=8", f"cluster.sbatch={{{flags}}}").num_nodes == 1


def test_the_local_board_needs_no_gpu_of_the_meta_job():
    fit.check_sizes(composed("external=local"))
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
    config = composed("cluster.gpus_per_node=2").to_dict()
    new = (
        "reference",
        "judge",
        "meta",
        "gpus",
        "gpu_type",
        "gres",
        "cpus_per_gpu",
        "mem",
        "mem_per_gpu",
        "mem_per_cpu",
        "sbatch",
    )
    config["cluster"] = {name: value for name, value in config["cluster"].items() if name not in new} | {"mem_gb": 900}
    worker = settings.typed(config).cluster.request("worker")
    assert flags_of(worker) == {"gpus-per-node": "2", "cpus-per-task": "64", "mem": "900G"}


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


def test_what_the_server_of_the_agents_model_asks_for_counts_only_where_a_round_has_one():
    assert composed("cluster.agent.gpus=99").cluster.agent.gpus == 99
    with pytest.raises(ConfigError, match="cluster.agent.gpus = 99"):
        composed(
            "cluster.agent.gpus=99",
            "worker=served",
            "cluster.vllm_runtime=/shared/vllm",
            "worker.server.weights_dir=/shared/weights",
        )


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (240, ["worker=llm", "worker.budget.wall_seconds=14400"]),
        (5, ["worker=llm", "worker.budget.wall_seconds=86400"]),
        (
            240,
            [
                "worker=served",
                "worker.budget.wall_seconds=10800",
                "cluster.vllm_runtime=/v",
                "worker.server.weights_dir=/w",
            ],
        ),
    ],
)
def test_a_session_that_its_job_would_cut_off_is_refused(minutes, words):
    chosen = composed(f"cluster.time_limit_minutes={minutes}", *words)
    chosen.cluster.signal_lead_seconds = min(chosen.cluster.signal_lead_seconds, 30 * minutes)
    with pytest.raises(ConfigError, match=r"worker.budget.wall_seconds = .*is told to stop"):
        fit.check_requests(chosen)
    del words[1]
    fit.check_requests(composed("cluster.time_limit_minutes=240", *words))


@pytest.mark.parametrize("endpoint", ["worker.endpoint", "policy.proposals"])
def test_a_key_in_a_variable_that_jobs_are_not_given_is_refused(endpoint):
    """Jobs would ask without it, eight arms at a time."""
    key = f"{endpoint}.api_key_env=OPENAI_API_KEY"
    words = ["worker=llm" if endpoint == "worker.endpoint" else "policy=llm", key]
    with pytest.raises(ConfigError, match=rf"{endpoint}.api_key_env = OPENAI_API_KEY.*{endpoint}.api_key_file"):
        composed(*words)
    settings.compose(["cluster=local", *words])
    composed(words[0], key.replace("OPENAI_API_KEY", "MY_ENDPOINT"))
