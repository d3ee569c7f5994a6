"""Test the inference model: its passes against those of the modules in training, on one rank and on several."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from substrate.distributed.groups import start
from substrate.inference import decode as decode_module
from substrate.inference.cache import Cache
from substrate.inference.decode import Decoding, decode
from substrate.inference.engine import InferenceModel
from substrate.inference.experts import DENSE_ROWS, Experts
from substrate.inference.steps import Steps, rounded_positions, rounded_rows
from substrate.model import ModelConfig, add_lora, build_model, init_weights
from substrate.model.lora import adapters, named_generator
from tests.support.paths import ROOT
from tests.support.ports import free_ports

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
TINY = yaml.safe_load((ROOT / "hydra_conf" / "model" / "tiny.yaml").read_text())
VALUES = TINY | {"hidden_size": 48, "mamba_chunk_size": 16, "max_sequence_length": 160}
# Four heads to a query group, so that four ranks cut the groups of attention; four groups of the scan, one for a rank.
WIDE = VALUES | {"num_attention_heads": 8, "num_query_groups": 2, "attention_head_dim": 12, "mamba_num_groups": 4}
TARGETS_OF = {
    "M": ["in_proj"],
    "*": ["q_proj", "v_proj", "o_proj"],
    "E": ["shared_experts.up_proj", "experts.up_proj", "experts.down_proj"],
}
TARGETS = [target for targets in TARGETS_OF.values() for target in targets]


@pytest.fixture(scope="module")
def parallel():
    torch.set_num_threads(1)
    parallel = start({"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    yield parallel
    parallel.shutdown()


def adapted(parallel, values: dict, targets: list[str]):
    """A model with random weights and adapters, the same for every layout of ranks."""
    model = build_model(ModelConfig.from_dict(values), parallel)
    init_weights(model, seed=1)
    if targets:
        add_lora(model, rank=4, alpha=8, dropout=0.0, targets=targets, seed=0)
        with torch.no_grad():
            for adapter in adapters(model):
                _, place = adapter.placements()
                whole = [
                    torch.empty(place.shape(index)).normal_(0, 0.1, generator=named_generator(4, name))
                    for index, name in enumerate(place.names)
                ]
                adapter.B_OR.copy_(place.local(torch.cat(whole)))
    return model.eval()


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]


def stepwise(model, prompts: list[list[int]], num_given: int, rounds_sizes: bool = False) -> torch.Tensor:
    """Logits (B, positions, V) after a prompt and after each of the tokens that follow it, which are fed one by one."""
    engine = InferenceModel(model)
    cache = engine.new_cache(len(prompts) + 3, max(map(len, prompts)) + 1)
    steps = Steps(engine, cache, use_graphs=rounds_sizes)
    found = [engine.prompts(cache.take([prompt[:-num_given] for prompt in prompts]), cache)]
    for left in range(num_given, 0, -1):
        longest = max(map(len, prompts)) - left + 1
        cache.tokens_B[: len(prompts)] = torch.tensor([prompt[-left] for prompt in prompts])
        found.append(steps.run(longest))
    return torch.stack(found, 1)


@pytest.mark.parametrize("targets", [[], TARGETS], ids=["base", "adapter"])
@pytest.mark.parametrize(
    ("dtype", "pattern"),
    # Not all layers in bfloat16: rounding would send some tokens of the second mixture to other experts.
    [*((dtype, kind) for dtype in ("float32", "bfloat16") for kind in ("M", "*", "E", "M*")), ("float32", "ME*ME*")],
)
def test_a_step_has_the_logits_of_a_whole_pass(parallel, pattern, targets, dtype):
    """Every layer kind alone, and together; prompts shorter than the convolution and longer than two chunks."""
    there = {target for letter in pattern for target in TARGETS_OF[letter]}
    model = adapted(parallel, VALUES | {"pattern": pattern, "dtype": dtype}, [t for t in targets if t in there])
    prompts = prompts_of((7, 8, 21, 46))
    with torch.no_grad():
        found = stepwise(model, prompts, 5)
        for row, prompt in enumerate(prompts):
            expected = model(torch.tensor([prompt]), None, None)[0, -6:].float()
            close = 1e-4 if dtype == "float32" else 0.03 * float(expected.abs().max())
            torch.testing.assert_close(found[row], expected, rtol=0, atol=close)


def test_the_surplus_rows_and_positions_of_a_graph_change_nothing(parallel):
    """Steps in the sizes of graphs, run eagerly: three prompts in four rows, of which the fourth holds another's leavings."""
    model = adapted(parallel, VALUES, TARGETS)
    prompts = prompts_of((9, 30, 17))
    with torch.no_grad():
        torch.testing.assert_close(stepwise(model, prompts, 4, True), stepwise(model, prompts, 4), rtol=0, atol=1e-5)
    named = [(str(number), prompt) for number, prompt in enumerate(prompts_of((3, 20, 41, 9, 30)))]
    plain = {one.number: one.ids for one in decode(model, named, Decoding(24, 3), (2, 5, 7, 9))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "Steps", lambda *given, **_: Steps(*given, use_graphs=True))
        assert {one.number: one.ids for one in decode(model, named, Decoding(24, 3), (2, 5, 7, 9))} == plain


