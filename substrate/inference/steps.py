"""Runs decoding steps on a cache; on a GPU as recorded CUDA graphs.

A step of the 30B is some thousand kernels of a few microseconds each, which a host starts more slowly than a GPU runs them.
A CUDA graph starts them all at once. It is recorded for one number of rows and of positions, so both are rounded up to one
of few sizes: surplus rows compute what nobody reads, and surplus positions are masked. The first step of a size runs
eagerly, because kernels are tuned and communicators made in it; the second is recorded, and from then on replayed.

B sequences, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from substrate.inference.cache import Cache
from substrate.inference.engine import InferenceModel

KEYS = 16  # without graphs, attention reads a multiple of this many positions
GRAPH_KEYS = 512  # with graphs a multiple of this many, and from four times as many on a power of two


@dataclass
class Recorded:
    """A step of one size: how often it ran, and its graph with the tensor that a replay fills."""

    num_runs: int = 0
    graph: "torch.cuda.CUDAGraph | None" = None
    logits_BV: Tensor | None = None


class Steps:
    """The steps of one decoding run."""

    def __init__(self, model: InferenceModel, cache: Cache, use_graphs: bool | None = None) -> None:
        """use_graphs: record steps; by default on a GPU, unless ranks with different prompts share experts."""
        self._model, self._cache = model, cache
        self._rounds = cache.device.type == "cuda" if use_graphs is None else use_graphs
        self._sizes: dict[tuple[int, int], Recorded] = {}

    def run(self, longest: int) -> Tensor:
        """Runs one token of every active sequence, `cache.tokens_B`. Returns the logits_BV after it, until the next run.

        longest: tokens of the longest active sequence, with the one that enters.
        """
        active = self._cache.num_active
        if not self._rounds:
            return self._step(active, min(-(-longest // KEYS) * KEYS, self._cache.max_length))
        size = (rounded_rows(active, self._cache.num_slots), rounded_positions(longest, self._cache.max_length))
        recorded = self._sizes.setdefault(size, Recorded())
        recorded.num_runs += 1
        if self._cache.device.type != "cuda" or recorded.num_runs == 1:
            return self._step(*size)[:active]
        if recorded.graph is None:
            recorded.graph = torch.cuda.CUDAGraph()
            # Thread-local, because NCCL's watchdog makes calls of its own meanwhile.
            with torch.cuda.graph(recorded.graph, capture_error_mode="thread_local"):
                recorded.logits_BV = self._step(*size)
        recorded.graph.replay()
        assert recorded.logits_BV is not None
        return recorded.logits_BV[:active]

    def _step(self, num_rows: int, num_positions: int) -> Tensor:
        at = self._cache.step(num_rows, num_positions)
        return self._model.step(self._cache.tokens_B[:num_rows], at, self._cache)


def rounded_rows(active: int, num_slots: int) -> int:
    """Returns the smallest power of two that is at least `active`, or all slots if they are fewer."""
    return min(1 << (active - 1).bit_length(), num_slots)


def rounded_positions(longest: int, max_length: int) -> int:
    """Returns a number of positions of at least `longest`, one of few, and at most `max_length`."""
    rounded = -(-longest // GRAPH_KEYS) * GRAPH_KEYS
    if rounded > 4 * GRAPH_KEYS:
        rounded = 1 << (longest - 1).bit_length()
    return min(rounded, max_length)
