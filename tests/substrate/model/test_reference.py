"""Test the model against transformers and peft, which share no code with it: logits, gradients, adapters both ways."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file, save_file

from substrate.distributed.groups import Parallel, start
from substrate.model import ModelConfig, add_lora, build_model, load_adapter, load_base, save_adapter, token_log_probs
from substrate.model.lora import TARGETS
from substrate.model.published import published_tensors
from substrate.model.weights import save_base
from tests.support.ports import free_ports
from tests.support.reference import CONFIGS as MODELS
from tests.support.reference import load_reference, random_reference, reference_config, small_config, with_deltas

peft = pytest.importorskip("peft")
# megatron-core 0.16.1, and peft with transformers, calling themselves in ways that they deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
CONFIGS = {
    "plain": small_config(),
    "published order": small_config(pattern="MEMEM*EME", moe_top_k=3),
    "no attention": small_config(pattern="MEME", mamba_num_groups=2),
    "one group": small_config(pattern="M*E", num_attention_heads=4, num_query_groups=4, mamba_num_groups=8),
    "many experts": small_config(pattern="EM*E", num_experts=16, moe_top_k=6, moe_router_scaling=1.0),
    "wide state": small_config(mamba_state_dim=40, mamba_head_dim=12, mamba_conv_kernel=3, mamba_chunk_size=7),
    "long chunk": small_config(pattern="M*M", hidden_size=64, mamba_chunk_size=200, norm_eps=1e-3, moe_ffn_size=32),
}
LAYOUTS = {"tp2": ALONE | {"tp": 2}, "tp2_ep2": ALONE | {"tp": 2, "ep": 2}}
# peft 0.21 refuses out_proj on nemotron_h (the fused kernel reads its weight past a LoRA), and transformers 5 has the
# routed experts in one tensor: these are checked by adding the delta by hand.
PEFT_TARGETS = [target for target in TARGETS if target != "out_proj" and not target.startswith("experts.")]


@pytest.fixture(scope="module")
def parallel():
    torch.set_num_threads(1)
    parallel = start(ALONE)
    yield parallel
    parallel.shutdown()


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """A folder for each configuration, as transformers' `save_pretrained` writes it, with logits of one batch."""
    folder = tmp_path_factory.mktemp("references")
    for name, config in CONFIGS.items():
        model = random_reference(config)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            save_file({"logits": model(_tokens()).logits}, folder / name / "expected")
    return folder


@pytest.fixture(scope="module")
def sharded(references) -> Path:
    """The same logits from two ranks, beside the expected ones."""
    mp.spawn(_rank_main, (free_ports(len(LAYOUTS)), references), nprocs=2)
    return references


def _rank_main(rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    for port, (layout, sizes) in zip(ports, LAYOUTS.items(), strict=True):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        parallel = start(sizes)
        for name, config in CONFIGS.items():
            logits = _logits(config, parallel, folder / name)
            if rank == 0:
                save_file({"logits": logits}, folder / name / layout)
        parallel.shutdown()


def _logits(config: ModelConfig, parallel: Parallel, folder: Path) -> torch.Tensor:
    model = build_model(config, parallel)
    load_base(model, folder)
    with torch.no_grad():
        return model.eval()(_tokens(), None, None, runtime_gather_output=True)


def _tokens(seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 64, (3, 130), generator=torch.Generator().manual_seed(seed))


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(references, parallel, name):
    expected = load_file(references / name / "expected")["logits"]
    _assert_close(_logits(CONFIGS[name], parallel, references / name), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_two_ranks_equal_transformers(sharded, name, layout):
    _assert_close(*(load_file(sharded / name / file)["logits"] for file in (layout, "expected")))


def test_our_checkpoint_loads_into_transformers(parallel, references, tmp_path):
    model = build_model(CONFIGS["plain"], parallel)
    load_base(model, references / "plain")
    save_base(model, tmp_path)
    reference_config(CONFIGS["plain"]).save_pretrained(tmp_path)
    with torch.no_grad():
        logits = load_reference(tmp_path)(_tokens()).logits
    _assert_close(logits, load_file(references / "plain" / "expected")["logits"])


def test_published_shapes_are_those_of_transformers():
    config = ModelConfig.from_dict(yaml.safe_load((MODELS / "nemotron3_nano_30b.yaml").read_text()))
    with torch.device("meta"):
        theirs = random_reference(config).state_dict()
    shapes = {}
    for name, tensor in theirs.items():
        name = name.replace("model.", "backbone.", 1)
        if ".mixer.experts." in name:  # stacked
            before, _, part = name.rpartition(".")
            shapes.update({f"{before}.{expert}.{part}.weight": tensor.shape[1:] for expert in range(len(tensor))})
        else:
            shapes[name] = tensor.shape
    assert {name: shape for name, (shape, _) in published_tensors(config).items()} == shapes


def _adapted(parallel: Parallel, references: Path, targets: list[str], name: str = "plain"):
    """Our model with the reference's weights and an adapter whose B is not zero."""
    model = build_model(CONFIGS[name], parallel)
    load_base(model, references / name)
    torch.manual_seed(7)
    for parameter in add_lora(model, 4, 8.0, 0.0, targets, seed=3):
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_our_adapter_loads_into_peft(parallel, references, tmp_path):
    model = _adapted(parallel, references, PEFT_TARGETS)
    save_adapter(model, tmp_path, prefix="model")
    adapted = peft.PeftModel.from_pretrained(load_reference(references / "plain"), tmp_path).eval()
    with torch.no_grad():
        _assert_close(model.eval()(_tokens(), None, None), adapted(_tokens()).logits)


def test_an_adapter_of_peft_loads_here(parallel, references, tmp_path):
    torch.manual_seed(9)
    lora = peft.LoraConfig(r=3, lora_alpha=12, target_modules=PEFT_TARGETS, init_lora_weights=False)
    adapted = peft.get_peft_model(load_reference(references / "plain"), lora).eval()
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    model = build_model(CONFIGS["plain"], parallel)
    load_base(model, references / "plain")
    load_adapter(model, tmp_path)
    with torch.no_grad():
        _assert_close(model.eval()(_tokens(), None, None), adapted(_tokens()).logits)


@pytest.mark.parametrize("name", ["plain", "published order", "many experts"])
def test_every_lora_gradient_equals_the_references(parallel, references, tmp_path, name, capsys):
    """All targets at random B: the reference computes with W + scale B A, and autograd does the rest."""
    model = _adapted(parallel, references, list(TARGETS), name)
    save_adapter(model, tmp_path)
    pairs = {key: tensor.requires_grad_() for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    reference = load_reference(references / name)
    tokens = _tokens()
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    logits = torch.func.functional_call(reference, with_deltas(reference, pairs, 8.0 / 4), (inputs,)).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    theirs.backward()

    ours = -token_log_probs(model, inputs, labels).mean()
    ours.backward()
    parallel.finalize_gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    save_adapter(model, tmp_path / "gradients")
    gradients = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert set(gradients) == set(pairs)
    untouched = [key for key, pair in pairs.items() if pair.grad is None or not pair.grad.any()]
    worst = max(
        float((gradients[key] - pairs[key].grad).norm() / pairs[key].grad.norm())
        for key in pairs
        if key not in untouched
    )
    with capsys.disabled():
        print(
            f" {name}: {len(pairs)} gradients, {len(untouched)} of experts without tokens, worst {worst:.1e} ", end=""
        )
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert worst < 1e-4
    assert not any(gradients[key].any() for key in untouched)
    assert len(untouched) < len(pairs) / 4
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
