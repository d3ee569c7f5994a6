"""Test the model against the plain recurrence and against itself on other numbers of ranks."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file, save_file

from substrate.data.batches import MicroBatch
from substrate.distributed.groups import Parallel, start
from substrate.interface.errors import DataError, UsageError
from substrate.model import (
    ModelConfig,
    add_lora,
    build_model,
    init_weights,
    load_adapter,
    load_base,
    merge_lora,
    save_adapter,
    save_base,
    token_log_probs,
    token_losses,
)
from substrate.model.layout import layout, named_generator
from substrate.model.lora import TARGETS, adapters
from substrate.model.losses import chunked_log_probs
from substrate.model.published import published_tensors
from substrate.ops.scan import chunked_scan
from substrate.training.pipeline_stages import accumulate_gradients
from tests.support.paths import GOLDEN
from tests.support.ports import free_ports
from tests.support.reference import CONFIGS, small_config

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
# Every way that a run can use two or four ranks. Expert parallelism needs tensor or data parallelism to stand on.
LAYOUTS = {
    "tp2": ALONE | {"tp": 2},
    "dp2": ALONE | {"dp": 2},
    "pp2": ALONE | {"pp": 2},
    "tp2_ep2": ALONE | {"tp": 2, "ep": 2},
    "dp2_ep2": ALONE | {"dp": 2, "ep": 2},
    "tp4": ALONE | {"tp": 4},
    "tp2_dp2": ALONE | {"tp": 2, "dp": 2},
    "tp2_pp2": ALONE | {"tp": 2, "pp": 2},
    "dp2_pp2_ep2": ALONE | {"dp": 2, "pp": 2, "ep": 2},
}
METHODS = ("lora", "full")
NUM_STEPS = 10
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": list(TARGETS)}


@pytest.fixture(scope="module")
def parallel():
    torch.set_num_threads(1)
    parallel = start(ALONE)
    yield parallel
    parallel.shutdown()


def _model(parallel: Parallel, **changes):
    model = build_model(small_config(**changes), parallel)
    init_weights(model, seed=1)
    return model


def _batch(seed: int, sequences: int = 4, length: int = 37):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 20, (sequences, length + 1), generator=generator)
    mask = torch.ones(sequences, length)
    mask[:, :5] = 0.0
    return tokens[:, :-1], tokens[:, 1:], mask


def _accumulate(model, parallel: Parallel, step: int) -> float:
    """Gradients of one step, this rank's part of three micro-batches of unequal length. Returns the loss of the batch."""
    share = slice(parallel.dp_rank, None, parallel.dp)
    parts = [[part[share] for part in _batch(3 * step + n, 2, 20 + 7 * n)] for n in range(3)]
    micro_batches = [MicroBatch(tokens, labels, mask, [], []) for tokens, labels, mask in parts]
    num_targets = parallel.total(sum(float(each.weights_1L.sum()) for each in micro_batches)) / parallel.pp
    loss = accumulate_gradients(
        model,
        micro_batches,
        lambda batch: token_log_probs(model, batch.tokens_1L, batch.labels_1L),
        lambda log_probs, batch: -(log_probs * batch.weights_1L).sum() / num_targets,
    )
    parallel.finalize_gradients(model)
    return parallel.total(loss)


def _train(parallel: Parallel, method: str, folder: Path) -> dict[str, list[float]]:
    """Ten AdamW steps; saves what was trained into `folder`. Losses and gradient norms before clipping."""
    model = _model(parallel)
    lora = LORA | {"dropout": 0.2 if method == "dropout" else 0.0}
    trained = list(model.parameters()) if method == "full" else add_lora(model, seed=2, **lora)
    torch.manual_seed(6)
    # The experts are chosen by the base model's scores: a smaller rate keeps close choices from flipping on rounding.
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if method == "lora" else 1e-4, betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        losses.append(_accumulate(model, parallel, step % 2))
        norms.append(parallel.clip_gradients(model, max_norm=0.5))
        optimizer.step()
    _save(model, method, folder)
    states: list = [None] * parallel.world_size
    torch.distributed.all_gather_object(states, torch.get_rng_state().tolist())
    assert all(state == states[0] for state in states) or parallel.pp > 1, "generators of ranks have parted"
    return {"losses": losses, "norms": norms}


