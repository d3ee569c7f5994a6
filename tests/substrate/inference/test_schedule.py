"""Test how long a queue with few very long completions takes: the real loop, on a model that only counts."""

import random
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import decoding
from substrate.inference import decode as decode_module
from substrate.inference.cache import Cache
from substrate.inference.decode import Decoding, decode

GOES_ON, ENDS = 0, 1


class Counting:
    """Writes as many tokens after each prompt as `lengths` says for the number in it, and counts the passes."""

    def __init__(self, lengths: list[int], limit: int) -> None:
        self.lengths, self.limit = torch.tensor(lengths), limit
        self.architecture = SimpleNamespace(max_sequence_length=limit + 1)
        self.num_steps = self.num_prompt_passes = 0

    def new_cache(self, num_slots: int, max_length: int) -> Cache:
        numbers_and_written = torch.zeros(num_slots, 2, dtype=torch.int64)
        return Cache([(numbers_and_written,)], num_slots, max_length, torch.zeros(()))

    def prompts(self, at, cache):
        self.num_prompt_passes += 1
        cache.layers[0][0][at.rows] = torch.stack([at.tokens_BS[:, -1], torch.ones(len(at.tokens_BS))], 1).long()
        return self._logits(cache.layers[0][0][at.rows])

    def step(self, tokens_B, at, cache):
        self.num_steps += 1
        rows = cache.layers[0][0][at.rows]
        rows[:, 1] += 1
        return self._logits(rows)

    def _logits(self, rows):
        ended = rows[:, 1] >= self.lengths[rows[:, 0]]
        return torch.stack([(~ended).float(), ended.float()], 1)


def steps_of(lengths: list[int], slots: int, limit: int, monkeypatch) -> Counting:
    model = Counting(lengths, limit)
    monkeypatch.setattr(decode_module, "InferenceModel", lambda hybrid: model)
    named = [(str(number), [number]) for number in range(len(lengths))]
    done = {one.number: one for one in decode(model, named, Decoding(limit, slots), {ENDS})}
    assert {number: len(one.ids) for number, one in done.items()} == dict(enumerate(lengths))
    return model


def long_tailed(number: int, usual: int, limit: int, seed: int) -> list[int]:
    """One in a hundred runs to the limit; the others are up to twice as long as usual."""
    draws = random.Random(seed)
    return [limit if draws.random() < 0.01 else draws.randint(2, 2 * usual) for _ in range(number)]


@pytest.mark.parametrize("seed", range(3))
def test_a_long_tailed_queue_takes_hardly_more_steps_than_one_whose_slots_never_wait(monkeypatch, seed):
    """The plan refills a slot at once; the loop waits until an eighth of them is free, because all wait during a refill."""
    lengths = long_tailed(1200, 30, 1000, seed)
    model = steps_of(lengths, 32, 1000, monkeypatch)
    ideal = decoding.played(lengths, 32, {1: 1.0, 32: 32.0})  # a step is a second, however many are busy
    assert ideal <= model.num_steps + 32 and model.num_steps < 1.1 * ideal
    assert model.num_prompt_passes < len(lengths) / 3


def test_shards_that_wait_for_their_longest_completion_take_several_times_as_long():
    """Of 3,600 items at 57 ms a step in 64 slots, as judging was before: shards of 256 items, each with a barrier."""
    lengths = long_tailed(3600, 100, 7680, 0)
    step = {1: 1 / 0.057, 64: 64 / 0.057}
    queue = decoding.played(lengths, 64, step)
    shards = sum(decoding.played(lengths[first : first + 256], 64, step) for first in range(0, 3600, 256))
    assert shards > 4 * queue
    assert queue < max(0.057 * sum(lengths) / 64 + 0.057 * 7680, 0.057 * 7680)
