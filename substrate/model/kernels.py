"""Which kernels a device runs: the fused ones where it has them, plain torch elsewhere. Chosen once, and told once.

    scan      triton       mamba-ssm's `mamba_chunk_scan_combined`, where it is installed beside a GPU
              torch        `mamba.chunked_scan`
    experts   grouped      one `torch.nn.functional.grouped_mm` for all experts of a layer, on a GPU
              sequential   one product an expert: faster on a CPU, and the only one that trains experts or adapts them

Attention is `scaled_dot_product_attention` everywhere, which chooses among its own. `using` lets a test or a benchmark
choose: every kernel is compared with its plain form in float64 (tests/test_kernels.py, bench/gpu.py).
"""

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Kernels:
    """Names of the chosen kernels, and why where one is the plain form."""

    scan: str
    experts: str
    reason: str = ""


SCAN_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_forced: dict[str, str] = {}


@functools.cache
def _of_device(kind: str) -> Kernels:
    if kind != "cuda":
        return Kernels("torch", "sequential", "no GPU")
    try:  # imported and not looked for: it is there without its CUDA extension, too, and then cannot be used
        importlib.import_module(SCAN_MODULE)
    except ImportError as error:
        return Kernels("torch", "grouped", f"mamba-ssm cannot be used: {error}")
    return Kernels("triton", "grouped")


def of(device: torch.device) -> Kernels:
    """The kernels of a device, or those that `using` forces."""
    return replace(_of_device(device.type), **_forced) if _forced else _of_device(device.type)


@contextmanager
def using(**names: str) -> Iterator[None]:
    """Force kernels by name within the block: `using(experts="grouped")`."""
    before = dict(_forced)
    _forced.update(names)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def tell(device: torch.device) -> None:
    """One line of log: what runs here, and why."""
    chosen = of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    reason = f" ({chosen.reason})" if chosen.reason else ""
    print(f"kernels on {name}: scan {chosen.scan}, experts {chosen.experts}{reason}", file=sys.stderr, flush=True)


def triton_scan(
    x_SBHP: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    B_SBGN: Tensor,
    C_SBGN: Tensor,
    chunk_size: int,
    document_SB: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mamba.chunked_scan` by mamba-ssm's Triton kernels: the same arguments and results, y in x's type."""
    x, dt, b, c = (t.transpose(0, 1).contiguous() for t in (x_SBHP, dt_SBH, B_SBGN, C_SBGN))
    documents = document_SB.T.to(torch.int32).contiguous() if document_SB is not None else None
    y_BSHP, h_BHPN = importlib.import_module(SCAN_MODULE).mamba_chunk_scan_combined(
        x, dt, A_H.float(), b, c, chunk_size, seq_idx=documents, return_final_states=True
    )
    return y_BSHP.transpose(0, 1), h_BHPN


def grouped_linear(x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows x_TI stand expert by expert, each expert's up to its place in `ends_E` (int32): row times its expert's W^T."""
    return F.grouped_mm(x_TI.contiguous(), weight_EOI.transpose(1, 2), offs=ends_E)
