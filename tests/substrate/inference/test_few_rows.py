"""Test the product of a few rows: the Triton kernel in its interpreter, and the layer that calls it."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from substrate.inference.experts import Experts
from substrate.model import add_lora, build_model, init_weights
from substrate.model.lora import adapters
from substrate.ops import kernels
from tests.support.paths import ROOT
from tests.support.reference import small_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
COMPARE = """
import torch
from substrate.ops.few_rows import few_rows_linear
generator = torch.Generator().manual_seed(0)
for rows, each, experts, outputs, inputs, kind, close in (
    (1, 6, 8, 24, 40, "float32", 1e-6), (3, 2, 5, 17, 1100, "float32", 1e-6), (2, 3, 4, 32, 512, "bfloat16", 1e-2), (1, 1, 1, 1, 1, "float32", 1e-6)
):
    x = torch.randn(rows, inputs, generator=generator).to(getattr(torch, kind))
    weight = torch.randn(experts, outputs, inputs, generator=generator).to(x.dtype)
    ids = torch.randint(experts, (rows * each,), generator=generator)
    expected = torch.stack([weight[at].double() @ x[row // each].double() for row, at in enumerate(ids.tolist())])
    found = few_rows_linear(x, weight, ids)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=close * float(expected.abs().max()))
print("equal")
"""


def plain(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    each = len(ids) // len(x)
    return torch.stack([weight[at] @ x[row // each] for row, at in enumerate(ids.tolist())])


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed, whose interpreter runs the kernel on a CPU",
)
def test_the_kernel_multiplies_each_row_by_its_experts_weight():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_of_few_rows_is_the_sorted_one(alone, monkeypatch, dtype):
    """With the kernel's plain form in its place; in bfloat16 the experts' adapters are not merged."""
    model = build_model(small_config(pattern="E", num_experts=8, moe_ffn_size=32, dtype=dtype), alone)
    init_weights(model, seed=1)
    add_lora(model, 4, 8, 0.0, ["experts.up_proj", "experts.down_proj"], seed=1)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.B_OR.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        layer = Experts(model.decoder.layers[0].mlp, model.pg_collection)
        x = torch.randn(3, model.architecture.hidden_size, generator=torch.Generator().manual_seed(3)).to(
            layer.up.weight_EOI.dtype
        )
        layer.dense = None
        expected, called = layer._run(x), []
        monkeypatch.setattr(kernels, "takes_few_rows", lambda rows, device: True)
        monkeypatch.setattr(kernels, "few_rows_linear", lambda *given: called.append(1) or plain(*given))
        found = layer._run(x)
    assert len(called) == (2 if dtype == "float32" else 6)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=(1e-5 if dtype == "float32" else 3e-2) * float(expected.abs().max())
    )


def test_few_rows_need_a_gpu():
    assert not kernels.takes_few_rows(1, torch.device("cpu"))
    with kernels.using(elementwise="compiled"):
        assert kernels.takes_few_rows(kernels.FEW_ROWS, torch.device("cuda"))
        assert not kernels.takes_few_rows(kernels.FEW_ROWS + 1, torch.device("cuda"))
