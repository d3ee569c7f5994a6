"""What the layers must know of the sequences in a pass: documents packed into one row, or caches between tokens.

megatron-core passes one object, `packed_seq_params`, from the model to every layer; ours is a `Packing` or a
`DecodeCache`. Attention has no positions here, so a key may be stored anywhere and only masks matter.

B rows of the pass, S positions of the pass, L positions kept, G key/value groups, D head dim, K convolution taps, I
channels, H heads, P head dim and N state dim of the scan.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KEYS = 64  # attention in a step runs over a multiple of this many positions; surplus ones are masked


class Packing:
    """Several documents in one row of a batch, none of which sees another."""

    qkv_format = "sbhd"  # read by the library: the tensors keep their batch dimension

    def __init__(self, document_BL: Tensor) -> None:
        """document_BL: int, at least 0, the number of each token's document; a document's tokens are contiguous."""
        self.document_BL = document_BL
        self.mask_B1SS = (document_BL[:, None, :, None] == document_BL[:, None, None, :]).tril()


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