def _save_gradients(parallel: Parallel, method: str, folder: Path) -> None:
    """The gradient of the first batch, in the place of the parameters, as a file; a LoRA's at random B."""
    model = _model(parallel)
    if method == "lora":
        _randomised_lora(model)
    _accumulate(model, parallel, step=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.requires_grad else torch.zeros_like(parameter))
    _save(model, method, folder / "gradients")


def _save(model, method: str, folder: Path) -> None:
    if method == "full":
        save_base(model, folder / "model.safetensors")
    else:
        save_adapter(model, folder)


def _rank_main(rank: int, ports: dict[str, int], folder: Path) -> None:
    """One of two or four ranks: every layout of that size and both methods in turn."""
    torch.set_num_threads(1)
    for name, port in ports.items():
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(_num_ranks(name)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        parallel = start(LAYOUTS[name])
        result = {method: _train(parallel, method, folder / name / method) for method in _trained_in(name)}
        for method in METHODS:
            _save_gradients(parallel, method, folder / name / method)
        if rank == 0:
            (folder / name / "result.json").write_text(json.dumps(result))
        parallel.shutdown()


def _num_ranks(name: str) -> int:
    return LAYOUTS[name]["tp"] * LAYOUTS[name]["pp"] * LAYOUTS[name]["dp"]


def _trained_in(name: str) -> tuple[str, ...]:
    """Four ranks on few cores are slow: their full fine-tuning is compared by its first gradient alone.

    Ranks with different rows or stages draw different masks; all others draw those of one rank.
    """
    masked = ("dropout",) if LAYOUTS[name]["dp"] == LAYOUTS[name]["pp"] == 1 else ()
    return (METHODS if _num_ranks(name) == 2 else METHODS[:1]) + masked


@pytest.fixture(scope="module")
def trained(parallel, tmp_path_factory) -> Path:
    """Where `of_layout` finds what one rank trained, and puts what the layouts train."""
    folder = tmp_path_factory.mktemp("trained")
    alone = {method: _train(parallel, method, folder / "alone" / method) for method in (*METHODS, "dropout")}
    (folder / "alone" / "result.json").write_text(json.dumps(alone))
    for method in METHODS:
        _save_gradients(parallel, method, folder / "alone" / method)
    return folder


@pytest.fixture(scope="module")
def of_layout(trained):
    """The folder of what a layout trained; the same processes train every layout of as many ranks."""

    @functools.cache
    def train_all(num_ranks: int) -> None:
        names = [name for name in LAYOUTS if _num_ranks(name) == num_ranks]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        mp.spawn(_rank_main, (ports, trained), nprocs=num_ranks)

    def folder_of(name: str) -> Path:
        train_all(_num_ranks(name))
        return trained / name

    return folder_of


def _cases(methods_of) -> list:
    """(layout, method); those of four ranks are slow on two cores, and CI runs the last of them."""
    of_four = [name for name in LAYOUTS if _num_ranks(name) == 4]
    marks = {name: [pytest.mark.slow, *([] if name == of_four[-1] else [pytest.mark.long])] for name in of_four}
    return [pytest.param(name, method, marks=marks.get(name, [])) for name in LAYOUTS for method in methods_of(name)]


@pytest.mark.parametrize(("layout", "method"), _cases(_trained_in))
def test_any_layout_trains_as_one_rank(trained, of_layout, layout, method):
    folders = {"alone": trained / "alone", layout: of_layout(layout)}
    alone, other = (json.loads((folder / "result.json").read_text())[method] for folder in folders.values())
    assert alone["losses"][-2] < alone["losses"][0]  # of the same batch
    torch.testing.assert_close(other["losses"], alone["losses"], rtol=0, atol=1e-5)
    torch.testing.assert_close(other["norms"], alone["norms"], rtol=1e-4, atol=0)
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    theirs, ours = (load_file(folder / method / file) for folder in folders.values())
    assert all(tensor.any() for name, tensor in ours.items() if "lora_B" in name and ".experts." not in name)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "method"), _cases(lambda name: METHODS))
