"""Test that PEFT's fields mean here what they mean in peft itself, and that a field of another arithmetic is refused by its name."""

import json
import math
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from substrate.distributed.groups import start
from substrate.formats import export
from substrate.interface.errors import DataError
from substrate.interface.peft_config import PeftConfig
from substrate.model import add_lora, build_model, load_adapter, load_base, save_adapter
from tests.support import adapters
from tests.support.adapters import CONFIG, ENDS, MODULES, NULLS, WEIGHTS
from tests.support.ports import free_ports
from tests.support.reference import CONFIGS, load_reference, random_reference, small_config

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

# megatron-core 0.16.1, and peft with transformers, calling themselves in ways that they deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
NAMES = ["q_proj", "k_proj", "v_proj", "in_proj", "up_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_reference(small_config()).save_pretrained(folder)
    return folder


def model_values() -> dict[str, Any]:
    import yaml

    return {key: getattr(small_config(), key) for key in yaml.safe_load((CONFIGS / "tiny.yaml").read_text())}


def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 41), generator=torch.Generator().manual_seed(4))


# What is implemented: configurations of peft, whose own logits are the truth.
IMPLEMENTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"k_proj": 2, "in_proj": 6}, "alpha_pattern": {"v_proj": 64, "k_proj": 1}},
    "patterns, rank-stabilized": {"use_rslora": True, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    "a pattern of whole names": {"alpha_pattern": {"^model.layers.0.mixer.in_proj": 32, r"layers\.2\.mixer\.[qk]_proj": 2}},
    "another order": {"target_modules": NAMES[::-1]},
    "a module that the model has not": {"target_modules": [*NAMES, "gate_proj"]},
    "a regular expression": {"target_modules": r".*\.(q_proj|in_proj|shared_experts\.down_proj)"},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 3, "target_modules": ["in_proj", "up_proj"], "layers_pattern": "layers"},
    "excluded modules": {"exclude_modules": ["k_proj", "model.layers.3.mixer.in_proj"]},
    "an excluding expression": {"exclude_modules": r".*layers\.0.*"},
    "another start": {"init_lora_weights": "gaussian"},
    "alpha that is no integer": {"lora_alpha": 0.75},
}  # fmt: skip


