"""Documents packed into one row: what the layers must know of them.

megatron-core passes one object, `packed_seq_params`, from the model to every layer; ours is a `Packing`. Attention has no
positions here, so only masks matter.

B rows of the pass, S positions of the pass, G key/value groups, D head dim.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from substrate.ops import kernels

SHORT = 64  # tokens of a document up to which attention pads it together with all shorter ones


class Packing:
    """Documents that follow one another in the only row of a pass, none of which sees another.

    A layer costs what its documents cost, not what the row costs: projections, experts and the scan are linear in S, and
    attention is quadratic in each document alone. Where a GPU has kernels for unequal lengths, it costs their sum of
    squares. Elsewhere documents of near lengths are padded to the longest of their group (`groups`), which is one batched
    product: less than 1.8 times that sum, where documents are longer than SHORT. Tensors that depend on the documents
    alone are made at their first use and serve all layers of the pass.
    """

    qkv_format = "sbhd"  # read by the library: the tensors keep their batch dimension

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """lengths: tokens of each document in their order, at least 1; together S."""
        self.lengths, self.device = tuple(lengths), device
        self._before: dict[int, Tensor] = {}

    @cached_property
    def document_SB(self) -> Tensor:
        """Number of each token's document, (S, 1), int64."""
        lengths = torch.tensor(self.lengths)
        return torch.arange(len(lengths)).repeat_interleave(lengths).unsqueeze(1).to(self.device)

    @cached_property
    def position_S(self) -> Tensor:
        """Position of each token in its document, from 0."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    def has_before(self, distance: int) -> Tensor:
        """Returns whether a token has a predecessor at this distance in its document, (S, 1, 1)."""
        if distance not in self._before:
            self._before[distance] = (self.position_S >= distance)[:, None, None]
        return self._before[distance]

    @cached_property
    def groups(self) -> list[list[int]]:
        """Documents that attention pads to one length, the longest document of each group first.

        A group has lengths within a quarter of its longest, and all documents of up to SHORT tokens share one: a call
        costs more than their padding.
        """
        groups: list[list[int]] = []
        for number in sorted(range(len(self.lengths)), key=lambda number: -self.lengths[number]):
            longest = self.lengths[groups[-1][0]] if groups else 0
            if groups and (longest <= SHORT or 4 * self.lengths[number] >= 3 * longest):
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Place in the row of each place of the padded groups, the inverse, and which places are padding (None: none)."""
        starts = [0, *itertools.accumulate(self.lengths)]
        places, inverse, surplus, begin = [], torch.empty(starts[-1], dtype=torch.int64), [], 0
        for group in self.groups:
            width = self.lengths[group[0]]
            for number in group:
                start, length = starts[number], self.lengths[number]
                # Padding repeats the last token. No token of the document sees it, because it comes later.
                places.append((start + torch.arange(width)).clamp(max=start + length - 1))
                surplus.append(torch.arange(width) >= length)
                inverse[start : start + length] = torch.arange(begin, begin + length)
                begin += width
        is_surplus = torch.cat(surplus)
        padding = is_surplus.nonzero().squeeze(1).to(self.device) if is_surplus.any() else None
        return torch.cat(places).to(self.device), inverse.to(self.device), padding

    @cached_property
    def ends(self) -> Tensor:
        """0 and the end of each document, int32: the form that kernels for unequal lengths take."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns the causal attention of q_SBHD to k_SBGD and v_SBGD within each document, context_SBC; B is 1."""
        if kernels.has_varlen(q):
            return kernels.varlen_attention(q[:, 0], k[:, 0], v[:, 0], self.ends, max(self.lengths)).flatten(1)[:, None]
        places, inverse, padding = self._padded
        sizes = [len(group) * self.lengths[group[0]] for group in self.groups]
        grouped = (_Regroup.apply(t[:, 0], places, inverse, None).split(sizes) for t in (q, k, v))
        contexts = []
        for group, *parts in zip(self.groups, *grouped, strict=True):
            q, k, v = (part.unflatten(0, (len(group), -1)).transpose(1, 2) for part in parts)
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            contexts.append(context.transpose(1, 2).flatten(0, 1))
        return _Regroup.apply(torch.cat(contexts), inverse, places, padding).flatten(1)[:, None]


class _Regroup(torch.autograd.Function):
    """x[places] along the first dimension, whose gradient is read by the inverse instead of being scattered and added.

    A scatter needs atomic additions on a GPU, whose order varies, and a loop over rows on a CPU. Each place must be taken
    once, or its surplus copies must have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, inverse: Tensor, untaken: Tensor | None) -> Tensor:
        """untaken: the places of x that `places` does not name; they get no gradient."""
        ctx.inverse, ctx.untaken = inverse, untaken
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.index_select(0, ctx.inverse)
        if ctx.untaken is not None:
            gradient.index_fill_(0, ctx.untaken, 0.0)
        return gradient, None, None, None
