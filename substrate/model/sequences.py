"""What the layers must know of the sequences in a pass: documents packed into one row, or caches between tokens.

megatron-core passes one object, `packed_seq_params`, from the model to every layer; ours is a `Packing` or a
`DecodeCache`. Attention has no positions here, so a key may be stored anywhere and only masks matter.

B rows of the pass, S positions of the pass, L positions kept, G key/value groups, D head dim, K convolution taps, I
channels, H heads, P head dim and N state dim of the scan.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from substrate.model import kernels

SHORT = 64  # tokens of a document up to which attention pads it together with all shorter ones
KEYS = 64  # attention in a step runs over a multiple of this many positions; surplus ones are masked


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


class DecodeCache:
    """Keys, values, convolution windows and scan states of the sequences in decoding, one slot for each.

    Active sequences occupy slots 0 to n - 1, so that a step works on views; `release` keeps it so. A pass begins with
    `begin_prompts`, which puts whole prompts, padded on the left, into slots n, n + 1, ..., or with `begin_step`, for
    one token of each active sequence. Then every layer calls `attend`, or `state` and `keep`, once.
    """

    qkv_format = "sbhd"

    def __init__(self, num_slots: int, max_length: int, device: torch.device) -> None:
        """max_length: positions in a slot, for a prompt and its completion."""
        self.num_slots, self.max_length, self.device = num_slots, max_length, device
        self.lengths_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.num_active = 0
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (slots, G, L, D) twice
        self._states: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (slots, K - 1, I), (slots, H, P, N)
        self._rows = slice(0, 0)
        self.valid_SB: Tensor | None = None  # in a pass of prompts: False where a position is padding; None in a step

    def begin_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Takes the next slots for prompts. Returns their tokens_BS, with zeros to the left of the shorter ones."""
        length, num_new = max(map(len, prompts)), len(prompts)
        tokens = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self._rows = slice(self.num_active, self.num_active + num_new)
        self.lengths_B[self._rows] = lengths
        self.num_active += num_new
        valid_BS = torch.arange(length, device=self.device) >= length - lengths.unsqueeze(1)
        self.valid_SB = valid_BS.T
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        # Padding attends to itself, because a softmax over nothing is NaN in some kernels. Nothing reads the result.
        self._mask = (causal & valid_BS[:, None, None]) | torch.eye(length, dtype=torch.bool, device=self.device)
        return tokens

    def begin_step(self) -> None:
        """Begins a pass of one more token of every active sequence."""
        self._rows, self.valid_SB = slice(0, self.num_active), None
        self._seen_B = self.lengths_B[self._rows].clone()
        # A multiple of KEYS, because cuDNN plans its attention anew for every length, in seven milliseconds per layer.
        self._longest = min(-(-(int(self._seen_B.max()) + 1) // KEYS) * KEYS, self.max_length)
        self._mask = (torch.arange(self._longest, device=self.device) <= self._seen_B.unsqueeze(1))[:, None, None]
        self.lengths_B[self._rows] += 1

    def release(self, ended: Sequence[int]) -> list[tuple[int, int]]:
        """Frees slots and moves the last active ones into the holes. Returns the moves (from, to), in order."""
        moves = []
        holes = sorted(ended, reverse=True)
        for hole in holes:
            last = self.num_active - 1
            if hole != last:
                for pair in [*self._keys.values(), *self._states.values()]:
                    for tensor in pair:
                        tensor[hole].copy_(tensor[last])
                self.lengths_B[hole] = self.lengths_B[last]
                moves.append((last, hole))
            self.num_active -= 1
        return moves

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k_SBGD and v_SBGD and returns the attention of q_SBHD as context_SBC, C the channels of all heads."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        if layer not in self._keys:
            shape = (self.num_slots, k.shape[1], self.max_length, k.shape[3])
            self._keys[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self._keys[layer]
        if self.valid_SB is None:
            rows = torch.arange(q.shape[0], device=self.device)
            keys[rows, :, self._seen_B] = k[:, :, 0]
            values[rows, :, self._seen_B] = v[:, :, 0]
            k, v = keys[self._rows, :, : self._longest], values[self._rows, :, : self._longest]
        else:
            for row, (slot, length) in enumerate(
                zip(range(self._rows.start, self._rows.stop), self.lengths_B[self._rows].tolist(), strict=True)
            ):
                keys[slot, :, :length] = k[row, :, -length:]
                values[slot, :, :length] = v[row, :, -length:]
        context = F.scaled_dot_product_attention(q, k, v, self._mask, enable_gqa=True)
        return context.permute(2, 0, 1, 3).flatten(-2)

    def state(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the convolution's last inputs (K - 1, B, I) and the scan state h_BHPN of the active sequences."""
        window, h_BHPN = self._states[layer]
        return window[self._rows].transpose(0, 1), h_BHPN[self._rows]

    def keep(self, layer: int, window: Tensor, h_BHPN: Tensor) -> None:
        """Stores a Mamba layer's window and state after this pass, in the shapes of `state`."""
        window = window.transpose(0, 1)
        if layer not in self._states:
            self._states[layer] = tuple(t.new_zeros(self.num_slots, *t.shape[1:]) for t in (window, h_BHPN))  # type: ignore[assignment]
        for kept, new in zip(self._states[layer], (window, h_BHPN), strict=True):
            kept[self._rows].copy_(new)
