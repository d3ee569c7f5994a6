"""Test packed rows: they learn what rows alone learn, with every recipe and weighting, and none sees another."""

import functools
import itertools
import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from substrate.data.batches import Shape, by_row, make_batch
from substrate.data.rows import WEIGHTINGS, Row
from substrate.distributed.groups import Parallel, start
from substrate.model import add_lora, build_model, init_weights, kernels, mamba, token_log_probs
from substrate.model.lora import TARGETS, adapters
from substrate.model.sequences import SHORT, Packing
from substrate.recipes import METHODS, load_recipe
from substrate.training.pipeline_stages import accumulate_gradients
from tests.support import trainings
from tests.support.ports import free_ports
from tests.support.reference import small_config

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
CPU = torch.device("cpu")
LORA = trainings.config("recipe", "sft_lora")["lora"]
PACKED, ALONE = 10**6, 1  # token budgets: all rows of a step in one pass, and a pass for every row
ONE = {axis: 1 for axis in ("tp", "pp", "ep", "cp", "dp")}
LAYOUTS = {
    "dp2": ONE | {"dp": 2},
    "pp2": ONE | {"pp": 2},
    "dp2_ep2": ONE | {"dp": 2, "ep": 2},
    "tp2_ep2": ONE | {"tp": 2, "ep": 2},
}
ROLLOUTS = {"sft_steps": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "decode_batch_size": 16}
OPTIONS = {
    "rft": {**ROLLOUTS, "num_prompts": 6, "samples_per_prompt": 2, "keep_per_prompt": 1, "learning_rate_scale": 0.5},
    "grpo": {**ROLLOUTS, "samples_per_prompt": 2, "updates_per_rollout": 2, "clip": 0.2, "kl_weight": 0.1}
    | {"learning_rate_scale": 0.5},
}
CASES = {
    **{f"sft_lora {weighting}": ("sft_lora", {"loss_weighting": weighting}) for weighting in WEIGHTINGS},
    **{method: (method, {"options": OPTIONS.get(method, {})}) for method in METHODS if method != "sft_lora"},
    "selection": (
        "sft_lora",
        {"holdout_per_family": 4, "selection": {"choice": "best", "last_k": 1, "family_weights": {}}},
    ),
}


def _rows(lengths: list[int]) -> list[Row]:
    """Random ids; about half of each row is learned."""
    chosen = random.Random(5)
    ids = [[chosen.randint(3, 63) for _ in range(length + 1)] for length in lengths]
    families = itertools.cycle(("roman", "text_cipher", "unit_conversion"))
    halves = (len(each) // 2 or 1 for each in ids)
    return [
        Row(str(n), family, each[:half], each[half:], "")
        for n, (each, family, half) in enumerate(zip(ids, families, halves, strict=False))
    ]


def _model(parallel: Parallel):
    model = build_model(small_config(), parallel)
    init_weights(model, seed=1)
    add_lora(model, 4, 8, 0.0, list(TARGETS), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in adapters(model):
            # The same on all ranks of a test that compares packed with padded on these ranks.
            adapter.B_OR.copy_(torch.randn(adapter.B_OR.shape, generator=generator) * 0.1)
    return model


def _gradients(parallel: Parallel, model, passes) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for tokens, labels, weights, lengths in passes:
        loss = -(token_log_probs(model, tokens, labels, lengths) * weights).sum()
        loss.backward()
        total += loss.item()
    parallel.finalize_gradients(model)
    return total, {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance of two tensors of one name, relative to the norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)) for name in one)


def _gradients_apart(parallel: Parallel) -> tuple[float, float]:
    """Losses and gradients of rows in packed lines, against the same rows padded to one length, which is not our layout."""
    rows, tp = _rows([5, 40, 1, 2, 33, 80, 9, 70]), parallel.tp
    model = _model(parallel)
    lines = [
        (each.tokens_1L, each.labels_1L, each.weights_1L, each.lengths)
        for each in make_batch(rows, Shape(130, tp)).micro_batches
    ]
    assert len(lines) == 2
    singles = make_batch(rows, Shape(ALONE)).micro_batches
    padded = [torch.cat([F.pad(each[n], (0, 80 - each[n].shape[1])) for each in singles]) for n in range(3)]
    ours, gradients = _gradients(parallel, model, lines)
    theirs, others = _gradients(parallel, model, [(*padded, None)])
    return abs(ours - theirs) / theirs, _apart(gradients, others)


def _train(case: str, budget: int, folder: Path, inputs: Path, parallel: Parallel) -> Path:
    from substrate.interface.task import Task
    from substrate.training.run import Training

    method, changes = CASES[case]
    # Without dropout; and at a rank that keeps all of a change of whole weights.
    plain = {"lora": LORA | {"rank": 32 if method == "sft_full" else 16}, "learning_rate": 1e-3}
    if parallel.rank == 0:
        settings = {**plain, **changes, "method": method, "micro_batch_tokens": budget}
        trainings.write_task(folder, inputs, tp=parallel.tp, **settings)
        (folder / "out").mkdir()
    dist.barrier()
    task = Task.read(folder / "task.json")
    Training(task, load_recipe(task.recipe), parallel).run()
    return task.out


