"""Test the compiled elementwise parts against float64 and against the eager ones, and that rows of any number compile once."""

import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch._dynamo.utils import counters

from substrate.ops import fused, kernels, routing
from substrate.ops.sequences import Packing
from tests.support.gradients import drawn
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a CPU"),
]
CPU = torch.device("cpu")
OURS = SimpleNamespace(
    conv_silu=fused.conv_silu,
    add_skip=fused.add_skip,
    gated_norm=fused.gated_norm,
    squared_relu=fused.squared_relu,
    route=routing.route,
)


def plain_conv(x, weight, bias, packing):
    parts = x.split(packing.lengths if packing else [len(x)])
    padded = [F.pad(part.permute(1, 2, 0), (weight.shape[1] - 1, 0)) for part in parts]
    return torch.cat(
        [F.silu(F.conv1d(part, weight[:, None], bias, groups=x.shape[2])).permute(2, 0, 1) for part in padded]
    )


def plain_gated(y, z, weight, eps, groups):
    gated = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(-2) * weight


def plain_route(x, gate, bias, k, scaling):
    scores = (x @ gate.T).sigmoid()
    numbers = (scores + bias).topk(k).indices
    chosen = scores.gather(1, numbers)
    return scaling * chosen / chosen.sum(1, keepdim=True), numbers


PLAIN = SimpleNamespace(
    conv_silu=plain_conv,
    add_skip=lambda y, x, D: y + x * D[:, None],
    gated_norm=plain_gated,
    squared_relu=lambda x, weights=1: F.relu(x).square() * weights,
    route=plain_route,
)


@pytest.fixture(autouse=True)
def compiled(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    # A pool of threads would import torch again.
    with torch._inductor.config.patch(compile_threads=1), kernels.using(elementwise="compiled"):
        yield


def passes(parts, lengths: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """What layers compute between products, and the gradients, for one packing; two documents or more are packed."""
    S, packing = sum(lengths), Packing(lengths, CPU) if len(lengths) > 1 else None
    generator = torch.Generator().manual_seed(S)

    def draw(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(kind)  # the same numbers for all types

    x, z, rows, shared, u = trained = [
        draw(*shape).requires_grad_() for shape in ((S, 1, 24), (S, 1, 24), (3 * S, 20), (S, 1, 28), (S, 8))
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # router and its weights
    weights_Nk, numbers_Nk = parts.route(u.to(wide), draw(6, 8, kind=wide), draw(6, kind=wide) * 0.01, 3, 2.5)
    convolved = parts.conv_silu(x, draw(24, 4), draw(24), packing)
    heads = (4, 6)
    y = parts.add_skip(draw(S, 1, *heads), convolved.unflatten(-1, heads), draw(4)).flatten(-2)
    found = [
        parts.gated_norm(y, z, draw(24), 1e-5, 2),
        parts.squared_relu(rows, weights_Nk.reshape(-1, 1)),
        parts.squared_relu(shared),
        weights_Nk,
    ]
    total = sum((each.to(wide) * draw(*each.shape, kind=wide)).sum() for each in found)
    return [each.detach() for each in (numbers_Nk, *found, *torch.autograd.grad(total, trained))]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """The largest difference of each, as a share of its root mean square."""
    return [
        float((mine.double() - each.double()).abs().max() / each.double().square().mean().sqrt())
        for mine, each in zip(found, exact, strict=True)
    ]


def test_values_gradients_and_one_compilation_for_all_packings():
    draw = random.Random(1)
    packings = [[draw.randint(1, 40) for _ in range(draw.randint(2, 6))] for _ in range(12)]
    num_graphs = []
    for lengths in [*packings, [9], [57]]:
        found = passes(OURS, lengths, torch.float32)
        num_graphs.append(counters["stats"]["unique_graphs"])
        with kernels.using(elementwise="eager"):
            eager = passes(OURS, lengths, torch.float32)
        exact = passes(PLAIN, lengths, torch.float64)
        assert torch.equal(found[0], exact[0])
        assert max(errors(found, exact)) < 1e-5 and max(errors(found, eager)) < 1e-5
    assert num_graphs[0] == 6  # router, convolution, skip, norm, squared ReLU with and without weights
    assert num_graphs[len(packings) - 1] == 6, "a packing was compiled anew"
    assert num_graphs[-1] == 7  # a single document, of whatever length, has a convolution without a mask
    assert not counters["graph_break"]


def test_experts_one_by_one_share_what_is_compiled():
    """On a CPU, and where experts have adapters: any number of rows, one among them, with gradients and without."""
    for grad in (True, False):
        for num_rows in (5, 1, 2, 30, 8):
            x, weights = drawn(num_rows, 12).float().requires_grad_(grad), drawn(num_rows, 1).float()
            with torch.set_grad_enabled(grad):
                y = fused.squared_relu(x, weights)
            torch.testing.assert_close(y, F.relu(x).square() * weights)
    assert counters["stats"]["unique_graphs"] <= 3  # with gradients, without, and one row without


COMPILE = """
import torch
from torch._dynamo.utils import counters
from substrate.ops import fused, kernels
y, z, weight = torch.randn(9, 1, 12, requires_grad=True), torch.randn(9, 1, 12), torch.randn(12)
fused.gated_norm(y, z, weight, 1e-5, 3).sum().backward()
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_a_later_process_finds_in_a_copy_what_the_first_compiled(tmp_path):
    """Which is what a warm start rests on: both directions are there, nothing is compiled, and the copy does not grow."""
    own = {"SUBSTRATE_KERNELS": "elementwise=compiled", "TORCHDYNAMO_DISABLE": "0", "OMP_NUM_THREADS": "1"}
    own |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels" / "inductor")}

    def counted() -> str:
        command = [sys.executable, "-c", COMPILE]
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, **own}, check=True, capture_output=True, text=True
        ).stdout

    def code() -> list[str]:
        return sorted(str(path) for path in (tmp_path / "kernels").rglob("*.so"))

    assert counted() == "2 0\n"
    (tmp_path / "kernels").rename(tmp_path / "store")
    shutil.copytree(tmp_path / "store", tmp_path / "kernels", symlinks=True)
    before = code()
    assert counted() == "0 2\n"
    assert before and code() == before


def test_half_precision_is_as_exact_as_eager():
    lengths = [40, 3, 1, 20]
    found, exact = passes(OURS, lengths, torch.bfloat16), passes(PLAIN, lengths, torch.float64)
    with kernels.using(elementwise="eager"):
        eager = passes(OURS, lengths, torch.bfloat16)
    assert [each.dtype for each in found] == [each.dtype for each in eager]
    for mine, theirs in zip(errors(found, exact), errors(eager, exact), strict=True):
        assert mine <= max(1.2 * theirs, 1e-5)


def test_decoding_takes_the_compiled_form():
    x, weights = drawn(5, 12).float(), drawn(5, 1).float()
    with torch.no_grad():
        torch.testing.assert_close(fused.squared_relu_(x.clone(), weights), F.relu(x).square() * weights)
        assert counters["stats"]["unique_graphs"] == 1
        with kernels.using(elementwise="eager"):
            torch.testing.assert_close(fused.squared_relu_(x.clone(), weights), F.relu(x).square() * weights)
    assert counters["stats"]["unique_graphs"] == 1