def made_by_peft(base: Path, folder: Path, **fields: Any) -> Any:
    """An adapter that peft wrote, with random A and B; returns its model."""
    torch.manual_seed(9)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": NAMES} | fields
    adapted = peft.get_peft_model(load_reference(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.05)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


@pytest.mark.parametrize("name", IMPLEMENTED)
def test_case_09_merge_and_load_compute_what_peft_computes(base, alone, tmp_path, name):
    adapted = made_by_peft(base, tmp_path / "adapter", **IMPLEMENTED[name])
    with torch.no_grad():
        expected = adapted(tokens()).logits
        close = 1e-4 * expected.abs().max()
        export.merge(tmp_path / "adapter", base, model_values(), tmp_path / "merged")
        assert (load_reference(tmp_path / "merged")(tokens()).logits - expected).abs().max() < close
        model = build_model(small_config(), alone)
        load_base(model, base)
        load_adapter(model, tmp_path / "adapter")
        assert (model.eval()(tokens(), None, None) - expected).abs().max() < close
        assert (load_reference(base)(tokens()).logits - expected).abs().max() > 20 * close


def _rank_main(rank: int, port: int, base: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel = start({"tp": 2, "pp": 1, "ep": 2, "cp": 1, "dp": 1})
    model = build_model(small_config(), parallel)
    load_base(model, base)
    load_adapter(model, folder / "adapter")
    with torch.no_grad():
        # Ranks share the positions evenly, so an odd number gets one more at the end, which no earlier one sees.
        length = tokens().shape[1]
        padded = F.pad(tokens(), (0, length % 2))
        logits = model.eval()(padded, None, None, runtime_gather_output=True)[:, :length].contiguous()
    if rank == 0:
        save_file({"logits": logits}, folder / "logits")
    parallel.shutdown()


@pytest.mark.slow
def test_case_09_two_ranks_read_their_parts_of_padded_factors(base, tmp_path):
    """Ranks and scales differ between q, k and v, which are one sharded matrix; the adapted experts are on different ranks."""
    fields = {"rank_pattern": {"k_proj": 2, "in_proj": 6}, "alpha_pattern": {"v_proj": 64}, "use_rslora": True}
    adapted = made_by_peft(base, tmp_path / "adapter", **fields, target_modules=[*NAMES, "o_proj", "down_proj"])
    mp.spawn(_rank_main, (free_ports(1)[0], base, tmp_path), nprocs=2)
    with torch.no_grad():
        expected = adapted(tokens()).logits
    assert (load_file(tmp_path / "logits")["logits"] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_case_09_the_scales_of_the_report(tmp_path):
    """alpha 8, rank 4: 2 where nothing is set, 4 with use_rslora, 16 with an alpha of its own."""
    scales = [{}, {"use_rslora": True}, {"alpha_pattern": {"lm_head": 64}}]
    folders = [adapters.write(tmp_path / str(number), **fields) for number, fields in enumerate(scales)]
    assert [PeftConfig.read(folder).scale_of("lm_head") for folder in folders] == [2.0, 4.0, 16.0]
    assert PeftConfig.read(folders[2]).scale_of("backbone.layers.0.mixer.in_proj") == 2.0


def test_case_09_empty_fields_pass_and_change_no_byte(base, tmp_path):
    for name, fields in (("few", {}), ("many", NULLS)):
        adapters.write(tmp_path / name, **fields)
        export.merge(tmp_path / name, base, model_values(), tmp_path / f"merged {name}")
    few, many = (load_file(tmp_path / f"merged {name}" / "model-00000.safetensors") for name in ("few", "many"))
    assert few.keys() == many.keys() and all(torch.equal(few[name], many[name]) for name in few)


def test_case_09_a_pair_of_lower_rank_in_a_fused_weight_survives_a_save(alone, tmp_path):
    """q, k and v are one matrix here: the smaller ranks are padded, and what is saved again is one rank and one scale."""
    config = small_config()
    modules = {
        f"backbone.layers.2.mixer.{part}_proj": (heads * config.attention_head_dim, config.hidden_size)
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_query_groups), ("v", config.num_query_groups))
    }  # fmt: skip
    folder = adapters.write(
        tmp_path / "adapter", modules=modules, target_modules=["v_proj", "q_proj", "k_proj"],
        rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True,
    )  # fmt: skip
    model = build_model(config, alone)
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "again")
    again = PeftConfig.read(tmp_path / "again")
    old, new = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    given = PeftConfig.read(folder)
    for module in modules:
        A, B = (f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB")
        assert new[A].shape[0] == again.rank == 4
        delta = given.scale_of(module) * old[B] @ old[A]
        torch.testing.assert_close(again.scale_of(module) * new[B] @ new[A], delta)


def test_case_09_a_model_that_has_an_adapter_takes_its_like_alone(alone, tmp_path):
    model = build_model(small_config(), alone)
    add_lora(model, 4, 8, 0.0, ["q_proj"], seed=1)
    save_adapter(model, tmp_path / "same")
    load_adapter(model, tmp_path / "same")
    for number, (rank, targets) in enumerate([(8, ["q_proj"]), (4, ["q_proj", "k_proj"]), (4, ["in_proj"])]):
        other = build_model(small_config(), alone)
        add_lora(other, rank, 8, 0.0, targets, seed=1)
        save_adapter(other, tmp_path / str(number))
        with pytest.raises(DataError, match="not of the adapter that the model has already"):
            load_adapter(model, tmp_path / str(number))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{field} {value}": ({field: value}, field) for field, value in [
        ("fan_in_fan_out", True), ("bias", "all"), ("bias", "lora_only"), ("use_dora", True), ("lora_bias", True),
        ("modules_to_save", ["lm_head"]), ("target_parameters", ["experts.up_proj"]), ("trainable_token_indices", [3]),
        ("megatron_config", {"tp": 2}), ("layer_replication", [[0, 2], [1, 3]]), ("use_qalora", True),
        ("arrow_config", {"top_k": 3}), ("alora_invocation_tokens", [1, 2]), ("corda_config", {"corda_method": "ipm"}),
        ("loftq_config", {"loftq_bits": 4}), ("use_bdlora", {"nblocks": 2}), ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"rank": 1}), ("monteclora_config", {"n": 2}), ("lora_ga_config", {"direction": "a"}),
        ("ensure_weight_tying", True), ("peft_type", "IA3"), ("task_type", "SEQ_CLS"), ("a_field_of_tomorrow", 0.5),
    ]},
    **{f"init_lora_weights {value}": ({"init_lora_weights": value}, "init_lora_weights") for value in
       ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "tomorrow", 3]},
    **{f"lora_alpha {value}": ({"lora_alpha": value}, "lora_alpha is .*; lora_alpha must be a finite number above 0")
       for value in [True, 0, -8, math.nan, math.inf, -math.inf, "16", [16], 10**400]},
    **{f"r {value}": ({"r": value}, "r is .*; r must be an integer of at least 1") for value in [True, 0, -1, 4.0, "4", math.nan]},
    **{f"{field} {value}": ({field: value}, field) for field, value in [
        ("lora_dropout", 1), ("lora_dropout", "0.1"), ("use_rslora", "true"), ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"v_proj": 0}), ("rank_pattern", {"v_proj": True}), ("alpha_pattern", {"v_proj": math.nan}),
        ("alpha_pattern", {"v_proj": 0}), ("alpha_pattern", {"(": 8}), ("target_modules", []), ("target_modules", "("),
        ("target_modules", [1]), ("target_modules", {}), ("target_modules", None), ("exclude_modules", 5),
        ("exclude_modules", ["v_proj"]), ("layers_to_transform", ["0"]), ("layers_to_transform", [0]), ("lora_alpha", None),
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_case_09_what_is_not_implemented_is_refused_by_name_by_every_reader(base, alone, tmp_path, name):
    fields, words = REFUSED[name]
    folder = adapters.write(tmp_path / "adapter")
    adapters.configure(folder, **fields)
    readers = [
        lambda: export.submission(folder, tmp_path / "submission.zip"),
        lambda: export.merge(folder, base, model_values(), tmp_path / "merged"),
        lambda: load_adapter(build_model(small_config(), alone), folder),
    ]
    for read in readers:
        with pytest.raises(DataError, match=words) as refused:
            read()
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_case_09_factors_of_another_type_are_refused_by_every_reader(base, alone, tmp_path, dtype):
    folder = adapters.write(tmp_path / "adapter")
    save_file({name: each.to(dtype) for name, each in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    with pytest.raises(DataError, match="save it as"):
        export.merge(folder, base, model_values(), tmp_path / "merged")
    adapters.configure(folder, target_modules=sorted(MODULES))
    with pytest.raises(DataError, match="save it as"):
        load_adapter(build_model(small_config(), alone), folder)


def test_case_09_weights_that_are_no_numbers_are_neither_merged_nor_loaded(base, alone, tmp_path):
    folder = adapters.write(tmp_path / "adapter", target_modules=sorted(MODULES))
    load_adapter(build_model(small_config(), alone), folder)
    adapters.change(folder, lambda found: found[f"base_model.model.{ENDS[-1]}.lora_A.weight"].fill(math.nan))
    with pytest.raises(DataError, match="NaN or infinity"):
        export.merge(folder, base, model_values(), tmp_path / "merged")
    with pytest.raises(DataError, match="NaN or infinity"):
        load_adapter(build_model(small_config(), alone), folder)


segments = st.sampled_from(
    ["q_proj", "v_proj", "mixer.v_proj", "up_proj", "experts.1.up_proj", "2.mixer.v_proj", "proj"]
)
keys = st.sampled_from(
    ["v_proj", "[qk]_proj", r"layers\.2\..*", "^backbone.layers.1", "proj", ".*experts.*", "mixer.v_proj"]
)
modules = st.builds(
    "{}.layers.{}.mixer.{}".format, st.sampled_from(["backbone", "model"]), st.integers(0, 3),
    st.sampled_from(["q_proj", "v_proj", "experts.1.up_proj", "shared_experts.up_proj"]),
)  # fmt: skip


@given(
    st.lists(segments, min_size=1) | st.sampled_from([r".*\.v_proj", ".*proj"]), st.lists(segments) | keys,
    st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3)), st.none() | st.sampled_from(["layers", "h"]),
    st.dictionaries(keys, st.integers(1, 9)), modules,
)  # fmt: skip
def test_case_09_modules_are_matched_as_peft_matches_them(
    tmp_path_factory, targets, excluded, layers, pattern, ranks, module
):
    layers = None if isinstance(targets, str) else layers
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    folder = tmp_path_factory.mktemp("adapter")
    (folder / CONFIG).write_text(json.dumps({"r": 10, "lora_alpha": 8, "rank_pattern": ranks, **fields}))
    config = PeftConfig.read(folder)
    assert config.takes(module) == bool(check_target_module_exists(types.SimpleNamespace(**fields), module))
    assert config.rank_of(module) == ranks.get(get_pattern_key(list(ranks), module), 10)
