"""Chooses the kernels of a device, once, and logs the choice: fused ones where the device has them, else plain torch.

    scan      triton       mamba-ssm's scan, its step and its gated norm, if it is installed and there is a GPU
              torch        `scan.chunked_scan`
    experts   grouped      one `torch.nn.functional.grouped_mm` for all experts of a layer, on a GPU
              sequential   one product per expert: faster on a CPU, and the only kernel for trained or adapted experts
              few rows     `few_rows.py` in Triton for at most FEW_ROWS rows of decoding, where elementwise is compiled
    packed    varlen       attention of packed documents by torch's `varlen_attn`, in half precision on a GPU
              padded       `scaled_dot_product_attention` of padded groups of documents (`sequences.Packing`)
    elementwise  compiled  `torch.compile` of the parts between products (`compiled.py`), on a GPU with Triton and a C compiler
              eager        the same parts with backward passes of their own (`fused.py`)

All other attention is `scaled_dot_product_attention`, which chooses among its own kernels. `using` forces a choice in
tests and benchmarks, the variable SUBSTRATE_KERNELS ("elementwise=compiled") in a process: every kernel is compared with
its plain form in float64 (tests/substrate/model/test_kernels.py, test_compiled.py, bench/gpu.py).
"""

import functools
import importlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from substrate.interface.errors import UsageError


@dataclass(frozen=True)
class Kernels:
    """Names of the chosen kernels, and the reason if one is the plain form."""

    scan: str
    experts: str
    packed: str
    elementwise: str
    reason: str = ""


SCAN_MODULE = "mamba_ssm.ops.triton.ssd_combined"
STEP_MODULE = "mamba_ssm.ops.triton.selective_state_update"
NORM_MODULE = "mamba_ssm.ops.triton.layernorm_gated"
VARLEN_MODULE = "torch.nn.attention.varlen"
CHOICES = {
    "scan": ("triton", "torch"),
    "experts": ("grouped", "sequential"),
    "packed": ("varlen", "padded"),
    "elementwise": ("compiled", "eager"),
}
VARIABLE = "SUBSTRATE_KERNELS"
_forced: dict[str, str] = {}


@functools.cache
def _of_device(kind: str) -> Kernels:
    return replace(_found(kind), **_told(os.environ.get(VARIABLE, "")))


def _found(kind: str) -> Kernels:
    if kind != "cuda":
        return Kernels("torch", "sequential", "padded", "eager", "no GPU")
    packed, scan, reasons = "varlen" if _knows_unequal_lengths() else "padded", "triton", []
    try:  # imported, because a package without its CUDA extension is found but cannot be used
        for module in (SCAN_MODULE, STEP_MODULE, NORM_MODULE):
            importlib.import_module(module)
    except ImportError as error:
        scan = "torch"
        reasons.append(f"mamba-ssm cannot be used: {error}")
    if lacking := _lacks_compiler():
        reasons.append(f"nothing is compiled: {lacking}")
    return Kernels(scan, "grouped", packed, "eager" if lacking else "compiled", "; ".join(reasons))


def _told(text: str) -> dict[str, str]:
    """Returns the kernels that SUBSTRATE_KERNELS names. Raises UsageError for one that does not exist."""
    told = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
    for name, value in told.items():
        if value not in CHOICES.get(name, ()):
            valid = ", ".join(f"{each}={'|'.join(values)}" for each, values in CHOICES.items())
            raise UsageError(f"{VARIABLE} has {name}={value}; valid is a list of {valid}")
    if told.get("elementwise") == "compiled" and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise UsageError(f"{VARIABLE} has elementwise=compiled, and TORCHDYNAMO_DISABLE is 1; set that to 0")
    return told


def _lacks_compiler() -> str:
    """Returns why Triton cannot compile here; empty where it can. Its launchers are C programs that include Python.h."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE is set"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return "there is no C compiler (CC, gcc or clang)"
    headers = sysconfig.get_paths()["include"]
    command = [*compiler.split(), f"-I{headers}", "-fsyntax-only", "-x", "c", "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} does not run: {error}"
    return f"{compiler} does not find Python.h in {headers}" if done.returncode else ""


def _knows_unequal_lengths() -> bool:
    """Whether this GPU runs flash attention (from Ampere on) and this torch has `varlen_attn` with the arguments that we use."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        arguments = inspect.signature(importlib.import_module(VARLEN_MODULE).varlen_attn).parameters
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= set(arguments)


def of(device: torch.device) -> Kernels:
    """Returns the kernels of a device, with those that `using` forces."""
    return replace(_of_device(device.type), **_forced) if _forced else _of_device(device.type)


