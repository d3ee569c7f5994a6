"""Test every fused kernel against its plain form; test_model.py compares that with the recurrence."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from substrate.distributed.groups import start
from substrate.interface.errors import UsageError
from substrate.model import add_lora, build_model, init_weights, token_log_probs
from substrate.ops import kernels
from substrate.ops.scan import chunked_scan
from tests.support.reference import small_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def parallel():
    torch.set_num_threads(1)
    parallel = start({"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    yield parallel
    parallel.shutdown()


grouped_linear = kernels.grouped_linear


def _log_probs_and_gradients(model, tokens):
    model.zero_grad()
    log_probs = token_log_probs(model, tokens, tokens)
    (-log_probs.sum()).backward()
    return log_probs.detach(), [each.grad.clone() for each in model.parameters() if each.grad is not None]


def test_grouped_experts_are_the_sequential_ones(parallel):
    """Tokens, one expert without any among them, and the gradients that go through frozen experts."""
    model = build_model(small_config(pattern="MEE", num_experts=8, moe_ffn_size=32), parallel)
    init_weights(model, seed=1)
    trainable = add_lora(model, 4, 8, 0.0, ["in_proj"], seed=1)
    with torch.no_grad():
        for each in trainable:
            each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(2)).to(each) * 0.1)
    tokens = torch.randint(3, 40, (1, 7), generator=torch.Generator().manual_seed(3)).to(parallel.device)
    with kernels.using(experts="sequential"):
        expected, gradients = _log_probs_and_gradients(model, tokens)
    with kernels.using(experts="grouped"):
        found, others = _log_probs_and_gradients(model, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients
    for ours, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_experts_that_train_or_are_adapted_stay_sequential(parallel, monkeypatch):
    """The grouped product has no gradient for their weights here: using it would silently train nothing."""
    monkeypatch.setattr(kernels, "grouped_linear", None)
    tokens = torch.randint(3, 40, (1, 7)).to(parallel.device)
    for method in ("full", "lora"):
        model = build_model(small_config(pattern="ME"), parallel)
        init_weights(model, seed=1)
        if method == "lora":
            add_lora(model, 4, 8, 0.0, ["experts.up_proj"], seed=1)
        with kernels.using(experts="grouped"):
            assert _log_probs_and_gradients(model, tokens)[1]


def test_experts_that_could_train_are_grouped_while_decoding(parallel, monkeypatch):
    """A model as it is loaded: nothing frozen, and nobody asks for gradients."""
    called = []
    monkeypatch.setattr(
        kernels, "grouped_linear", lambda x, weights, ends: called.append(1) or grouped_linear(x, weights, ends)
    )
    model = build_model(small_config(pattern="ME"), parallel)
    init_weights(model, seed=1)
    with torch.no_grad(), kernels.using(experts="grouped"):
        token_log_probs(
            model,
            torch.randint(3, 40, (1, 7)).to(parallel.device),
            torch.zeros(1, 7, dtype=torch.int64).to(parallel.device),
        )
    assert called


def test_the_weights_of_experts_lie_in_one_piece(parallel):
    """What a file fills is what the grouped product reads."""
    model = build_model(small_config(pattern="E"), parallel)
    init_weights(model, seed=1)
    experts = model.decoder.layers[0].mlp.experts
    torch.testing.assert_close(experts.up_EFU[1], experts.local_experts[1].linear_fc1.weight)
    experts.local_experts[1].linear_fc2.weight.data.fill_(7.0)
    assert (experts.down_EUF[1] == 7.0).all()


def test_what_runs_is_told_with_its_reason(capsys):
    kernels.tell(torch.device("cpu"))
    assert (
        capsys.readouterr().err
        == "kernels on CPU: scan torch, experts sequential, packed attention padded, elementwise eager (no GPU)\n"
    )
    assert kernels.of(torch.device("cpu")) == kernels.Kernels("torch", "sequential", "padded", "eager", "no GPU")


def test_a_process_is_told_its_kernels(monkeypatch):
    monkeypatch.setenv("SUBSTRATE_KERNELS", "elementwise=compiled, experts=grouped")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UsageError, match="TORCHDYNAMO_DISABLE is 1; set that to 0"):
        kernels._of_device.__wrapped__("cpu")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    chosen = kernels._of_device.__wrapped__("cpu")
    assert (chosen.elementwise, chosen.experts, chosen.scan) == ("compiled", "grouped", "torch")
    monkeypatch.setenv("SUBSTRATE_KERNELS", "elementwise=fast")
    with pytest.raises(
        UsageError, match="SUBSTRATE_KERNELS has elementwise=fast; valid is .*elementwise=compiled.eager"
    ):
        kernels._of_device.__wrapped__("cpu")


def test_a_gpu_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    (tmp_path / "triton").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for compiler, lacking in (
        ("/absent/cc", "does not run"),
        ("gcc -DNOT_ONE=", "find Python.h" if not Path(sysconfig.get_paths()["include"], "Python.h").exists() else ""),
    ):
        monkeypatch.setenv("CC", compiler)
        assert (lacking in kernels._lacks_compiler()) if lacking else kernels._lacks_compiler() == ""
    monkeypatch.setenv("CC", "/absent/cc")
    assert kernels._found("cuda").elementwise == "eager"
    assert "nothing is compiled: /absent/cc does not run" in kernels._found("cuda").reason
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert kernels._lacks_compiler() == "TORCHDYNAMO_DISABLE is set"


def test_a_library_that_does_not_load_is_done_without(tmp_path, monkeypatch):
    """mamba-ssm built without its CUDA extension."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda")
    monkeypatch.syspath_prepend(tmp_path)
    chosen = kernels._of_device.__wrapped__("cuda")
    assert (chosen.scan, chosen.experts) == ("torch", "grouped")
    assert chosen.reason.startswith("mamba-ssm cannot be used: No module named 'selective_scan_cuda'")


@pytest.mark.long
def test_the_bench_for_gpus_runs_anywhere():
    """Nobody has a GPU at hand when a recipe gets a new key."""
    arguments = ["--model", "tiny", "--lengths", "32", "--batches", "2", "--new", "4", "--theirs"]
    done = subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" x\n") == 3  # a step without and with recomputation, and decoding


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
@pytest.mark.parametrize("packed", [False, True])
def test_the_triton_scan_is_the_recurrence(packed):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).cuda()

    S, B, H, P, G, N = 200, 2, 8, 16, 2, 32
    arguments = (
        random(S, B, H, P),
        random(S, B, H).sigmoid(),
        -random(H).exp(),
        random(S, B, G, N),
        random(S, B, G, N),
    )
    documents = (torch.arange(S) // 70).unsqueeze(1).expand(S, B).cuda() if packed else None
    found, state = kernels.triton_scan(*arguments, 64, documents)
    expected, last = chunked_scan(*arguments, 64, documents)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state, last, rtol=1e-2, atol=1e-2)