def test_any_layout_has_every_gradient_of_one_rank(trained, of_layout, layout, method):
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    ours, theirs = (
        load_file(folder / method / "gradients" / file) for folder in (of_layout(layout), trained / "alone")
    )
    assert set(ours) == set(theirs)
    largest = max(tensor.abs().max() for tensor in theirs.values())
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-7 * largest, name


def _randomised_lora(model, **changes) -> None:
    add_lora(model, seed=3, **LORA | changes)
    with torch.no_grad():
        for adapter in adapters(model):
            _, place = adapter.placements()
            whole = [torch.empty(place.shape(index)) for index in range(len(place.names))]
            for tensor, name in zip(whole, place.names, strict=True):
                tensor.normal_(0, 0.1, generator=named_generator(4, name))
            adapter.B_OR.copy_(place.local(torch.cat(whole)))


def test_scan_equals_the_recurrence():
    S, B, H, P, G, N = 45, 2, 4, 3, 2, 5
    generator = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(S, B, *shape, generator=generator) for shape in [(H, P), (G, N), (G, N)])
    dt, A = torch.rand(S, B, H, generator=generator), -torch.rand(H, generator=generator) - 0.1
    state, expected = torch.zeros(B, H, P, N), []
    for s in range(S):
        b_BHN, c_BHN = (t[s].repeat_interleave(H // G, dim=1) for t in (b, c))
        decay = (dt[s] * A).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[s], x[s], b_BHN)
        expected.append(torch.einsum("bhpn,bhn->bhp", state, c_BHN))
    for chunk_size in (1, 16, 64):
        y, last = chunked_scan(x, dt, A, b, c, chunk_size)
        torch.testing.assert_close(y, torch.stack(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["M", "*", "E", "ME*M"])
def test_packed_documents_do_not_see_one_another(parallel, pattern):
    """Every layer type alone, and together; documents shorter than the convolution, than a chunk, and of several chunks."""
    model = _model(parallel, pattern=pattern)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 64, (length,), generator=generator) for length in (5, 40, 1, 2, 33, 16, 9)]
    tokens, labels = torch.cat(documents)[None], torch.cat(documents)[None].roll(-1)
    with torch.no_grad():
        packed = token_log_probs(model, tokens, labels, [len(each) for each in documents])
        parts = zip(
            tokens.split([len(d) for d in documents], 1), labels.split([len(d) for d in documents], 1), strict=True
        )
        apart = torch.cat([token_log_probs(model, *part) for part in parts], 1)
        mixed = token_log_probs(model, tokens, labels)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)
    assert (mixed - apart).abs().max() > 0.01 or pattern == "E"


