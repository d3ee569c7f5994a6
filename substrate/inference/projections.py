"""Matrix products of decoding: frozen weights, with an adapter that is merged or cast once.

Training adds B A x to every product, because A and B change. In decoding they do not change. In float32 the product of B
and A is added to a copy of the weight, so that an adapter costs nothing. In half precision a merged weight would lose the
adapter's small values, and the published weights would be needed twice; there A and B are cast once.

N rows, I inputs, O outputs, R rank times adapted modules, E experts here. All sizes are this rank's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from substrate.ops import kernels


class Projection:
    """y = W x + (alpha / r) B A x of one linear layer, this rank's part."""

    def __init__(self, layer: Any) -> None:
        """layer: a `ColumnLinear` or `RowLinear` of a `HybridModel`."""
        self.weight_OI: Tensor = layer.weight.detach()
        self.pair: tuple[Tensor, Tensor] | None = None
        if layer.adapter is not None:
            with torch.no_grad():
                if self.weight_OI.dtype is torch.float32:
                    self.weight_OI = self.weight_OI + layer.adapter.delta()
                else:
                    self.pair = layer.adapter.factors(self.weight_OI.dtype)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        y_NO = F.linear(x_NI, self.weight_OI)
        if self.pair is None:
            return y_NO
        A_RI, B_OR = self.pair
        return y_NO.addmm_(F.linear(x_NI, A_RI), B_OR.T)


class GroupedProjection:
    """The same for the routed experts of a layer: each row is multiplied by the weight of its own expert."""

    def __init__(self, weight_EOI: Tensor, layers: Sequence[Any]) -> None:
        """weight_EOI: the weights of `layers`, which are views of it."""
        self.weight_EOI = weight_EOI.detach()
        self.pair: tuple[Tensor, Tensor] | None = None
        adapters = [layer.adapter for layer in layers]
        if None in adapters:  # a target gives an adapter to all experts or to none
            return
        with torch.no_grad():
            if self.weight_EOI.dtype is torch.float32:
                self.weight_EOI = self.weight_EOI + torch.stack([adapter.delta() for adapter in adapters])
            else:
                pairs = [adapter.factors(self.weight_EOI.dtype) for adapter in adapters]
                A_ERI, B_EOR = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
                # A grouped product wants rows of a multiple of 16 bytes, which a low rank is not.
                surplus = -A_ERI.shape[1] % (kernels.ALIGNMENT // A_ERI.element_size())
                self.pair = F.pad(A_ERI, (0, 0, 0, surplus)), F.pad(B_EOR, (0, surplus))

    def __call__(self, x_NI: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns y of every row. product(x, weight_EOI) multiplies each row of x by the weight of its own expert."""
        y_TO = product(x_NI, self.weight_EOI)
        if self.pair is None:
            return y_TO
        A_ERI, B_EOR = self.pair
        return y_TO + product(product(x_NI, A_ERI), B_EOR)


def summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum of all ranks' parts; `part` may be changed."""
    if group.size() > 1:
        part = part.contiguous()
        dist.all_reduce(part, group=group)
    return part


def joined(part: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """Returns all ranks' parts, which have one shape, side by side along `dim`."""
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)