@given(st.integers(1, 9000), st.integers(1, 600), st.integers(1, 600))
def test_sizes_of_graphs_are_few_and_large_enough(longest, active, more):
    slots = active + more
    assert active <= rounded_rows(active, slots) <= min(2 * active, slots)
    assert longest <= rounded_positions(longest, 9000) <= min(max(2 * longest, 512), 9000)
    assert len({rounded_positions(each, 9000) for each in range(1, 9001)}) <= 8


@pytest.mark.parametrize("num_rows", [1, DENSE_ROWS, DENSE_ROWS + 1])
def test_the_dense_form_of_experts_equals_the_sorted_one(parallel, num_rows):
    engine = InferenceModel(adapted(parallel, VALUES, TARGETS))
    layer = next(mixer for mixer in engine.mixers if isinstance(mixer, Experts))
    rows = torch.randn(num_rows, VALUES["hidden_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        weights, ids = layer._route(rows)
        apart = layer._routed(rows, weights, ids) + layer.shared_down(layer.shared_up(rows).relu().square())
        torch.testing.assert_close(layer._together(rows, weights, ids, *layer.dense), apart, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_released_slots_are_filled_by_the_last_ones(num_slots, data):
    """Whatever ends: the others keep what they hold, and occupy the first slots."""
    cache = Cache([(torch.zeros(num_slots, 3),), ()], num_slots, 9, torch.zeros(()))
    holders: list[int] = []
    for number in range(20):
        if len(holders) < num_slots and data.draw(st.booleans()):
            cache.take([[1] * (number % 8 + 1)])
            cache.layers[0][0][len(holders)] = number
            holders.append(number)
        ended = data.draw(st.lists(st.sampled_from(range(len(holders))), unique=True)) if holders else []
        for source, hole in cache.release(ended):
            holders[hole] = holders[source]
        del holders[cache.num_active :]
        assert cache.layers[0][0][: len(holders), 1].tolist() == holders
        assert cache.lengths_B[: len(holders)].tolist() == [holder % 8 + 1 for holder in holders]


LAYOUTS = {
    "tp4": {"tp": 4, "ep": 1, "dp": 1},  # more ranks than query groups
    "tp2_ep2": {"tp": 2, "ep": 2, "dp": 1},
    "tp2_ep4_dp2": {"tp": 2, "ep": 4, "dp": 2},
}


def _rank_main(rank: int, ports: dict[str, int], folder: Path) -> None:
    torch.set_num_threads(1)
    for name, layout in LAYOUTS.items():
        size = layout["tp"] * layout["dp"]
        if rank >= size:
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[name]))
        parallel = start({**layout, "pp": 1, "cp": 1})
        model = adapted(parallel, WIDE, TARGETS)
        # Data-parallel ranks have different numbers of prompts, and share experts.
        mine = prompts_of((3, 20, 41, 9, 30))[parallel.dp_rank :: parallel.dp + parallel.dp_rank]
        together = parallel.largest if parallel.dp > 1 else None
        named = [(str(number), prompt) for number, prompt in enumerate(mine)]
        done = {one.number: one.ids for one in decode(model, named, Decoding(6, 2), (), together=together)}
        if parallel.tp_rank == 0:
            written = torch.tensor([done[number] for number in range(len(mine))])
            save_file({"written": written}, folder / f"{name}.{parallel.dp_rank}")
        parallel.shutdown()


@pytest.mark.slow
def test_all_layouts_write_the_same_tokens(parallel, tmp_path):
    model = adapted(parallel, WIDE, TARGETS)
    named = [(str(number), prompt) for number, prompt in enumerate(prompts_of((3, 20, 41, 9, 30)))]
    alone = {one.number: one.ids for one in decode(model, named, Decoding(6, 2), ())}
    mp.spawn(_rank_main, (dict(zip(LAYOUTS, free_ports(len(LAYOUTS)), strict=True)), tmp_path), nprocs=4)
    for name, layout in LAYOUTS.items():
        for dp_rank in range(layout["dp"]):
            numbers = list(range(5))[dp_rank :: layout["dp"] + dp_rank]
            written = load_file(tmp_path / f"{name}.{dp_rank}")["written"].tolist()
            assert written == [alone[number] for number in numbers], (name, dp_rank)
