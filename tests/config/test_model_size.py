"""Test model arithmetic: counts against published numbers and the real checkpoint, and layouts accepted exactly if they divide."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError
from pipeline.config import model_size, settings
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "substrate" / "base" / "model.safetensors"
TINY = settings.compose().to_dict()["model"]
NANO = settings.compose(["model=nemotron3_nano_30b"]).to_dict()["model"]
ONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1, "judge_tp": 1}
ATTENTION, MAMBA = ["q_proj", "k_proj", "v_proj", "o_proj"], ["in_proj", "out_proj"]
ROUTED = ["experts.up_proj", "experts.down_proj"]
SHARED = ["shared_experts.up_proj", "shared_experts.down_proj"]
small = st.integers(1, 16)
layouts = st.fixed_dictionaries(dict.fromkeys(ONE, st.integers(1, 9)))


def num_lora(model: dict[str, Any], rank: int, targets: list[str]) -> int:
    return sum(math.prod(shape) for shape in model_size.adapter_shapes(model, rank, targets).values())


def test_the_published_size_of_nemotron_3_nano():
    assert model_size.num_parameters(NANO) / 1e9 == pytest.approx(31.578, abs=0.0005)
    assert model_size.mamba_sizes(NANO) == (4096, 10304)
    assert [NANO["pattern"].count(letter) for letter in "ME*"] == [23, 23, 6]


def test_the_published_sizes_of_its_adapters():
    assert num_lora(NANO, 32, ATTENTION) / 1e6 == pytest.approx(3.74, abs=0.005)
    assert num_lora(NANO, 32, MAMBA) / 1e6 == pytest.approx(14.56, abs=0.005)
    assert num_lora(NANO, 32, SHARED) / 1e6 == pytest.approx(9.42, abs=0.005)
    assert num_lora(NANO, 32, ROUTED) / 1e6 == pytest.approx(856.2, abs=0.05)
    assert num_lora(NANO, 32, ["lm_head"]) / 1e6 == pytest.approx(4.28, abs=0.005)


def test_the_base_checkpoint_has_what_is_counted():
    """The file in the image, by its own header: every tensor counted, every LoRA pair around a real weight."""
    if not CHECKPOINT.exists():
        pytest.skip(f"{CHECKPOINT} is not there")
    content = CHECKPOINT.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    assert sum(math.prod(shape) for shape in shapes.values()) == model_size.num_parameters(TINY)
    adapter = model_size.adapter_shapes(TINY, 7, ATTENTION + MAMBA + SHARED + ROUTED + ["lm_head"])
    for name, shape in adapter.items():
        target, side = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        width_out, width_in = shapes[f"{target}.weight"]
        assert shape == {"A.weight": (7, width_in), "B.weight": (width_out, 7)}[side]


@given(small, small, small, small, small, small, st.text("ME*", min_size=1, max_size=12))
def test_parameters_are_the_sum_of_the_tensors(hidden, heads, head_dim, state, experts, ffn, pattern):
    """Counted again from the published names and shapes."""
    model = TINY | {
        "hidden_size": hidden, "mamba_num_heads": heads, "mamba_num_groups": 1, "mamba_head_dim": head_dim, "mamba_state_dim": state,
        "num_attention_heads": heads, "num_query_groups": 1, "attention_head_dim": head_dim, "num_experts": experts,
        "moe_ffn_size": ffn, "moe_shared_expert_ffn_size": 2 * ffn, "pattern": pattern,
    }  # fmt: skip
    inner = heads * head_dim
    channels = inner + 2 * state
    layers = {
        "M": {"norm": (hidden,), "in_proj": (inner + channels + heads, hidden), "conv1d": (channels, 1, model["mamba_conv_kernel"]),
              "conv1d.bias": (channels,), "dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "mixer.norm": (inner,),
              "out_proj": (hidden, inner)},
        "*": {"norm": (hidden,), "q": (inner, hidden), "k": (head_dim, hidden), "v": (head_dim, hidden), "o": (hidden, inner)},
        "E": {"norm": (hidden,), "gate": (experts, hidden), "bias": (experts,), "up": (experts, ffn, hidden), "down": (experts, hidden, ffn),
              "shared.up": (2 * ffn, hidden), "shared.down": (hidden, 2 * ffn)},
    }  # fmt: skip
    whole = [shape for letter in pattern for shape in layers[letter].values()]
    whole += [(512, hidden), (512, hidden), (hidden,)]
    assert model_size.num_parameters(model) == sum(math.prod(shape) for shape in whole)


@given(st.integers(1, 32), st.lists(st.sampled_from(ATTENTION + MAMBA + SHARED), unique=True))
def test_an_adapter_has_a_pair_for_every_target_in_every_layer_of_its_kind(rank, targets):
    shapes = model_size.adapter_shapes(TINY, rank, targets)
    kinds = {name: kind for name, (kind, _, _) in model_size.lora_shapes(TINY).items()}
    assert len(shapes) == 2 * sum(TINY["pattern"].count(kinds[target]) for target in targets)
    for name, shape in shapes.items():
        assert shape[0 if ".lora_A." in name else 1] == rank


def test_an_unknown_target_is_named_with_those_that_are_valid():
    with pytest.raises(
        ConfigError, match="LoRA target 'conv1d' is not known. Valid: q_proj, .*shared_experts.down_proj"
    ):
        model_size.adapter_shapes(TINY, 8, ["q_proj", "conv1d"])


@given(st.sampled_from([TINY, NANO]), st.integers(1, 9))
def test_tensor_parallelism_is_valid_exactly_where_everything_divides(model, tp):
    split = (
        "num_attention_heads",
        "mamba_num_heads",
        "mamba_num_groups",
        "vocab_size",
        "moe_ffn_size",
        "moe_shared_expert_ffn_size",
    )
    groups = model["num_query_groups"]
    divides = all(model[key] % tp == 0 for key in split) and max(tp, groups) % min(tp, groups) == 0
    assert (tp in model_size.valid_tp(model)) == divides
    for axis in ("tp", "judge_tp"):
        layout = ONE | {axis: tp}
        if divides:
            assert model_size.check_layout(model, layout) == layout["tp"]
        else:
            with pytest.raises(
                ConfigError, match=rf"parallelism.{axis} = {tp} does not fit model {model['name']}. Valid: \[1, 2"
            ):
                model_size.check_layout(model, layout)


@given(st.sampled_from([TINY, NANO]), layouts, st.integers(0, 16))
def test_an_accepted_layout_divides_everything_that_it_splits(model, layout, gpus):
    try:
        world = model_size.check_layout(model, layout, gpus)
    except ConfigError as error:
        assert any(f"{name}" in error.what for name in ("parallelism.", "ranks"))
        return
    assert world == layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"]
    assert world % (layout["ep"] * layout["pp"]) == 0
    assert model["num_experts"] % layout["ep"] == 0
    assert len(model["pattern"]) % layout["pp"] == 0
    assert not gpus or world % gpus == 0


@pytest.mark.parametrize(
    ("change", "gpus", "sentence"),
    [
        ({"tp": 3}, 0, r"parallelism.tp = 3 does not fit model tiny. Valid: \[1, 2\]"),
        ({"judge_tp": 4}, 0, r"parallelism.judge_tp = 4 does not fit model tiny. Valid: \[1, 2\]"),
        ({"cp": 0}, 0, "parallelism.cp = 0. Valid: an integer >= 1"),
        ({"ep": 3, "dp": 3}, 0, r"parallelism.ep = 3 does not divide num_experts = 8. Valid: \[1, 2, 4, 8\]"),
        (
            {"ep": 4, "dp": 2},
            0,
            "parallelism.ep x pp = 4 x 1 does not divide the world of 2 ranks .* Raise dp or lower ep",
        ),
        ({"pp": 4}, 0, "parallelism.pp = 4 does not divide 6 layers"),
        (
            {"dp": 3},
            2,
            "3 ranks .* fit into no node, and do not fill nodes of 2 GPUs. Make tp x pp x cp x dp at most cluster.gpus_per_node, or a multiple of it",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_named_with_what_would(change, gpus, sentence):
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        model_size.check_layout(TINY, ONE | change, gpus)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pattern": "MXE"}, "model.pattern = MXE. Valid: letters M, E, *"),
        ({"pattern": ""}, "model.pattern = . Valid"),
        ({"num_query_groups": 3}, "model.num_query_groups = 3. Valid: a divisor of num_attention_heads = 4"),
        ({"mamba_num_groups": 3}, "model.mamba_num_groups = 3. Valid: a divisor of mamba_num_heads = 8"),
        ({"moe_top_k": 9}, "model.moe_top_k = 9. Valid: at most num_experts = 8"),
        ({"num_query_groups": 0}, "model.num_query_groups = 0. Valid: an integer > 0"),
        ({"hidden_size": -96}, "model.hidden_size = -96. Valid: an integer > 0"),
    ],
)
def test_sizes_that_contradict_one_another_are_named(change, sentence):
    with pytest.raises(ConfigError) as error:
        model_size.check_layout(TINY | change, ONE)
    assert str(error.value).startswith(sentence)


def test_the_shipped_layouts_fill_their_machines():
    two_nodes = settings.compose(["experiment=nano_30b", "parallelism=tp4_ep8"]).to_dict()
    assert model_size.check_layout(two_nodes["model"], two_nodes["parallelism"], 8) == 16
    demo = settings.compose().to_dict()
    assert model_size.check_layout(demo["model"], demo["parallelism"]) == 2
