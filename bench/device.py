"""What bench/gpu.py measures with: parts that may fail, seconds, memory, profiles, and each kernel's error against float64."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from substrate.ops import kernels
from substrate.ops.scan import chunked_scan

failed: list[str] = []
"""The parts that failed so far."""


@contextmanager
def part(name: str) -> Iterator[None]:
    """Tells an error of its body and goes on after it."""
    try:
        yield
    except Exception as error:  # whatever a driver, a compiler or another library raises
        failed.append(name)
        print(
            f"{name:>8} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True
        )
        traceback.print_exc()


def wait(device: torch.device) -> None:
    """Return when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of `repeats` runs after one to warm up. The device's queue is empty before and after each."""
    work()
    taken = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(device, lambda: a @ b)


def empty(device: torch.device) -> None:
    """Free the memory of an earlier part before the next one is measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if device.type == "cuda" else "-"


def profiled(path: Path, device: torch.device, work: Callable[[], Any]) -> None:
    """Run `work` once under torch's profiler, and write which kernels took how long."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        wait(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90))


def kernel_errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of each kernel from its plain form in float64, relative to the largest value."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.double() - expected).abs().max() / expected.abs().max())

    S, B, H, P, G, N, chunk = 512, 2, 16, 64, 4, 128, 128
    scan = (
        random(S, B, H, P),
        random(S, B, H).float().sigmoid(),
        -random(H).float().exp(),
        random(S, B, G, N),
        random(S, B, G, N),
    )
    exact = recurrence(*(each.double() for each in scan))
    errors = {"scan torch": error(chunked_scan(*scan, chunk)[0], exact)}
    if kernels.of(device).scan == "triton":
        errors["scan triton"] = error(kernels.triton_scan(*scan, chunk)[0], exact)
        errors |= step_errors(random, error, device)
    rows, weights, counts = random(96, 64), random(4, 128, 64), [40, 0, 50, 6]
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    each = zip(rows.double().split(counts), weights.double(), strict=True)
    errors["experts grouped"] = error(
        kernels.grouped_linear(rows, weights, ends), torch.cat([x @ weight.T for x, weight in each])
    )
    if kernels.takes_few_rows(12, device):
        ids = torch.tensor([3, 0, 2, 1, 1, 0] * 2, device=device)
        plain = torch.stack([weights[at].double() @ rows[n // 6].double() for n, at in enumerate(ids.tolist())])
        errors["experts few"] = error(kernels.few_rows_linear(rows[:2], weights, ids), plain)
    q, k, v = random(1, 8, 256, 64), random(1, 2, 256, 64), random(1, 2, 256, 64)
    attend = torch.nn.functional.scaled_dot_product_attention
    found = attend(q, k, v, is_causal=True, enable_gqa=True)
    errors["attention"] = error(found, attend(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True))
    return errors


def step_errors(
    random: Callable[..., torch.Tensor], error: Callable[[torch.Tensor, torch.Tensor], float], device: torch.device
) -> dict[str, float]:
    """The same of the kernels of one decoding step: the recurrence of one token, and the gated norm."""
    B, H, P, G, N = 2, 16, 64, 4, 128
    state = torch.randn(B, H, P, N, device=device)
    x, dt, b, c = random(B, H, P), random(B, H), random(B, G, N), random(B, G, N)
    bias, A, D = torch.randn(H, device=device), -torch.rand(H, device=device) - 0.1, torch.randn(H, device=device)
    width = torch.nn.functional.softplus(dt.double() + bias)
    b_heads, c_heads = (t.double().repeat_interleave(H // G, 1) for t in (b, c))
    after = (width * A).exp()[..., None, None] * state.double()
    after = after + (width.unsqueeze(-1) * x.double()).unsqueeze(-1) * b_heads.unsqueeze(-2)
    expected = (after @ c_heads.unsqueeze(-1)).squeeze(-1) + D.double().unsqueeze(-1) * x.double()
    found = kernels.triton_step(state, x, dt, bias, A, D, b, c)
    y, z, weight = random(B, H * P).float(), random(B, H * P), random(H * P)
    gated = (y.double() * torch.nn.functional.silu(z.double())).unflatten(-1, (G, -1))
    normed = torch.nn.functional.rms_norm(gated, gated.shape[-1:], eps=1e-5).flatten(-2) * weight.double()
    return {
        "step triton": max(error(found, expected), error(state, after)),
        "norm triton": error(kernels.triton_gated_norm(y, z, weight, 1e-5, G), normed),
    }


def recurrence(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The scan token by token, in the type of its arguments: h = exp(dt A) h + dt x B^T, y = h C."""
    heads_per_group = x.shape[2] // b.shape[2]
    b, c = (t.repeat_interleave(heads_per_group, dim=2) for t in (b, c))
    state, outputs = x.new_zeros(*x.shape[1:], b.shape[-1]), []
    for x_t, dt_t, b_t, c_t in zip(x, dt, b, c, strict=True):
        state = state * (dt_t * A).exp()[..., None, None] + (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1) * b_t.unsqueeze(-2)
        outputs.append((state @ c_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs)