def _saved_bytes(run) -> int:
    """Bytes of the storages that autograd keeps from a forward pass, parameters left out."""
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def _gradients(model, log_probs) -> list[torch.Tensor]:
    model.zero_grad()
    (-log_probs.mean()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_log_probabilities_in_pieces_are_those_of_the_whole(parallel):
    model = _model(parallel)
    _randomised_lora(model)
    tokens, labels, _ = _batch(seed=8)
    hidden = model.hidden_states(tokens, None).detach().requires_grad_()
    whole = chunked_log_probs(model.output_layer, hidden, labels)
    pieces = chunked_log_probs(model.output_layer, hidden, labels, chunk_bytes=4 * 64 * 10)  # ten rows at a time
    torch.testing.assert_close(pieces, whole)
    for ours, theirs in zip(_gradients(model, pieces), _gradients(model, whole), strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = model(tokens, None, None).log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_only_wanted_log_probabilities_are_computed(parallel, share):
    """With their gradients; the others are 0 and teach nothing."""
    model = _model(parallel)
    _randomised_lora(model)
    tokens, labels, _ = _batch(seed=8)
    wanted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < share
    whole, some = token_log_probs(model, tokens, labels), token_log_probs(model, tokens, labels, wanted_BL=wanted)
    torch.testing.assert_close(some[wanted], whole[wanted])
    assert not some[~wanted].any() or not share  # one row at least is computed where none is wanted
    for ours, theirs in zip(_gradients(model, some * wanted), _gradients(model, whole * wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_recomputed_layers_give_the_same_gradients_from_less_memory(parallel):
    plain, recomputed = (build_model(small_config(), parallel, recompute=chosen) for chosen in ("none", "full"))
    tokens, labels, _ = _batch(seed=9)
    gradients, saved = [], []
    for model in (plain, recomputed):
        init_weights(model, seed=1)
        _randomised_lora(model)
        saved.append(_saved_bytes(lambda model=model: token_log_probs(model, tokens, labels)))
        gradients.append(_gradients(model, token_log_probs(model, tokens, labels)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert saved[1] < saved[0] / 4


def test_a_merged_adapter_computes_the_same_without_layers(parallel):
    model = _model(parallel)
    _randomised_lora(model)
    tokens, _, _ = _batch(seed=7)
    adapted = model(tokens, None, None)
    merge_lora(model)
    assert not adapters(model)
    torch.testing.assert_close(model(tokens, None, None), adapted, rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_changes_nothing(parallel):
    model = _model(parallel)
    tokens, labels, mask = _batch(seed=6)
    padded = [torch.nn.functional.pad(part, (0, 9)) for part in (tokens, labels, mask)]
    with torch.no_grad():
        plain, _ = token_losses(model, tokens, labels, mask)
        longer, count = token_losses(model, *padded)
    torch.testing.assert_close(longer, plain)
    assert count == mask.sum()


def test_adapter_starts_at_the_base_and_comes_back_from_its_file(parallel, tmp_path):
    model, copy = _model(parallel), _model(parallel)
    tokens, _, _ = _batch(seed=7)
    base_logits = model(tokens, None, None)
    parameters = add_lora(model, seed=3, **LORA | {"targets": ["v_proj", "in_proj"]})
    assert {parameter.shape[-1] for parameter in parameters} == {4, 48}
    torch.testing.assert_close(model(tokens, None, None), base_logits)
    _randomised_lora(copy, targets=["v_proj", "in_proj"])
    save_adapter(copy, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(names) == [
        f"base_model.model.backbone.layers.{layer}.mixer.{module}.lora_{factor}.weight"
        for layer, module in [(0, "in_proj"), (2, "v_proj"), (3, "in_proj")]
        for factor in "AB"
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["in_proj", "v_proj"],
        "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
    }  # fmt: skip
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(tokens, None, None), copy(tokens, None, None), rtol=0, atol=0)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "surplus", "not safetensors"])
def test_a_wrong_adapter_is_refused_by_the_tensors_name(parallel, tmp_path, fault):
    model = _model(parallel)
    add_lora(model, seed=3, **LORA)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.backbone.layers.2.mixer.k_proj.lora_B.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "misshapen":
        tensors[name] = tensors[name][:-1].clone()
    elif fault == "surplus":
        name = "base_model.model.backbone.layers.9.mixer.k_proj.lora_B.weight"
        tensors[name] = torch.zeros(1)
    save_file(tensors, file)
    if fault == "not safetensors":
        name = file.name
        file.write_bytes(b"\x80\x04.")  # a pickle
    with pytest.raises(DataError) as error:
        load_adapter(_model(parallel), tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_base_comes_back_from_published_shards(parallel, tmp_path):
    model = _model(parallel)
    save_base(model, tmp_path / "whole" / "model.safetensors")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for shard in range(2):
        save_file(
            {name: tensors[name] for name in sorted(tensors)[shard::2]}, tmp_path / f"model-0000{shard}.safetensors"
        )
    copy = build_model(small_config(), parallel)
    load_base(copy, tmp_path)
    tokens, _, _ = _batch(seed=8)
    assert torch.equal(copy(tokens, None, None), model(tokens, None, None))
    with pytest.raises(DataError, match="backbone.embeddings.weight has shape"):
        load_base(build_model(small_config(vocab_size=32), parallel), tmp_path)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "surplus"])
@pytest.mark.parametrize("form", ["published", "stacked"])
def test_a_wrong_base_is_refused_by_the_tensors_name(parallel, tmp_path, fault, form):
    save_base(_model(parallel), tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.1.mixer.experts.2.up_proj.weight"
    if form == "stacked":
        name = "model.layers.1.mixer.experts.up_proj"
        experts = [tensors.pop(f"backbone.layers.1.mixer.experts.{n}.up_proj.weight") for n in range(4)]
        tensors[name] = torch.stack(experts)
    if fault == "missing":
        del tensors[name]
        name = "experts.0.up_proj" if form == "stacked" else name
    elif fault == "misshapen":
        tensors[name] = tensors[name][:, :-1].clone()
    else:
        name = "backbone.layers.9.norm.weight"
        tensors[name] = torch.zeros(48)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError) as error:
        load_base(_model(parallel), tmp_path / "model.safetensors")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_the_published_checkpoint_maps_one_to_one(parallel):
    """Names, shapes and types of all 6,243 tensors on the meta device against the index that is checked in."""
    config = ModelConfig.from_dict(yaml.safe_load((CONFIGS / "nemotron3_nano_30b.yaml").read_text()))
    index = json.loads((GOLDEN / "nemotron3_nano_30b.json").read_text())
    expected = {name: (tuple(shape), dtype) for name, (shape, dtype) in index["model"].items()}
    for number, kind in enumerate(index["pattern"]):
        for name, (shape, dtype) in index["backbone.layers.N"][kind].items():
            for expert in range(128) if "{0..127}" in name else [0]:
                full = f"backbone.layers.{number}.{name.replace('{0..127}', str(expert))}"
                expected[full] = (tuple(shape), dtype)
    assert published_tensors(config) == expected
    model = build_model(config, parallel, device="meta")
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    placed = [
        (name, (place.shape(number), dtypes[place.tensor.dtype]))
        for place in layout(model)
        for number, name in enumerate(place.names)
    ]
    assert len(placed) == len(dict(placed)) == 6243
    assert dict(placed) == expected
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == pytest.approx(31.578e9, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patern": "M"}, "unknown key patern"),
        ({"pattern": "MX"}, "letters ME*"),
        ({"hidden_size": "48"}, "model.hidden_size is '48'; it must be of type int"),
        ({"norm_eps": 0}, "must be positive"),
        ({"dtype": "float16"}, "valid are float32, bfloat16"),
        ({"mamba_num_heads": 7}, "a multiple of mamba_num_groups 4"),
        ({"moe_top_k": 9}, "at most num_experts 4"),
    ],
)
def test_a_wrong_configuration_says_what_is_valid(changes, words):
    with pytest.raises(UsageError) as error:
        small_config(**changes)
    assert words in str(error.value)


def test_wrong_layouts_and_targets_say_what_is_valid(parallel):
    with pytest.raises(UsageError, match="mamba_num_groups 4"):
        build_model(small_config(num_attention_heads=8), dataclasses.replace(parallel, tp=8))
    with pytest.raises(UsageError, match="tp x pp x dp must equal"):
        start(ALONE | {"tp": 2})
    with pytest.raises(UsageError, match="cp must be 1"):
        start(ALONE | {"cp": 2})
    with pytest.raises(UsageError, match="lora target up_proj; valid are"):
        add_lora(_model(parallel), seed=0, **LORA | {"targets": ["up_proj"]})
    with pytest.raises(UsageError, match="q_proj; model tiny has no such layer"):
        add_lora(_model(parallel, pattern="ME"), seed=0, **LORA | {"targets": ["q_proj"]})
