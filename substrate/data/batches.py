"""From rows to batches: padded, masked, weighted, and split among the data-parallel ranks.

    tokens   <s> ... 3 8 ... <think> | 3 0 _ X X X ... </think> \\boxed{ X X X V I I I }
    labels   ... 3 8 ... <think> | 3 0 _ X X X ... </think> \\boxed{ X X X V I I I } </s>
    weights  0 0 0 0 0 0 ...... 0 | w w w ........................................... w

Batch `k` of a stream depends on the rows alone, not on whether earlier batches were drawn, so a resumed run needs no
state but its step.

The rows of a batch are sorted by length, dealt to the data-parallel ranks in turn and cut into micro-batches, each
padded to its own longest row. So all ranks have equal shapes and nearly equal work, with little padding.
Shape suffixes: B sequences of a micro-batch on this rank, L tokens of a sequence.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from substrate.data.rows import Row
from substrate.interface.errors import UsageError

PAD = 0
IGNORED = 0  # label where the weight is 0; any valid token id serves


class MicroBatch(NamedTuple):
    """Rows of one forward pass of this rank, padded on the right."""

    tokens_BL: torch.Tensor  # int64
    labels_BL: torch.Tensor  # int64; labels[:, i] is the token after tokens[:, i]
    weights_BL: torch.Tensor  # float32; 0 where the label is not learned, else as `make_batch` says
    rows: list[Row]


class Batch(NamedTuple):
    """One optimizer step: this rank's micro-batches, and the tokens of the whole batch (all ranks) without padding."""

    micro_batches: Sequence[Any]  # of MicroBatch, or of a recipe's own type
    num_tokens: int


class Shape(NamedTuple):
    """How a batch is cut into micro-batches and among ranks."""

    micro_batch_size: int  # most sequences in a forward pass of one rank
    multiple: int = 1  # of padded lengths, so that tensor-parallel ranks split the sequence evenly
    dp_rank: int = 0
    dp_size: int = 1


class Stream(Sequence[Batch]):
    """The batches of `rows`, by step from 0. Every rank builds the same stream and takes its rows of each batch.

    batch_size: sequences per step, over all data-parallel ranks. weighting: one of data.rows.WEIGHTINGS. Raises
    UsageError unless dp_size divides batch_size.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, shape: Shape, weighting: str = "uniform") -> None:
        if batch_size % shape.dp_size:
            raise UsageError(
                f"batch_size {batch_size} over {shape.dp_size} data-parallel ranks; it must be a multiple of their number"
            )
        self._rows, self._batch_size, self._shape, self._weighting = rows, batch_size, shape, weighting

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size

    def __getitem__(self, step: int) -> Batch:  # type: ignore[override]
        if not 0 <= step < len(self):
            raise IndexError(f"step {step}; valid 0 to {len(self) - 1}")
        rows = self._rows[step * self._batch_size : (step + 1) * self._batch_size]
        return make_batch(rows, self._shape, self._weighting)


def make_batch(rows: Sequence[Row], shape: Shape, weighting: str = "uniform") -> Batch:
    """Returns this rank's micro-batches of the `rows` of one step.

    Every learned token has a weight, so that the loss is a plain sum:

        uniform       1 / learned tokens of the batch
        per_family    1 / (learned tokens of its family x families)
        per_row       1 / (learned tokens of its row x rows)
        min_log_prob  1 / rows, which the loss distributes among the row's tokens
    """
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    tokens_of = Counter[str]()
    for row in rows:
        tokens_of[row.family] += len(row.learned)

    def weight(row: Row) -> float:
        if weighting == "per_family":
            return 1 / (tokens_of[row.family] * len(tokens_of))
        if weighting == "per_row":
            return 1 / (len(row.learned) * len(rows))
        return 1 / (tokens_of.total() if weighting == "uniform" else len(rows))

    micro_batches = []
    for start in range(0, len(ordered), shape.micro_batch_size * shape.dp_size):
        share = ordered[start : start + shape.micro_batch_size * shape.dp_size]
        length = -(-(share[-1].num_tokens - 1) // shape.multiple) * shape.multiple
        mine = share[shape.dp_rank :: shape.dp_size]
        micro_batches.append(_pad(mine, [weight(row) for row in mine], length))
    return Batch(micro_batches, sum(row.num_tokens - 1 for row in rows))


def _pad(rows: list[Row], weights: list[float], length: int) -> MicroBatch:
    tokens_BL = torch.full((len(rows), length), PAD, dtype=torch.int64)
    labels_BL = torch.full_like(tokens_BL, IGNORED)
    weights_BL = torch.zeros(tokens_BL.shape, dtype=torch.float32)
    for place, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        ids = torch.tensor(row.prompt + row.learned)
        end = len(ids) - 1
        tokens_BL[place, :end] = ids[:-1]
        labels_BL[place, :end] = ids[1:]
        # The prompt's last token predicts the first learned one.
        weights_BL[place, len(row.prompt) - 1 : end] = weight
    return MicroBatch(tokens_BL, labels_BL, weights_BL, rows)