def _some_samples_are_right() -> None:
    """A random model solves nothing."""
    from substrate.training.rollouts import Sampler

    scored = Sampler._scored

    def kinder(self, row, ids, log_probs, truncated):
        return scored(self, row, ids, log_probs, truncated)._replace(reward=float(sum(ids) % 2))

    Sampler._scored = kinder


def _train_all(folder: Path, inputs: Path, parallel: Parallel) -> None:
    from substrate.training.rollouts import Sampler

    scored = Sampler._scored
    _some_samples_are_right()
    try:
        for case in CASES:
            for name, budget in (("packed", PACKED), ("alone", ALONE)):
                _train(case, budget, folder / case / name, inputs, parallel)
    finally:
        Sampler._scored = scored
    if parallel.rank == 0:
        torch.save(_gradients_apart(parallel), folder / "gradients.pt")
    else:
        _gradients_apart(parallel)


def _rank_main(rank: int, port: int, folder: Path, inputs: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel = start({"tp": 2, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    _train_all(folder, inputs, parallel)
    parallel.shutdown()


def _steps(parallel: Parallel, budget: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of five steps of a model of four layers, with softmax-weighted rows."""
    recipe = load_recipe(
        trainings.config("recipe", "sft_lora") | {"loss_weighting": "min_log_prob", "mix": {"roman": 1.0}}
    )
    model = build_model(small_config(pattern="ME*M"), parallel)
    init_weights(model, seed=1)
    optimizer = torch.optim.AdamW(
        add_lora(model, 4, 8, 0.0, ["in_proj", "q_proj", "shared_experts.up_proj"], 3), lr=1e-2
    )
    shape = Shape(budget, parallel.tp, parallel.dp_rank, parallel.dp)
    batch = make_batch(_rows([5, 40, 1, 2, 33, 80, 9, 70]), shape, "min_log_prob")
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        outputs = functools.partial(recipe.outputs, model)
        loss = parallel.total(accumulate_gradients(model, batch.micro_batches, outputs, recipe.loss))
        parallel.finalize_gradients(model)
        found.append((loss, parallel.clip_gradients(model, 1e9)))
        optimizer.step()
    return found


def _rank_of_layouts(rank: int, ports: dict[str, int], folder: Path) -> None:
    torch.set_num_threads(1)
    for name, port in ports.items():
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        parallel = start(LAYOUTS[name])
        torch.save(_steps(parallel, 70), folder / f"{name}.{rank}")
        parallel.shutdown()


@pytest.mark.slow
def test_other_layouts_learn_the_same(alone, tmp_path):
    """Stages send hidden states of one shape, and ranks that share experts gather tokens of one shape in equally many passes."""
    expected = _steps(alone, ALONE)
    assert expected[-1][0] < 0.95 * expected[0][0]
    mp.spawn(_rank_of_layouts, (dict(zip(LAYOUTS, free_ports(len(LAYOUTS)), strict=True)), tmp_path), nprocs=2)
    for name in LAYOUTS:
        for rank in range(2):
            for found, one in zip(torch.load(tmp_path / f"{name}.{rank}"), expected, strict=True):
                assert found == pytest.approx(one, rel=1e-5), name


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["tp1", "tp2"])
def trained(request, alone, inputs, tmp_path_factory) -> Path:
    """A folder with every case, packed and alone, and the distances of gradients."""
    folder = tmp_path_factory.mktemp("trained")
    if request.param == 1:
        _train_all(folder, inputs, alone)
    else:
        (port,) = free_ports(1)
        mp.spawn(_rank_main, (port, folder, inputs), nprocs=2)
    return folder


def _learned(out: Path, as_product: bool) -> dict[str, torch.Tensor]:
    """The factors of the adapter, or B A: what an SVD divides into factors is the product, and they turn with its rounding."""
    factors = load_file(out / "adapter" / "adapter_model.safetensors")
    if not as_product:
        return factors
    ends = ("lora_A.weight", "lora_B.weight")
    names = [name.removesuffix(ends[0]) for name in factors if name.endswith(ends[0])]
    return {name: factors[name + ends[1]] @ factors[name + ends[0]] for name in names}


@pytest.mark.parametrize("case", CASES)
def test_ten_packed_steps_are_those_of_rows_alone(trained, case):
    ours, theirs = (trained / case / name / "out" for name in ("packed", "alone"))
    assert _apart(*(_learned(out, as_product=case == "sft_full") for out in (ours, theirs))) < 1e-5
    lines = [[line for line in trainings.progress(out) if line["phase"] == "train"] for out in (ours, theirs)]
    for packed, one in zip(*lines, strict=True):
        assert packed["tokens"] == one["tokens"]
        assert packed["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6)
        # Advantages of a group cancel nearly, so that the norm of what remains has the rounding of larger terms.
        assert packed["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5, abs=1e-6)
    candidates = [[line for line in trainings.progress(out) if line["phase"] == "candidate"] for out in (ours, theirs)]
    assert bool(candidates[0]) == (case == "selection")
    for packed, one in zip(*candidates, strict=True):
        assert packed["holdout_loss"] == pytest.approx(one["holdout_loss"], rel=1e-5)
    rollouts = [[line for line in trainings.progress(out) if line["phase"] == "rollout"] for out in (ours, theirs)]
    assert bool(rollouts[0]) == (case == "grpo")
    for packed, one in zip(*rollouts, strict=True):
        assert packed["mixed_groups"] == one["mixed_groups"] > 0


def test_gradients_of_packed_rows_are_those_of_padded_rows(trained):
    loss, gradient = torch.load(trained / "gradients.pt")
    assert loss < 1e-6 and gradient < 1e-5


def _by_full_mask(q, k, v, lengths):
    """The definition: the whole square, with a mask."""
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (numbers[:, None] == numbers).tril()
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


def _heads(length: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, 1, heads, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2))
    return [t.requires_grad_() for t in (q, k, v)]


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=8))
def test_attention_of_a_packed_row_is_that_of_a_full_mask(lengths):
    heads = _heads(sum(lengths))
    ours, theirs = Packing(lengths, CPU).attend(*heads), _by_full_mask(*heads, lengths)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=theirs.dtype)
    for mine, other in zip(*(torch.autograd.grad((t * weights).sum(), heads) for t in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_attention_pays_for_documents_and_not_for_the_row(lengths):
    groups = Packing(lengths, CPU).groups
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    paid = sum(len(group) * lengths[group[0]] ** 2 for group in groups)
    assert paid <= 16 / 9 * sum(length**2 for length in lengths) + len(lengths) * SHORT**2


def test_a_gpu_attends_by_lengths_in_half_precision_alone(monkeypatch):
    """What torch's kernel is given, played by its definition: it runs on a GPU alone."""
    from torch.nn.attention import varlen

    called = []

    def played(q, k, v, ends, ends_k, longest, longest_k, *, window_size, enable_gqa):
        called.append(ends.dtype)
        assert window_size == (-1, 0) and enable_gqa and longest == longest_k == 40 and ends is ends_k
        lengths = ends.diff().tolist()
        return _by_full_mask(q[:, None], k[:, None], v[:, None], lengths)[:, 0].unflatten(1, q.shape[1:])

    monkeypatch.setattr(varlen, "varlen_attn", played)
    lengths = [40, 3, 17]
    with kernels.using(packed="varlen"):
        exact = Packing(lengths, CPU).attend(*_heads(60))
        assert not called
        halves = [t.bfloat16() for t in _heads(60)]
        found = Packing(lengths, CPU).attend(*halves)
    assert called == [torch.int32]
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)


def test_another_document_s_token_changes_no_bit_of_attention_and_convolution():
    lengths, changed = [70, 3, 90, 1, 64, 130], slice(73, 163)  # the third
    packing = Packing(lengths, CPU)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[changed] = False
    results = []
    for is_changed in (False, True):
        heads, window = (
            _heads(sum(lengths), dtype=torch.float32),
            torch.randn(sum(lengths) + 3, 1, 6, generator=torch.Generator().manual_seed(1)),
        )
        with torch.no_grad():
            if is_changed:
                for tensor in heads:
                    tensor[80] += 5.0
                window[3 + 80] += 5.0
        window.requires_grad_()
        context = packing.attend(*heads)
        generator = torch.Generator().manual_seed(2)
        taps, bias = torch.randn(6, 1, 4, generator=generator), torch.randn(6, generator=generator)
        convolved = mamba.causal_conv(window, taps, bias, packing)
        (context.square().sum() + convolved.square().sum()).backward()
        results.append([context, convolved, *(t.grad for t in heads), window.grad[3:]])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("pattern", ["M", "*", "E", "ME*M"])
def test_another_document_s_token_changes_nothing_else_beyond_rounding(alone, pattern):
    """Documents that begin at the ends of chunks of the scan, before and after, and within."""
    model = build_model(small_config(pattern=pattern), alone)
    init_weights(model, seed=1)
    chunk = small_config().mamba_chunk_size
    lengths = [chunk, chunk - 1, 1, 2, chunk + 1, 3 * chunk, 5, 2 * chunk - 3]
    (line,) = make_batch(_rows(lengths), Shape(PACKED)).micro_batches
    outputs = []
    for change in (0, 1):
        tokens = line.tokens_1L.clone()
        place = sum(line.lengths[:2]) + 3
        tokens[0, place] = 3 + (tokens[0, place] + 7 * change) % 60 if change else tokens[0, place]
        with torch.no_grad():
            outputs.append(by_row(line, token_log_probs(model, tokens, line.labels_1L, line.lengths)))
    for number, (before, after) in enumerate(zip(*outputs, strict=True)):
        if number == 2:
            assert not torch.equal(before, after)
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
