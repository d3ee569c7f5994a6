"""Test what `auto` stands for: the engine by what the site has, the GPUs of a replica by the play and the memory, each with its reason."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError
from pipeline.config import decoding, settings
from pipeline.config.settings import Settings

NANO = ["experiment=nano_30b", "cluster=slurm"]


def runtime(folder: Path, version: str) -> str:
    """What pip leaves of vLLM in a virtual environment."""
    (folder / "lib" / "python3.12" / "site-packages" / f"vllm-{version}.dist-info").mkdir(parents=True)
    return str(folder)


def test_a_site_with_vllm_takes_it_in_the_version_that_is_there(tmp_path: Path) -> None:
    chosen = settings.compose([*NANO, f"cluster.vllm_runtime={runtime(tmp_path, '0.12.0')}"])
    assert (chosen.tasks.engine, chosen.tasks.engine_version) == ("vllm", "0.12.0")
    settled = decoding.settled_of(chosen)
    assert decoding.in_words(chosen, settled)[0].startswith("engine: vllm 0.12.0, because vLLM 0.12.0 is in ")
    again = settings.compose([*NANO, f"cluster.vllm_runtime={tmp_path}/gone", *decoding.words_of(settled)])
    again.cluster.vllm_runtime = chosen.cluster.vllm_runtime
    assert again == chosen and again.parallelism.judge_tp == again.cluster.reference.gpus == 2
    assert not again.reasons, "what was frozen is not settled anew"
    assert decoding.in_words(again, {})[0] == "engine: vllm 0.12.0, because tasks.engine says so"


@pytest.mark.parametrize(
    ("version", "overrides", "because"),
    [
        ("0.12.0", ["cluster.gpus_per_node=0"], "the site has no GPUs"),
        ("0.12.0", ["cluster.vllm_runtime=''"], "cluster.vllm_runtime names no runtime"),
        ("0.12.0", ["cluster.vllm_runtime=/gone"], "no vLLM is seen in cluster.vllm_runtime = /gone from this machine"),
        ("0.9.2", [], "vLLM 0.9.2 in .* is older than 0.12.0"),
        ("0.12.0rc1+cu129", [], "vLLM 0.12.0rc1.cu129 in .* is older than 0.12.0"),
        ("0.12.0", ["model.weights=base/model.safetensors"], "the weights of this model are inside the image"),
        ("0.12.0", ["recipe.lora.targets=[q_proj,experts.up_proj]"], "nobody has checked adapters on experts.up_proj"),
        ("0.12.0", ["policy.axes.4.choices=['q_proj','q_proj,lm_head']"], "nobody has checked adapters on lm_head"),
    ],
)  # fmt: skip
def test_native_decodes_elsewhere_and_says_why(tmp_path, version, overrides, because) -> None:
    chosen = settings.compose([*NANO, f"cluster.vllm_runtime={runtime(tmp_path, version)}", *overrides])
    assert (chosen.tasks.engine, chosen.tasks.engine_version) == ("native", "")
    assert re.search(because, chosen.reasons["tasks.engine"])


def test_an_older_version_that_pip_left_is_not_taken(tmp_path: Path) -> None:
    for version in ("0.9.2", "0.12.0.dev5", "0.12.0"):
        found = runtime(tmp_path, version)
    assert decoding.installed_vllm(found) == "0.12.0"


@pytest.mark.parametrize("version", ["0.12.0", "0.13.1"])
def test_a_named_version_that_auto_does_not_take_is_refused(tmp_path: Path, version: str) -> None:
    words = [*NANO, f"cluster.vllm_runtime={runtime(tmp_path, version)}", "tasks.engine_version='0.13.0'"]
    with pytest.raises(
        ConfigError, match=rf"tasks.engine_version = 0.13.0, but tasks.engine = auto takes vllm {version}"
    ):
        settings.compose(words)
    with pytest.raises(ConfigError, match=r"takes native, because .* cluster.vllm_runtime = /gone"):
        settings.compose([*NANO, "cluster.vllm_runtime=/gone", "tasks.engine_version='0.13.0'"])


def test_an_engine_that_is_named_is_taken_as_it_is() -> None:
    own = [
        "tasks.engine=vllm",
        "tasks.engine_version='0.9'",
        "cluster.vllm_runtime=/opt/vllm",
        "parallelism.judge_tp=1",
    ]
    chosen = settings.compose([*NANO, *own])
    assert (chosen.tasks.engine, chosen.tasks.engine_version, chosen.reasons) == ("vllm", "0.9", {})


def seconds(chosen: Settings, number: int) -> float:
    """What one replica for each so many GPUs takes, with the number named."""
    named = settings.compose([*NANO, "parallelism=tp4_ep4", f"parallelism.judge_tp={number}", *words_of(chosen)])
    return decoding.assumed_decoding(named, named.items_of("dev") + named.items_of("fresh"))


def words_of(chosen: Settings) -> list[str]:
    return [
        f"cluster.capacity.scaling={chosen.cluster.capacity.scaling}",
        f"tasks.decode_batch_size={chosen.tasks.decode_batch_size}",
    ]


@settings_of(deadline=None, max_examples=8)
@given(st.sampled_from([0.5, 0.6, 0.75, 1.0]), st.sampled_from([16, 64, 256]))
def test_the_number_of_gpus_of_a_replica_is_the_one_that_ends_first(scaling: float, slots: int) -> None:
    own = [
        f"cluster.capacity.scaling={scaling}",
        f"tasks.decode_batch_size={slots}",
        "cluster.capacity.gpu_memory_gib=0",
    ]
    chosen = settings.compose([*NANO, "parallelism=tp4_ep4", *own])
    known = {number: seconds(chosen, number) for number in (1, 2, 4)}
    assert chosen.parallelism.judge_tp == min(known, key=lambda number: (known[number], number))
    assert chosen.cluster.reference.gpus == chosen.parallelism.judge_tp


@pytest.mark.parametrize(
    ("overrides", "number", "because"),
    [
        (["parallelism=tp2", "cluster.gpus_per_node=0"], 1, "the site has no GPUs"),
        (["parallelism=tp2", "cluster.capacity.scaling=0.5"], 1, "3,600 items are forecast to take .* with 2 replicas of 1 GPU, .* 1 replica of 2"),
        (["parallelism=tp2", "cluster.capacity.gpu_memory_gib=40", "cluster.capacity.scaling=0.5"], 2, "with 1 a rank does not fit into its memory"),
        (["parallelism=tp4_ep4", "cluster.capacity.train_tokens_per_second=0"], 1, "no rates are known"),
        (["parallelism=tp4_ep4", "cluster.capacity.gpu_memory_gib=5"], 4, "no number of GPUs has the memory"),
        (["parallelism=tp4_ep4", "cluster.reference.gpus=1", "cluster.reference.gpus_per_node=8"], 1, "forecast to take"),
    ],
)  # fmt: skip
def test_memory_rates_and_requests_bound_a_replica(overrides: list[str], number: int, because: str) -> None:
    chosen = settings.compose([*NANO, *overrides])
    assert chosen.parallelism.judge_tp == number
    assert re.search(because, chosen.reasons["parallelism.judge_tp"])


def test_reasons_cannot_be_given() -> None:
    with pytest.raises(ConfigError, match="reasons"):
        settings.compose(["+reasons.a=b"])
