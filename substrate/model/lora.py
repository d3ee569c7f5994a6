"""Low-rank adapters on tensor-parallel linear layers: y = W x + (alpha / r) B A x, W frozen (LoRA, arXiv:2106.09685).

One matrix here can be several modules of the published checkpoint: `linear_qkv` interleaves q_proj, k_proj and v_proj.
Each of them has its own A; B has one row for each row of W, and a fixed mask sends a row to its module's A. `in_proj`
is one module whose rows [z|x|B|C|dt] are sharded part by part, and so are the rows of its B. `layout.py` has both
orders.

Routed experts have an adapter only if a target names them: 856 M parameters in the 30B model at rank 32. Their layers
neither gather nor reduce (the token dispatcher does), so neither do their adapters, and their gradients are summed over
the ranks that hold the same expert.
"""

import math
import zlib
from collections.abc import Container, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from substrate.interface.errors import UsageError
from substrate.interface.peft_config import TARGETS, target_of
from substrate.model.config import ModelConfig
from substrate.model.layout import Placement, layout, named_generator
from substrate.model.published import published_tensors
from substrate.ops.low_rank import low_rank_linear


class Adapter(nn.Module):
    """The two factors of one weight: A_RI (R = rank x adapted modules, I inputs here) and B_OR (O outputs here)."""

    mask_OR: Tensor | None  # of a fused weight: alpha / rank where the row of B belongs to the block of A, else 0

    def __init__(self, base: Placement, active: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        weight = base.tensor
        self.base = base
        self.active = tuple(active)  # the members of base.names that have an adapter, in the order of A's blocks
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.pass_seed: int | None = (
            None  # of a routed expert's masks in this pass, which `Experts` draws for all of them
        )
        self._stream = zlib.crc32(" ".join(base.names).encode())  # so that layers with one seed have different masks
        # Always float32, because fine-tuning updates are below the resolution of bfloat16.
        factory: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
        self.A_RI = nn.Parameter(torch.empty(rank * len(active), weight.shape[1], **factory))
        self.B_OR = nn.Parameter(torch.zeros(weight.shape[0], rank, **factory))
        sharded, whole = (self.B_OR, self.A_RI) if base.dim == 0 else (self.A_RI, self.B_OR)
        # `Parallel` reads these marks: a shard counts once in the gradient norm, and the whole factor's gradient is a
        # partial sum.
        sharded.tensor_model_parallel = True  # type: ignore[attr-defined]
        whole.sequence_parallel = True  # type: ignore[attr-defined]
        for factor in (sharded, whole):  # False for a routed expert's, which differs between data-parallel ranks
            factor.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
        mask_OR = None
        if len(base.names) > 1:
            columns = torch.tensor([base.names.index(name) for name in active])
            rows = (base.local_parts().unsqueeze(1) == columns).repeat_interleave(rank, dim=1)
            mask_OR = alpha / rank * rows.to(**factory)
        self.register_buffer("mask_OR", mask_OR, persistent=False)
        self._casts: dict[str, Any] = {"of": None}  # what `_cast` made, and of which versions of the factors

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O): this rank's part of W x + (alpha / r) B A x; in training with dropout on A's input."""
        rows = x.flatten(0, -2)
        if self.training and self.dropout:
            # In place, so the sum needs no second pass over y. y is not a view, whose gradient autograd would copy.
            y = F.linear(rows, self.base.tensor)
            low_rank = F.linear(self._dropped(rows), self.A_RI.to(x.dtype))
            y.addmm_(low_rank, self._wide_B().to(x.dtype).T)
        else:
            mask = self.alpha / self.rank if self.mask_OR is None else self.mask_OR
            y = low_rank_linear(rows, self.base.tensor, self.A_RI, self.B_OR, self._cast(x.dtype), mask)
        return y.unflatten(0, x.shape[:-1])

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns `factors`, which are made again only when the optimizer has changed A or B: once a step."""
        casts, state = self._casts, (self.A_RI._version, self.B_OR._version, dtype)
        if state != casts["of"]:
            with torch.inference_mode(False), torch.no_grad():  # a pass that trains must be able to keep them
                casts.update(of=state, pair=self.factors(dtype))
        pair: tuple[Tensor, Tensor] = casts["pair"]
        return pair

    def _dropped(self, rows: Tensor) -> Tensor:
        """Returns A's inputs (N, I) with a share `dropout` of them zero and the others scaled up.

        The mask is that of one rank that holds the whole matrix, and this rank takes its columns of it. Its seed is drawn
        from the host's generator, once for each layer whose input tensor-parallel ranks share, so that their generators
        stay in one state. How many rows there are, which differs between routed experts, moves no generator.
        Recomputation sets the host's generator back, and so makes the same mask.
        """
        drawn = draw_seed() if self.pass_seed is None else self.pass_seed
        generator = torch.Generator(rows.device).manual_seed((drawn + self._stream) % 2**62)
        group, width = self.base.group, rows.shape[1]
        first, whole = (width * group.rank(), width * group.size()) if self.base.dim == 1 else (0, width)
        kept = torch.rand(len(rows), whole, generator=generator, device=rows.device) >= self.dropout
        return rows * kept[:, first : first + width] / (1 - self.dropout)

    def delta(self) -> Tensor:
        """Returns what merging adds to this rank's part of W: (alpha / r) B A, (O, I) in float32."""
        return self._wide_B() @ self.A_RI

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns A_RI and the scaled B_OR, with R = rank x adapted modules, so that B A is `delta`; in this type."""
        return self.A_RI.detach().to(dtype), self._wide_B().detach().to(dtype)

    def _wide_B(self) -> Tensor:
        """Repeats B for every block of A, scaled by alpha / r, with zeros where a row belongs to another block."""
        if self.mask_OR is None:
            return self.B_OR * (self.alpha / self.rank)
        return self.B_OR.repeat(1, len(self.active)) * self.mask_OR

    def peft_targets(self) -> list[str]:
        """Returns PEFT's names of the adapted modules: the ends of their names, with the number of a routed expert."""
        return [_module(name) for name in self.active]

    def placements(self) -> tuple[Placement, ...]:
        """Returns the placements of A and B, with PEFT's names. B names all modules of the weight, adapted or not."""
        base = self.base
        names_A = tuple(adapter_name(name, "A") for name in self.active)
        names_B = tuple(adapter_name(name, "B") for name in base.names)
        sizes_A = (self.rank,) * len(names_A)
        dim_A, dim_B = (None, 0) if base.dim == 0 else (1, None)
        return (
            Placement(self, "A_RI", names_A, sizes_A, base.group, dim_A, routed=base.routed),
            Placement(self, "B_OR", names_B, base.sizes, base.group, dim_B, base.order, base.routed),
        )


