"""From rows to batches: packed into passes, masked, weighted, and split among the data-parallel ranks.

    tokens   <s> ... 3 8 ... <think> | 3 0 _ X X X ... </think> \\boxed{ X X X V I I I }
    labels   ... 3 8 ... <think> | 3 0 _ X X X ... </think> \\boxed{ X X X V I I I } </s>
    weights  0 0 0 0 0 0 ...... 0 | w w w ........................................... w

Batch `k` of a stream depends on the rows alone, not on whether earlier batches were drawn, so a resumed run needs no
state but its step.

A micro-batch is one line of tokens, in which the rows that it takes follow one another; the model keeps them apart
(`substrate/ops/sequences.py`, which calls them documents). `pack` cuts a batch into as few lines as the token budget
allows, of nearly equal length. All data-parallel ranks have equally many lines, and those of a pass are padded to one
length, because ranks that share experts exchange tensors of one shape.
Shape suffix: L tokens of the line, of which there is one (the model's B is 1).
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from substrate.data.rows import Row
from substrate.interface.errors import UsageError

PAD = 0
IGNORED = 0  # label where the weight is 0; any valid token id serves


class MicroBatch(NamedTuple):
    """Rows of one forward pass of this rank, in one line, padded on the right. A row takes its number of tokens less one."""

    tokens_1L: torch.Tensor  # int64
    labels_1L: torch.Tensor  # int64; labels[:, i] is the token after tokens[:, i]
    weights_1L: torch.Tensor  # float32; 0 where the label is not learned, else as `make_batch` says
    rows: Sequence[Row]
    lengths: Sequence[int]  # tokens of each row, together L: the last row takes the padding, none of which it sees


class Batch(NamedTuple):
    """One optimizer step: this rank's micro-batches, and the tokens of the whole batch (all ranks) without padding."""

    micro_batches: Sequence[Any]  # of MicroBatch, or of a recipe's own type
    num_tokens: int


class Shape(NamedTuple):
    """How a batch is cut into micro-batches and among ranks."""

    micro_batch_tokens: int  # most tokens in a forward pass of one rank; a longer row has a pass of its own
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
    tokens_of = Counter[str]()
    for row in rows:
        tokens_of[row.family] += len(row.learned)

    def weight(row: Row) -> float:
        if weighting == "per_family":
            return 1 / (tokens_of[row.family] * len(tokens_of))
        if weighting == "per_row":
            return 1 / (len(row.learned) * len(rows))
        return 1 / (tokens_of.total() if weighting == "uniform" else len(rows))

    lengths = [row.num_tokens - 1 for row in rows]
    lines = pack(lengths, shape.micro_batch_tokens, shape.dp_size)
    micro_batches = []
    for start in range(0, len(lines), shape.dp_size):
        passed = lines[start : start + shape.dp_size]
        longest = max(sum(lengths[number] for number in line) for line in passed)
        mine = [rows[number] for number in passed[shape.dp_rank]]
        length = -(-longest // shape.multiple) * shape.multiple
        micro_batches.append(_line(mine, [weight(row) for row in mine], length))
    return Batch(micro_batches, sum(lengths))


def pack(lengths: Sequence[int], budget: int, dp_size: int = 1) -> list[list[int]]:
    """Divides rows into lines of at most `budget` tokens. Returns the numbers of each line's rows.

    A row that is longer than the budget has a line of its own, so it costs at most one line more than the others take.

    The number of lines is the smallest multiple of `dp_size` that suffices for "longest row first, each into the line
    that is emptiest so far" (Graham 1969), which leaves lines of nearly equal length, so that ranks wait little for one
    another. Lines come in falling order of length. A line is empty only where there are fewer rows than lines.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    num_passes = max(1, -(-sum(min(length, budget) for length in lengths) // (budget * dp_size)))
    while True:
        lines = [(0, index, list[int]()) for index in range(num_passes * dp_size)]
        for number in order:
            length, index, line = lines[0]
            line.append(number)
            heapq.heapreplace(lines, (length + lengths[number], index, line))
        if all(length <= budget or len(line) == 1 for length, _, line in lines):
            return [line for _, _, line in sorted(lines, key=lambda each: (-each[0], each[1]))]
        num_passes += 1


def by_row(batch: Any, values_1L: torch.Tensor) -> list[torch.Tensor]:
    """Returns the values of each row of a micro-batch, one for each of its tokens but the last, as views."""
    parts = values_1L[0].split(tuple(batch.lengths))
    return [part[: row.num_tokens - 1] for row, part in zip(batch.rows, parts, strict=False)]  # no row: padding alone


def in_line(batch: Any, values_of: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the values of each row, as in `by_row`, as (1, L), with zeros at the padding: the inverse."""
    line = torch.cat([*values_of]) if values_of else batch.weights_1L.new_zeros(0)
    return F.pad(line, (0, batch.weights_1L.shape[1] - len(line))).unsqueeze(0)


def _line(rows: list[Row], weights: list[float], length: int) -> MicroBatch:
    tokens_1L = torch.full((1, length), PAD, dtype=torch.int64)
    labels_1L = torch.full_like(tokens_1L, IGNORED)
    weights_1L = torch.zeros(tokens_1L.shape, dtype=torch.float32)
    end, lengths = 0, []
    for row, weight in zip(rows, weights, strict=True):
        ids = torch.tensor(row.prompt + row.learned)
        begin, end = end, end + len(ids) - 1
        tokens_1L[0, begin:end] = ids[:-1]
        labels_1L[0, begin:end] = ids[1:]
        # The prompt's last token predicts the first learned one.
        weights_1L[0, end - len(row.learned) : end] = weight
        lengths.append(end - begin)
    lengths[-1:] = [length - sum(lengths[:-1])]  # a line without rows is padding alone
    return MicroBatch(tokens_1L, labels_1L, weights_1L, rows, lengths)
