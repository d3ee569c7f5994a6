"""What megatron-core needs on a host without a GPU and without Transformer Engine. Importing this module does it, once.

megatron-core (0.16.1 and 0.19.2 were run) is written for CUDA with Transformer Engine. Everything that stands between it and a CPU is here,
each step with its reason, so that a reader finds it at once and a new release of the library is checked in one place.
Two things cannot be done from here and are choices in `hybrid.py`: torch modules instead of Transformer Engine's, and
the all-gather token dispatcher (all-to-all wants CUDA streams).
"""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

ON_CPU = not torch.cuda.is_available()


def _identity(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return function if function is not None else _identity


def _import_megatron() -> None:
    """Imports megatron-core without its kernel fuser, and on a CPU without wandb, which costs half a second there."""
    compiler, wandb = torch.compile, sys.modules.get("wandb")
    # Captured at import as the library's kernel fuser. On a CPU it loads the compiler stack, then wants a C++ compiler at
    # the first step; on a GPU it compiles squared ReLU anew for every number of rows, seconds each.
    torch.compile = _identity  # type: ignore[assignment]
    if ON_CPU:
        # Imported for the metrics of the serving engine.
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # The library about itself: that it falls back to torch, which is what is wanted, and that its own imports
            # are deprecated.
            warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
            warnings.filterwarnings("ignore", message="The following imports from `dynamic_context.py`")
            warnings.filterwarnings("ignore", message="Apex is not installed. Falling back to Torch Norm")
            import megatron.core.models.mamba  # noqa: F401
    finally:
        torch.compile = compiler
        if ON_CPU:
            del sys.modules["wandb"]
            if wandb is not None:
                sys.modules["wandb"] = wandb


def _adapt_megatron() -> None:
    """Puts right what megatron-core assumes of its host."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe import moe_utils

    # torch 2.13 renames two collectives that the library calls by their old names, and says so at each rank's first
    # step.
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{name}` is deprecated", category=FutureWarning)
    # The router looks this name up although only the import of Transformer Engine defines it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # The library forks CUDA generators around dropout. The model has none (LoRA's own dropout aside), so the tracker
    # does nothing.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    if ON_CPU:
        # About forty call sites allocate on `torch.cuda.current_device()`.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
        # The checkpoint writer waits for the device before it reads tensors.
        torch.cuda.synchronize = lambda device=None: None


# Kernels in issue order, so that communication overlaps compute; without it the library warns at every start. Read by
# the driver when CUDA starts, hence an environment variable and this early.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
_import_megatron()
_adapt_megatron()
