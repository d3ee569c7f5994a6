"""Tensor-parallel linear layers with room for an adapter (`lora.py`): what each rank holds, and what is summed over ranks.

    layer          W here    A               B            what is summed over tensor-parallel ranks
    ColumnLinear   rows      whole           rows, as W   the gradient of A: each rank has the part of its own rows
    RowLinear      columns   columns, as W   whole        B A x, in the sum that W x needs anyway; the gradient of B

So an adapter adds no communication to the layer. With sequence parallelism the input of a column layer is gathered
once for both W and A (and its gradient scattered once), where the library would gather it inside W's product only.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

if TYPE_CHECKING:
    from substrate.model.lora import Adapter


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's layer, sharded by output rows, with room for an adapter.

    The library's product is used where the weight is trained. A frozen weight needs none of its bookkeeping, which
    costs more than the product in a small model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: Adapter | None = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.adapter is None and torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(input_, weight, runtime_gather_output)
        y = self.product(self.enter(input_))
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gather and self.tp_group.size() > 1:
            y = gather_from_tensor_model_parallel_region(y, group=self.tp_group)
        return y, None

    def enter(self, input_: Tensor) -> Tensor:
        """Returns the whole input, (S, ..., I); the backward pass sums its gradient over the ranks."""
        if self.tp_group.size() == 1 or self.explicit_expert_comm:
            return input_
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group)

    def product(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O): this rank's rows of W x, with the adapter's part added."""
        return F.linear(x, self.weight) if self.adapter is None else self.adapter(x)


class RowLinear(RowParallelLinear):
    """megatron-core's layer, sharded by input columns, with room for an adapter; see ColumnLinear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: Adapter | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.adapter is None and torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(input_)
        partial = self.product(input_)
        if self.tp_group.size() == 1 or self.explicit_expert_comm:
            return partial, None
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), None

    def product(self, x: Tensor) -> Tensor:
        """(..., I here) -> (..., O): this rank's part of the sum W x, with the adapter's."""
        return F.linear(x, self.weight) if self.adapter is None else self.adapter(x)
