"""Test several documents in one line: attention against a full mask, and that none sees another, to the last bit or to rounding."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from substrate.data.batches import Shape, by_row, make_batch
from substrate.model import build_model, init_weights, token_log_probs
from substrate.ops import kernels
from substrate.ops.fused import conv_silu
from substrate.ops.sequences import SHORT, Packing
from tests.support import trainings
from tests.support.reference import small_config

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
CPU = torch.device("cpu")


def _by_full_mask(q, k, v, lengths):
    """The definition: the whole square, with a mask."""
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (numbers[:, None] == numbers).tril()
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


def _heads(length: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, 1, heads, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2))
    return [t.requires_grad_() for t in (q, k, v)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=8))
def test_attention_of_a_packed_row_is_that_of_a_full_mask(lengths):
    heads = _heads(sum(lengths))
    ours, theirs = Packing(lengths, CPU).attend(*heads), _by_full_mask(*heads, lengths)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=theirs.dtype)
    for mine, other in zip(*(torch.autograd.grad((t * weights).sum(), heads) for t in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_attention_pays_for_documents_and_not_for_the_row(lengths):
    groups = Packing(lengths, CPU).groups
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    paid = sum(len(group) * lengths[group[0]] ** 2 for group in groups)
    assert paid <= 16 / 9 * sum(length**2 for length in lengths) + len(lengths) * SHORT**2


def test_a_gpu_attends_by_lengths_in_half_precision_alone(monkeypatch):
    """What torch's kernel is given, played by its definition: it runs on a GPU alone."""
    from torch.nn.attention import varlen

    called = []

    def played(q, k, v, ends, ends_k, longest, longest_k, *, window_size, enable_gqa):
        called.append(ends.dtype)
        assert window_size == (-1, 0) and enable_gqa and longest == longest_k == 40 and ends is ends_k
        lengths = ends.diff().tolist()
        return _by_full_mask(q[:, None], k[:, None], v[:, None], lengths)[:, 0].unflatten(1, q.shape[1:])

    monkeypatch.setattr(varlen, "varlen_attn", played)
    lengths = [40, 3, 17]
    with kernels.using(packed="varlen"):
        exact = Packing(lengths, CPU).attend(*_heads(60))
        assert not called
        halves = [t.bfloat16() for t in _heads(60)]
        found = Packing(lengths, CPU).attend(*halves)
    assert called == [torch.int32]
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)


def test_another_document_s_token_changes_no_bit_of_attention_and_convolution():
    lengths, changed = [70, 3, 90, 1, 64, 130], slice(73, 163)  # the third
    packing = Packing(lengths, CPU)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[changed] = False
    results = []
    for is_changed in (False, True):
        heads = _heads(sum(lengths), dtype=torch.float32)
        rows = torch.randn(sum(lengths), 1, 6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            if is_changed:
                for tensor in heads:
                    tensor[80] += 5.0
                rows[80] += 5.0
        rows.requires_grad_()
        context = packing.attend(*heads)
        generator = torch.Generator().manual_seed(2)
        taps, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
        convolved = conv_silu(rows, taps, bias, packing)
        (context.square().sum() + convolved.square().sum()).backward()
        results.append([context, convolved, *(t.grad for t in heads), rows.grad])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("pattern", ["M", "*", "E", "ME*M"])
def test_another_document_s_token_changes_nothing_else_beyond_rounding(alone, pattern):
    """Documents that begin at the ends of chunks of the scan, before and after, and within."""
    model = build_model(small_config(pattern=pattern), alone)
    init_weights(model, seed=1)
    chunk = small_config().mamba_chunk_size
    lengths = [chunk, chunk - 1, 1, 2, chunk + 1, 3 * chunk, 5, 2 * chunk - 3]
    (line,) = make_batch(trainings.random_rows(lengths), Shape(10**6)).micro_batches
    outputs = []
    for change in (0, 1):
        tokens = line.tokens_1L.clone()
        place = sum(line.lengths[:2]) + 3
        tokens[0, place] = 3 + (tokens[0, place] + 7 * change) % 60 if change else tokens[0, place]
        with torch.no_grad():
            outputs.append(by_row(line, token_log_probs(model, tokens, line.labels_1L, line.lengths)))
    for number, (before, after) in enumerate(zip(*outputs, strict=True)):
        if number == 2:
            assert not torch.equal(before, after)
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
