"""Prepares megatron-core for hosts without Transformer Engine, and without a GPU. Importing this module does it, once.

megatron-core (tested with 0.16.1 and 0.19.2) is written for CUDA with Transformer Engine. All workarounds are here, each
with its reason, so that a new release of the library is checked in one place. Two cannot be made here and are choices in
`hybrid.py`: torch modules instead of Transformer Engine's, and the all-gather token dispatcher, because all-to-all needs
CUDA streams.
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
    """Imports megatron-core without its kernel fuser, and on a CPU without wandb, which takes half a second to import."""
    compiler, wandb = torch.compile, sys.modules.get("wandb")
    # The library captures `torch.compile` at import as its kernel fuser. On a CPU that would load the compiler stack and
    # need a C++ compiler at the first step; on a GPU it would compile squared ReLU for every number of rows, in seconds.
    torch.compile = _identity  # type: ignore[assignment]
    if ON_CPU:
        # The library imports it for the metrics of its serving engine.
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # The library warns that it falls back to torch, which we want, and that its own imports are deprecated.
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
    """Corrects what megatron-core assumes of its host."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe import moe_utils

    # torch 2.13 renamed two collectives and warns, at each rank's first step, that the library uses the old names.
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{name}` is deprecated", category=FutureWarning)
    # The router reads this name, which is defined only if Transformer Engine is installed.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # The library forks CUDA generators around its dropout. The model has none but LoRA's own, so use the tracker that
    # does nothing.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    if ON_CPU:
        # The library allocates on `torch.cuda.current_device()` in about forty places.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
        # The checkpoint writer calls it before it reads tensors.
        torch.cuda.synchronize = lambda device=None: None


# Makes kernels run in issue order, so that communication overlaps compute; without it the library warns at every start.
# The driver reads it when CUDA starts, so it must be set this early and as an environment variable.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
_import_megatron()
_adapt_megatron()
