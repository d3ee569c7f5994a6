"""What decoding keeps between tokens: keys and values, convolution windows and scan states, one slot for each sequence.

Active sequences occupy slots 0 to n - 1, so that a step works on views of static tensors; `release` keeps it so. A pass
is described by a `Prompts`, which puts whole prompts into slots n, n + 1, ..., or by a `Step`, for one more token of every
active sequence. Attention has no positions here, so a key may be stored anywhere and only masks matter.

B sequences of the pass, S positions of the pass, L positions of a slot that attention reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """A pass over whole prompts, padded on the left."""

    rows: slice  # their slots
    tokens_BS: Tensor  # 0 where a position is padding
    lengths: tuple[int, ...]  # tokens of each prompt
    valid_BS: Tensor  # False where a position is padding
    mask_B1SS: (
        Tensor | None
    )  # 0 where a position sees another, else -inf; None: no padding, so that it sees all before it


@dataclass(frozen=True)
class Step:
    """A pass of one token of every active sequence. Nothing in it needs the host while the pass runs."""

    rows: slice  # slots 0 to B - 1
    slots_B: Tensor  # their numbers
    positions_B: Tensor  # where each token's key is stored
    mask_B11L: Tensor  # 0 for a kept position that the token sees, else -inf


class Cache:
    """The slots of one decoding run. `layers` has the tensors of each layer, with the slot as their first dimension."""

    def __init__(self, layers: Sequence[tuple[Tensor, ...]], num_slots: int, max_length: int, like: Tensor) -> None:
        """max_length: positions of a slot, for a prompt and its completion. like: has the type and device of activations."""
        self.layers, self.num_slots, self.max_length, self.device = layers, num_slots, max_length, like.device
        self._zero, self._hidden = like.new_zeros(()), like.new_full((), -torch.inf)
        device = like.device
        self.num_active = 0
        self.lengths_B = torch.zeros(num_slots, dtype=torch.int64, device=device)  # tokens stored in each slot
        self.tokens_B = torch.zeros(
            num_slots, dtype=torch.int64, device=device
        )  # each slot's newest token, not stored yet
        self._slots_B = torch.arange(num_slots, device=device)
        self._positions_L = torch.arange(max_length, device=device)

    def take(self, prompts: Sequence[Sequence[int]]) -> Prompts:
        """Takes the next slots for prompts of at least one token each."""
        lengths = tuple(map(len, prompts))
        longest, begin = max(lengths), self.num_active
        tokens_BS = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        self.num_active += len(prompts)
        rows = slice(begin, self.num_active)
        self.lengths_B[rows] = torch.tensor(lengths, device=self.device)
        valid_BS = torch.arange(longest, device=self.device) >= longest - self.lengths_B[rows].unsqueeze(1)
        mask_B1SS = None
        if min(lengths) < longest:
            causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
            # Padding attends to itself, because a softmax over nothing is NaN in some kernels. Nothing reads the result.
            itself = torch.eye(longest, dtype=torch.bool, device=self.device)
            mask_B1SS = self._additive((causal & valid_BS[:, None, None]) | itself)
        return Prompts(rows, tokens_BS, lengths, valid_BS, mask_B1SS)

    def step(self, num_rows: int, num_positions: int) -> Step:
        """Begins a pass of one token of each of the first `num_rows` slots, which may be more than are active.

        num_positions: how many positions of a slot attention reads, at least those of the longest active sequence with
        the token that enters. What a surplus row computes, no other row reads.
        """
        positions_B = self.lengths_B[:num_rows].clamp(max=self.max_length - 1)
        self.lengths_B[:num_rows] += 1
        mask_BL = self._additive(self._positions_L[:num_positions] <= positions_B.unsqueeze(1))
        return Step(slice(0, num_rows), self._slots_B[:num_rows], positions_B, mask_BL[:, None, None])

    def _additive(self, seen: Tensor) -> Tensor:
        """Returns a mask in the form that attention adds: made once a pass, where each layer would make it of booleans."""
        return torch.where(seen, self._zero, self._hidden)

    def release(self, ended: Sequence[int]) -> list[tuple[int, int]]:
        """Frees slots and moves the last active ones into the holes. Returns the moves (from, to), in any order."""
        if not ended:
            return []
        gone, kept = set(ended), self.num_active - len(ended)
        holes = [slot for slot in ended if slot < kept]
        last = [slot for slot in range(kept, self.num_active) if slot not in gone]
        self.num_active = kept
        if holes:
            into, source = (torch.tensor(slots, device=self.device) for slots in (holes, last))
            for tensor in [self.lengths_B, self.tokens_B, *(tensor for layer in self.layers for tensor in layer)]:
                tensor[into] = tensor[source]
        return list(zip(last, holes, strict=True))