def draw_seed() -> int:
    """Draws a seed of dropout masks from the host's generator, whose state a checkpoint keeps for each rank."""
    return int(torch.randint(2**62, ()))


def adapter_name(weight_name: str, factor: str) -> str:
    """Returns the name that factor "A" or "B" of a checkpoint weight has in an adapter file."""
    return f"base_model.model.{weight_name.removesuffix('.weight')}.lora_{factor}.weight"


def add_lora(
    model: Any, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
) -> list[nn.Parameter]:
    """Freezes the model, adds an adapter to every module in `targets` and returns the new parameters.

    A is uniform in +-1/sqrt(inputs), drawn whole from a generator seeded by (seed, name), so it does not depend on the
    number of ranks; B is zero. Raises UsageError for a target that is not in TARGETS or that the model lacks.
    """
    if wrong := sorted(set(targets) - set(TARGETS)):
        raise UsageError(f"lora target {', '.join(wrong)}; valid are {', '.join(TARGETS)}")
    present = {_target(name) for name in published_tensors(model.architecture)}
    if lacking := sorted(set(targets) - present):
        raise UsageError(
            f"lora target {', '.join(lacking)}; model {model.architecture.name} has no such layer: leave it out"
        )
    return add_pairs(model, rank, alpha, dropout, set(adapted_modules(model.architecture, targets)), seed)


def add_pairs(
    model: Any, rank: int, alpha: float, dropout: float, names: Container[str], seed: int
) -> list[nn.Parameter]:
    """Does what `add_lora` says for weights by their published names."""
    model.requires_grad_(False)
    for base in layout(model):
        active = [name for name in base.names if name in names]
        if not active:
            continue
        adapter = Adapter(base, active, rank, alpha, dropout)
        place_A, _ = adapter.placements()
        whole = [_uniform(place_A.shape(index), seed, name) for index, name in enumerate(place_A.names)]
        with torch.no_grad():
            adapter.A_RI.copy_(place_A.local(torch.cat(whole)))
        base.module.adapter = adapter
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge_lora(model: nn.Module) -> None:
    """Adds every adapter to its weight and removes it, so that the model computes the same without adapters."""
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.base.tensor.add_(adapter.delta().to(adapter.base.tensor.dtype))
            adapter.base.module.adapter = None  # type: ignore[assignment]


def adapters(model: nn.Module) -> list[Adapter]:
    """Returns every adapter of the model, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, Adapter)]


def trainable_placements(model: nn.Module) -> list[Placement]:
    """Returns the placements of all trained tensors: the adapters' factors if there are adapters, else the model's own."""
    factors = [place for adapter in adapters(model) for place in adapter.placements()]
    return factors or [place for place in layout(model) if place.tensor.requires_grad]


def learning_targets(model: nn.Module) -> dict[str, bool]:
    """Returns for each adapted target on this rank whether a gradient that is not zero reached it in any layer.

    The gradients must be finalized. One tensor alone proves little: A has none while B is zero, and an expert without
    tokens has none at all.
    """
    learns: dict[str, bool] = {}
    for adapter in adapters(model):
        for place in adapter.placements():
            gradient, owners = place.tensor.grad, place.local_parts()
            for index, name in enumerate(place.names):
                weight = _weight_of(name)
                if weight not in adapter.active:
                    continue  # rows of a fused weight whose own module has no adapter
                target = _target(weight)
                if gradient is not None and not learns.get(target):
                    learns[target] = bool(gradient[(owners == index).to(gradient.device)].any())
                learns.setdefault(target, False)
    return learns


def adapted_modules(config: ModelConfig, targets: Container[str]) -> list[str]:
    """Returns the names of the weights of the whole model that `targets` give an adapter."""
    return [name for name in published_tensors(config) if _target(name) in targets]


def _target(weight_name: str) -> str:
    """Returns a weight's target: backbone.layers.3.mixer.experts.7.up_proj.weight -> experts.up_proj."""
    return target_of(weight_name.removesuffix(".weight"))


def _weight_of(name: str) -> str:
    """Returns the weight that a trained tensor changes: the inverse of `adapter_name`, and of the names of `FullDelta`."""
    module = name.removeprefix("base_model.model.").removeprefix("delta/").removesuffix(".weight")
    return module.removesuffix(".lora_A").removesuffix(".lora_B") + ".weight"


def _module(weight_name: str) -> str:
    module = weight_name.removesuffix(".weight")
    return module.partition(".mixer.")[2] or module


def _uniform(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """Draws A as PEFT does: Kaiming uniform with a = sqrt(5), whose bound is 1 / sqrt(inputs)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=named_generator(seed, name))
