"""From solved puzzles to batches: which examples, in which order, and what of them is learned.

One line of the training file, and what it becomes (`|` where the prompt ends; only what follows is learned):

    {"item_id": "roman-000012", "family": "roman", "prompt": "... 38 ...", "answer": "XXXVIII", "trace": "30 XXX ..."}
    tokens  <s> ... 3 8 ... <think> | 3 0 _ X X X ... </think> \\boxed{ X X X V I I I }
    labels  ... 3 8 ... <think> | 3 0 _ X X X ... </think> \\boxed{ X X X V I I I } </s>
    mask    0 0 0 0 0 0 ...... 0 | 1 1 1 ........................................... 1

A stream is a function of (examples, mix, seed): batch `k` is the same whether or not the batches before it were drawn,
so a resumed run needs no state but its step. The order is laid out once, at the start. A family's next place comes by
largest deficit: among the first n places a family holds `share * n` of them, give or take one, for every n and seed;
which of its examples stands there comes from a shuffle, a new one for each pass through the family.

The rows of a batch are sorted by length and dealt to the data-parallel ranks in turn, then cut into micro-batches, each
padded to its own longest row. So ranks have equal shapes and nearly equal work, and little of it is padding.
Shape suffixes: B sequences of a micro-batch on this rank, L tokens of a sequence.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from substrate.errors import DataError, UsageError

PAD = 0
IGNORED = 0  # label where the mask is 0: any valid token id, the loss there is multiplied by zero


class Example(NamedTuple):
    """One solved puzzle."""

    item_id: str
    family: str
    prompt: str
    answer: str
    trace: str


class MicroBatch(NamedTuple):
    """Rows of one forward pass of this rank, padded on the right."""

    tokens_BL: torch.Tensor  # int64
    labels_BL: torch.Tensor  # int64; labels[:, i] is the token after tokens[:, i]
    mask_BL: torch.Tensor  # float32; 1 where the label is learned


class Batch(NamedTuple):
    """One optimizer step: this rank's micro-batches, and two counts over the whole batch (all ranks)."""

    micro_batches: list[MicroBatch]
    num_targets: int  # learned tokens: what the summed loss is divided by
    num_tokens: int  # tokens that are not padding


def read_examples(path: Path) -> list[Example]:
    """Reads a training file (JSON lines, docs/contract.md). Raises DataError with the line's number."""
    examples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                examples.append(Example(*(str(row[field]) for field in Example._fields)))
            except (ValueError, KeyError, TypeError) as error:
                fields = ", ".join(Example._fields)
                raise DataError(f"{path.name} line {number}: {error!r}; a line is an object with {fields}") from None
    return examples


def family_order(mix: dict[str, float], num_places: int) -> Iterator[str]:
    """Yields the family of each of `num_places` places so that counts follow the shares to within one at every prefix.

    `mix` maps a family to its share, normalised here. The family furthest behind its due is next; the first named wins
    a tie.
    """
    total = sum(mix.values())
    held = dict.fromkeys(mix, 0)
    for place in range(1, num_places + 1):
        family = max(mix, key=lambda name: mix[name] / total * place - held[name])
        held[family] += 1
        yield family


class Stream(Sequence[Batch]):
    """The batches of a training run, by step from 0. Every rank builds the same stream and takes its rows of each
    batch.

    encode            example -> (prompt ids, ids to learn); the second ends with </s>
    num_steps         length of the stream
    batch_size        sequences a step, over all data-parallel ranks
    micro_batch_size  sequences a forward pass of one rank, at most
    sequence_length   tokens of an example at most, prompt and answer; a longer one is a DataError that names it
    multiple          a padded length is a multiple of it: tensor-parallel ranks split the sequence evenly
    """

    def __init__(
        self,
        examples: Sequence[Example],
        mix: dict[str, float],
        encode: Callable[[Example], tuple[list[int], list[int]]],
        *,
        seed: int,
        num_steps: int,
        batch_size: int,
        micro_batch_size: int,
        sequence_length: int,
        multiple: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        by_family: dict[str, list[Example]] = {family: [] for family, share in mix.items() if share > 0}
        for example in examples:
            if example.family in by_family:
                by_family[example.family].append(example)
        empty = sorted(family for family, members in by_family.items() if not members)
        if empty:
            present = ", ".join(sorted({example.family for example in examples}))
            raise DataError(f"mix names {', '.join(empty)}, which the training file lacks; it holds {present}")
        if batch_size % dp_size:
            raise UsageError(f"batch_size {batch_size} over {dp_size} data-parallel ranks; it must divide evenly")
        self._encode = encode
        self._sequence_length = sequence_length
        self._multiple = multiple
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        members = {family: _endless_shuffle(members, f"{seed}/{family}") for family, members in by_family.items()}
        shares = {family: mix[family] for family in by_family}
        self._order = [next(members[family]) for family in family_order(shares, num_steps * batch_size)]

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, step: int) -> Batch:  # type: ignore[override]
        if not 0 <= step < len(self):
            raise IndexError(f"step {step}; valid 0 to {len(self) - 1}")
        examples = self._order[step * self._batch_size : (step + 1) * self._batch_size]
        rows = sorted((self._row(example) for example in examples), key=lambda row: len(row[0]) + len(row[1]))
        micro_batches = []
        for start in range(0, len(rows), self._micro_batch_size * self._dp_size):
            share = rows[start : start + self._micro_batch_size * self._dp_size]
            longest = len(share[-1][0]) + len(share[-1][1]) - 1
            length = -(-longest // self._multiple) * self._multiple
            micro_batches.append(_pad(share[self._dp_rank :: self._dp_size], length))
        num_targets = sum(len(answer) for _, answer in rows)
        num_tokens = sum(len(prompt) + len(answer) - 1 for prompt, answer in rows)
        return Batch(micro_batches, num_targets, num_tokens)

    def _row(self, example: Example) -> tuple[list[int], list[int]]:
        prompt, answer = self._encode(example)
        if (length := len(prompt) + len(answer)) > self._sequence_length:
            raise DataError(f"{example.item_id} has {length} tokens; sequence_length allows {self._sequence_length}")
        return prompt, answer


def _endless_shuffle(members: list[Example], seed: str) -> Iterator[Example]:
    """Passes through `members` for ever, each pass in a new order drawn from one generator."""
    # random.Random hashes a string seed with SHA-512: the same on every host and in every process.
    generator = random.Random(seed)
    while True:
        yield from generator.sample(members, len(members))


def _pad(rows: list[tuple[list[int], list[int]]], length: int) -> MicroBatch:
    tokens_BL = torch.full((len(rows), length), PAD, dtype=torch.int64)
    labels_BL = torch.full_like(tokens_BL, IGNORED)
    mask_BL = torch.zeros(tokens_BL.shape, dtype=torch.float32)
    for row, (prompt, answer) in enumerate(rows):
        ids = torch.tensor(prompt + answer)
        end = len(ids) - 1
        tokens_BL[row, :end] = ids[:-1]
        labels_BL[row, :end] = ids[1:]
        # The first learned label is the answer's first token, which is predicted from the prompt's last.
        mask_BL[row, len(prompt) - 1 : end] = 1.0
    return MicroBatch(tokens_BL, labels_BL, mask_BL)