@contextmanager
def using(**names: str) -> Iterator[None]:
    """Forces kernels by name within the block: `using(experts="grouped")`."""
    before = dict(_forced)
    _forced.update(names)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def tell(device: torch.device) -> None:
    """Logs the chosen kernels and the reason, as one line on stderr."""
    chosen = of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    reason = f" ({chosen.reason})" if chosen.reason else ""
    names = f"scan {chosen.scan}, experts {chosen.experts}, packed attention {chosen.packed}, elementwise {chosen.elementwise}"
    print(f"kernels on {name}: {names}{reason}", file=sys.stderr, flush=True)


def triton_scan(
    x_SBHP: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    B_SBGN: Tensor,
    C_SBGN: Tensor,
    chunk_size: int,
    document_SB: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scan.chunked_scan` with mamba-ssm's Triton kernels; y has the type of x."""
    x, dt, b, c = (t.transpose(0, 1).contiguous() for t in (x_SBHP, dt_SBH, B_SBGN, C_SBGN))
    documents = document_SB.T.to(torch.int32).contiguous() if document_SB is not None else None
    y_BSHP, h_BHPN = importlib.import_module(SCAN_MODULE).mamba_chunk_scan_combined(
        x, dt, A_H.float(), b, c, chunk_size, seq_idx=documents, return_final_states=True
    )
    return y_BSHP.transpose(0, 1), h_BHPN


def triton_step(
    h_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
) -> Tensor:
    """Runs one token of the recurrence with mamba-ssm's kernel, which changes the state. Returns y_BHP with the D term.

    dt_BH: before its bias and softplus.
    """
    H, P, N = h_BHPN.shape[1:]
    y_BHP: Tensor = importlib.import_module(STEP_MODULE).selective_state_update(
        h_BHPN,
        x_BHP.contiguous(),
        dt_BH.unsqueeze(-1).expand(-1, H, P),
        A_H.view(H, 1, 1).expand(H, P, N),
        B_BGN.contiguous(),
        C_BGN.contiguous(),
        D=D_H.view(H, 1).expand(H, P),
        dt_bias=dt_bias_H.view(H, 1).expand(H, P),
        dt_softplus=True,
    )
    return y_BHP


def triton_gated_norm(y_NI: Tensor, z_NI: Tensor, weight_I: Tensor, eps: float, num_groups: int) -> Tensor:
    """RMS norm of y * silu(z) within each group times the weight, by mamba-ssm's kernel, in z's type."""
    y: Tensor = importlib.import_module(NORM_MODULE).rmsnorm_fn(
        y_NI,
        weight_I,
        None,
        z=z_NI.contiguous(),
        eps=eps,
        group_size=y_NI.shape[-1] // num_groups,
        norm_before_gate=False,
    )
    return y.to(z_NI.dtype)


def has_varlen(q: Tensor) -> bool:
    """Whether packed queries like these are attended by `varlen_attention`, which takes neither float32 nor every head."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and of(q.device).packed == "varlen"


def varlen_attention(q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Causal attention within each document, (S, H, D). ends: int32, 0 and each document's end; longest: most tokens."""
    attend = importlib.import_module(VARLEN_MODULE).varlen_attn
    causal = (-1, 0)  # how far a token looks back (no limit) and ahead
    q, k, v = (t.contiguous() for t in (q_SHD, k_SGD, v_SGD))
    context: Tensor = attend(q, k, v, ends, ends, longest, longest, window_size=causal, enable_gqa=True)
    return context


ALIGNMENT = 16  # bytes of which a row's size must be a multiple in a grouped product


def grouped_linear(x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Returns each row of x_TI times its expert's W^T. Rows are sorted by expert; `ends_E` (int32) has each one's end."""
    if any(size * x_TI.element_size() % ALIGNMENT for size in weight_EOI.shape[1:]):
        parts = x_TI.split(ends_E.diff(prepend=ends_E.new_zeros(1)).tolist())
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True)])
    return F.grouped_mm(x_TI.contiguous(), weight_EOI.transpose(1, 2), offs=ends_E)


FEW_ROWS = 32  # most rows for which reading each one's weights by itself takes less time than a grouped product


def takes_few_rows(num_rows: int, device: torch.device) -> bool:
    """Whether so many rows are multiplied by `few_rows_linear`, which needs a GPU for which Triton can compile."""
    return num_rows <= FEW_ROWS and device.type == "cuda" and of(device).elementwise == "compiled"


def few_rows_linear(x_NI: Tensor, weight_EOI: Tensor, ids_T: Tensor) -> Tensor:
    """`few_rows.few_rows_linear`: each of T rows, in any order, times the W^T of its expert ids_T[t]."""
    y_TO: Tensor = importlib.import_module("substrate.ops.few_rows").few_rows_linear(x_NI, weight_EOI, ids_T)
    return y_TO
