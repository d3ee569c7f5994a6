"""Test batches: prompts and padding have no weight, other tokens the weight asked for, and ranks share evenly."""

import pytest
import torch

from substrate.data.batches import Batch, Shape, Stream, make_batch
from substrate.data.rows import WEIGHTINGS, Row
from substrate.interface.errors import UsageError

FAMILIES = ("roman", "text_cipher", "unit_conversion")
EOS = 2


def _rows(count: int = 160) -> list[Row]:
    """Ids from 200 on in prompts, 300 + family at their end, from 3 on in what is learned."""
    return [
        Row(str(n), FAMILIES[n % 3], [200] * (1 + n % 7) + [300 + n % 3], [3 + n % 90] * (1 + n * n % 11) + [EOS], "")
        for n in range(count)
    ]


def _stream(batch_size: int = 8, weighting: str = "uniform", **shape: int) -> Stream:
    return Stream(_rows(), batch_size, Shape(**({"micro_batch_size": 3} | shape)), weighting)


def _parts(stream: Stream) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, labels and weights of every row."""
    return [row for batch in stream for micro in batch.micro_batches for row in zip(*micro[:3], strict=True)]


def _equal(one: Batch, other: Batch) -> bool:
    pairs = zip(one.micro_batches, other.micro_batches, strict=True)
    tensors = all(torch.equal(a, b) for left, right in pairs for a, b in zip(left[:3], right[:3], strict=True))
    return one.num_tokens == other.num_tokens and tensors


def test_batches_come_in_any_order():
    first, second = _stream(), _stream()
    assert len(first) == 20
    assert all(_equal(first[step], second[step]) for step in (13, 0, 19))
    with pytest.raises(IndexError, match="valid 0 to 19"):
        first[20]


def test_prompt_and_padding_are_not_learned_and_the_answer_is():
    for tokens, labels, weights in _parts(_stream()):
        learned = labels[weights > 0]
        assert learned[-1] == EOS and not (learned >= 200).any()
        first, last = int(weights.nonzero()[0]), int(weights.nonzero()[-1])
        assert (weights[first : last + 1] > 0).all()
        assert tokens[first] >= 300  # the prompt's last token predicts the answer's first
        assert torch.equal(tokens[1 : last + 1], labels[:last])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_a_mean_of_what_they_say(weighting):
    rows = _rows(8)
    batch = make_batch(rows, Shape(3), weighting)
    weight_of = {
        row.item_id: line[line > 0]
        for micro in batch.micro_batches
        for row, line in zip(micro.rows, micro.weights_BL, strict=True)
    }
    sums = {row.item_id: float(weight_of[row.item_id].sum()) for row in rows}
    if weighting == "min_log_prob":  # shared out among the row's tokens by the loss
        assert all(torch.allclose(weight, torch.tensor(1 / 8)) for weight in weight_of.values())
        return
    assert sum(sums.values()) == pytest.approx(1.0)
    if weighting == "per_row":
        assert all(total == pytest.approx(1 / 8) for total in sums.values())
    elif weighting == "per_family":
        for family in FAMILIES:
            assert sum(sums[row.item_id] for row in rows if row.family == family) == pytest.approx(1 / 3)
            assert len({round(float(weight_of[r.item_id][0]), 7) for r in rows if r.family == family}) == 1
    else:
        assert len({round(float(value), 7) for weight in weight_of.values() for value in weight}) == 1


def test_tokens_are_those_of_the_whole_batch():
    for batch in _stream():
        assert batch.num_tokens == sum(int((micro.tokens_BL != 0).sum()) for micro in batch.micro_batches)


def test_padding_is_the_longest_of_the_micro_batch_rounded_up():
    for batch in _stream(multiple=4):
        assert [len(micro.tokens_BL) for micro in batch.micro_batches] == [3, 3, 2]
        for micro in batch.micro_batches:
            length = micro.tokens_BL.shape[1]
            assert length % 4 == 0 and (micro.tokens_BL[:, length - 4 :] != 0).any()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_data_parallel_ranks_share_the_batch_in_equal_shapes(weighting):
    whole, *halves = (
        _stream(weighting=weighting, **shape)[3] for shape in ({}, {"dp_size": 2}, {"dp_size": 2, "dp_rank": 1})
    )
    shapes = [[micro.tokens_BL.shape for micro in half.micro_batches] for half in halves]
    assert shapes[0] == shapes[1]
    learned = [
        sorted(
            (labels[weights > 0].tolist(), round(float(weights.max()), 7))
            for micro in batches
            for labels, weights in zip(micro.labels_BL, micro.weights_BL, strict=True)
        )
        for batches in (whole.micro_batches, [*halves[0].micro_batches, *halves[1].micro_batches])
    ]
    assert learned[0] == learned[1]
    assert whole.num_tokens == halves[0].num_tokens == halves[1].num_tokens


def test_uneven_batches_are_refused():
    with pytest.raises(UsageError, match="batch_size 8 over 3"):
        _stream(dp_size=3)
