"""Full fine-tuning of chosen layers as a change of their weights: y = (W + D) x, W frozen, D zero at the start.

D is float32 whatever the model's type, so it is also the master copy that small updates need. A run must write an
adapter, which is the matrix of rank r nearest to D: its r largest singular values (Eckart and Young 1936).

D is sharded like W, so its gradient is complete on every tensor-parallel rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from substrate.model.layout import Placement
from substrate.model.lora import Adapter, adapters, add_lora


class FullDelta(Adapter):
    """A trainable change D_OI of a weight, zero in the rows of modules that are not targets."""

    def __init__(self, base: Placement, active: Sequence[str]) -> None:
        nn.Module.__init__(self)
        weight = base.tensor
        self.base, self.active = base, tuple(active)
        self.D_OI = nn.Parameter(torch.zeros(weight.shape, dtype=torch.float32, device=weight.device))
        self.D_OI.tensor_model_parallel = True  # type: ignore[attr-defined]  # read by `Parallel.clip_gradients`
        self.D_OI.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
        chosen = torch.tensor([name in active for name in base.names])
        mask_O1 = chosen[base.local_parts()].unsqueeze(1).to(self.D_OI)
        self.register_buffer("mask_O1", mask_O1, persistent=False)

    mask_O1: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O): this rank's part of (W + D) x."""
        return F.linear(x, self.base.tensor + self.delta().to(x.dtype))

    def delta(self) -> Tensor:
        return self.D_OI * self.mask_O1

    def placements(self) -> tuple[Placement, ...]:
        """Returns the placement of D; its whole tensors are named after the weights that they change."""
        base = self.base
        names = tuple(f"delta/{name}" for name in base.names)
        return (Placement(self, "D_OI", names, base.sizes, base.group, base.dim, base.order, base.routed),)


def add_full(model: Any, targets: Sequence[str]) -> None:
    """Freezes the model and adds a `FullDelta` to every module in `targets`. Raises UsageError as `add_lora` does."""
    add_lora(model, 1, 1, 0.0, targets, seed=0)
    for adapter in adapters(model):
        adapter.base.module.adapter = FullDelta(adapter.base, adapter.active)


def to_lora(model: Any, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> float:
    """Replaces every `FullDelta` by the nearest LoRA of `rank`. All ranks call it together.

    Returns the kept share of the changes' squared norm, on this stage of a pipeline.
    """
    deltas = {id(delta.base.module): delta for delta in adapters(model) if isinstance(delta, FullDelta)}
    changed = {key: delta.placements()[0].whole() for key, delta in deltas.items()}
    add_lora(model, rank, alpha, dropout, targets, seed=0)
    kept = total = 0.0
    for adapter in adapters(model):
        base, whole = adapter.base, changed[id(adapter.base.module)]
        factors_A, factors_B = [], []
        for name, delta in zip(base.names, whole, strict=True):
            factor_A, factor_B, squares = _nearest(delta, rank)
            if name in adapter.active:
                factors_A.append(factor_A)
                kept, total = kept + float(squares[:rank].sum()), total + float(squares.sum())
            factors_B.append(factor_B)
        scale = math.sqrt(rank / alpha)  # the adapter multiplies B A with alpha / rank
        place_A, place_B = adapter.placements()
        with torch.no_grad():
            adapter.A_RI.copy_(place_A.local(torch.cat(factors_A) * scale))
            adapter.B_OR.copy_(place_B.local(torch.cat(factors_B) * scale))
    return kept / total if total else 1.0


def _nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (A, B, squared singular values), B A being the matrix of `rank` nearest to `delta`."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    size = min(rank, len(values))
    roots = values[:size].sqrt()
    factor_A = delta.new_zeros(rank, delta.shape[1])
    factor_B = delta.new_zeros(delta.shape[0], rank)
    factor_A[:size] = (roots.unsqueeze(1) * right[:size]).to(delta)
    factor_B[:, :size] = (left[:, :size] * roots).to(delta)
    return factor_A, factor_B, values.square()
