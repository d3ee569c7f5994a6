"""Test packed rows: they learn what rows alone learn, with every recipe and weighting, and on every layout."""

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file

from substrate.data.batches import Shape, make_batch
from substrate.data.rows import WEIGHTINGS
from substrate.distributed.groups import Parallel, start
from substrate.model import add_lora, build_model, init_weights, token_log_probs
from substrate.model.lora import TARGETS, adapters
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
LORA = trainings.config("recipe", "sft_lora")["lora"]
PACKED, ALONE = 10**6, 1  # token budgets: all rows of a step in one pass, and a pass for every row
ONE = {axis: 1 for axis in ("tp", "pp", "ep", "cp", "dp")}
LAYOUTS = {
    "dp2": ONE | {"dp": 2},
    "pp2": ONE | {"pp": 2},
    "dp2_ep2": ONE | {"dp": 2, "ep": 2},
    "tp2_ep2": ONE | {"tp": 2, "ep": 2},
}
ROLLOUTS = {"sft_steps": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48, "decode_batch_size": 16}
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
    rows, tp = trainings.random_rows([5, 40, 1, 2, 33, 80, 9, 70]), parallel.tp
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
    batch = make_batch(trainings.random_rows([5, 40, 1, 2, 33, 80, 9, 70]), shape, "min_log_prob")
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
