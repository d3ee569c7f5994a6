"""Continuous batching: a sequence enters a free slot as another ends, and its tokens do not depend on the others.

    for completion in decode(model, [("roman-000012", ids), ...], Decoding(max_new_tokens=200, batch_size=64), {2, 11}):
        completion.item_id, completion.ids, completion.truncated

Decoding is greedy by default. Sampling uses random numbers that depend on (seed, item, position) only, so a completion
does not depend on its batch, except through float32 rounding, which can decide between tokens whose logits are within
about 1e-4. All tensor-parallel ranks hold the same logits and choose the same tokens.

top-p: nucleus sampling, Holtzman et al., arXiv:1904.09751.
"""

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from substrate.inference.engine import InferenceModel
from substrate.inference.steps import Steps

if TYPE_CHECKING:
    from torch import Tensor

    from substrate.model import HybridModel


PROMPT_TOKENS = 16384  # most tokens of one pass over prompts, with padding, to bound the memory of activations
REFILL_SHARE = 8  # prompts enter when 1 / REFILL_SHARE of the slots is free, since the active sequences wait meanwhile


@dataclass(frozen=True)
class Decoding:
    """The keys of `config.decoding` in a task file."""

    max_new_tokens: int  # most tokens of one completion, with the id that ends it
    batch_size: int  # sequences decoded together
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # sample from the likeliest tokens whose total probability reaches this
    seed: int = 0
    stop: tuple[str, ...] = ()  # a completion ends before the first of these texts
    log_probs: bool = False  # also return each token's log-probability, in nats, in the distribution of `sample`


@dataclass
class Completion:
    """One item and its ids so far; the end id is last if the model wrote one."""

    number: int  # of its prompt
    item_id: str
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    truncated: bool = False  # ended by the limit, not by the model or a stop text
    draws: random.Random = field(default_factory=random.Random, repr=False)


@torch.inference_mode()
def decode(
    hybrid: "HybridModel",
    prompts: Sequence[tuple[str, Sequence[int]]],
    decoding: Decoding,
    end_ids: Collection[int],
    stopped: Callable[[list[int]], bool] = lambda ids: False,
    together: Callable[[int], int] | None = None,
) -> Iterator[Completion]:
    """Completes prompts given as (item id, ids), in the given order, and yields each as it ends.

    The model must have all its layers on this rank; it may be in training. Each prompt has at least one token and fewer
    than the model's longest sequence. end_ids: each ends a completion (`Tokenizer.end_ids`). stopped: whether ids hold a
    stop text.
    together: needed where ranks with prompts of their own share experts, which work on all ranks' tokens in one pass.
    It returns the largest number that a rank passes. Every rank then makes as many passes as the busiest one.
    """
    model = InferenceModel(hybrid)
    longest = model.architecture.max_sequence_length
    # random.Random hashes a string seed with SHA-512: the same on every host and rank.
    waiting = deque(
        Completion(number, item_id, ids, draws=random.Random(f"{decoding.seed}/{item_id}"))
        for number, (item_id, ids) in enumerate(prompts)
    )
    room = max((len(ids) for _, ids in prompts), default=0) + decoding.max_new_tokens
    num_slots = min(decoding.batch_size, len(prompts))
    cache = model.new_cache(num_slots, min(room, longest))
    steps = Steps(model, cache, use_graphs=False if together else None)
    active: list[Completion] = []
    while waiting or active:
        num_free = num_slots - len(active)
        if waiting and (not active or num_free > num_slots // REFILL_SHARE):
            rows = _next_prompts(waiting, num_free)
            first = len(active)
            active += rows
            prompt_pass = cache.take([row.prompt for row in rows])
            if together:
                model.set_room(together(prompt_pass.tokens_BS.numel()))
            logits_BV = model.prompts(prompt_pass, cache)
        else:
            first, rows = 0, active
            if together:
                model.set_room(together(len(rows)))
            logits_BV = steps.run(max(len(row.prompt) + len(row.ids) for row in rows))
        cache.tokens_B[first : first + len(rows)] = _write(rows, logits_BV, decoding)
        ended = []
        for slot, row in enumerate(rows, start=first):
            limit = min(decoding.max_new_tokens, longest - len(row.prompt))
            has_ended = row.ids[-1] in end_ids or stopped(row.ids)
            if has_ended or len(row.ids) == limit:
                row.truncated = not has_ended
                ended.append(slot)
                yield row
        for source, hole in cache.release(ended):
            active[hole] = active[source]
        del active[cache.num_active :]
    while together and (num_tokens := together(0)):  # another rank is not done, and needs this rank's experts
        model.set_room(num_tokens)
        model.idle()


def _next_prompts(waiting: deque[Completion], num_free: int) -> list[Completion]:
    """Takes one to `num_free` prompts, at most PROMPT_TOKENS together when padded to the longest."""
    rows, longest = [waiting.popleft()], 0
    longest = len(rows[0].prompt)
    while waiting and len(rows) < num_free:
        longest = max(longest, len(waiting[0].prompt))
        if longest * (len(rows) + 1) > PROMPT_TOKENS:
            break
        rows.append(waiting.popleft())
    return rows


def _write(rows: Sequence[Completion], logits_BV: "Tensor", decoding: Decoding) -> "Tensor":
    """Chooses the next token of each row and appends it. Returns tokens_B."""
    if decoding.temperature:
        draws = torch.tensor([row.draws.random() for row in rows], device=logits_BV.device)
        tokens_B, log_probs_B = sample(logits_BV / decoding.temperature, decoding.top_p, draws)
    else:
        tokens_B = logits_BV.argmax(-1)
        if decoding.log_probs:
            log_probs_B = logits_BV.log_softmax(-1).gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    for row, token in zip(rows, tokens_B.tolist(), strict=True):
        row.ids.append(token)
    if decoding.log_probs:
        for row, log_prob in zip(rows, log_probs_B.tolist(), strict=True):
            row.log_probs.append(log_prob)
    return tokens_B


def sample(logits_BV: "Tensor", top_p: float, draws_B: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Returns tokens_B and their log-probabilities (float64): inverts the distribution of the `top_p` nucleus at `draws_B`.

    logits_BV are divided by the temperature already; draws_B are uniform in [0, 1). The log-probabilities are those of
    what is drawn from: softmax(logits), which is divided by its sum over the nucleus within it. Greedy decoding draws
    nothing; its tokens have the log-probabilities of softmax(logits) at temperature 1.
    """
    probabilities, tokens_BV = logits_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    up_to = probabilities.cumsum(-1)
    # A token is in the nucleus if those before it have less than top_p together, so the first always is.
    nucleus = torch.where(up_to - probabilities < top_p, probabilities, 0.0).cumsum(-1)
    index_B1 = torch.searchsorted(nucleus, (draws_B.double() * nucleus[:, -1]).unsqueeze(1), right=True)
    index_B1 = index_B1.clamp_max(tokens_BV.shape[1] - 1)
    chosen_B1 = probabilities.gather(1, index_B1) / nucleus[:, -1:]
    return tokens_BV.gather(1, index_B1).squeeze(1), chosen_B1.log().squeeze(1)
