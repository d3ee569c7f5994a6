"""Test batches: prompts and padding have no weight, other tokens the weight asked for, and ranks share evenly."""

import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from substrate.data.batches import Batch, Shape, Stream, by_row, in_line, make_batch, pack
from substrate.data.rows import WEIGHTINGS, Row
from substrate.interface.errors import UsageError
from tests.support import trainings

FAMILIES = ("roman", "text_cipher", "unit_conversion")
EOS = 2


def _rows(count: int = 160) -> list[Row]:
    """Ids from 200 on in prompts, 300 + family at their end, from 3 on in what is learned."""
    return [
        Row(str(n), FAMILIES[n % 3], [200] * (1 + n % 7) + [300 + n % 3], [3 + n % 90] * (1 + n * n % 11) + [EOS], "")
        for n in range(count)
    ]


def _stream(batch_size: int = 8, weighting: str = "uniform", **shape: int) -> Stream:
    return Stream(_rows(), batch_size, Shape(**({"micro_batch_tokens": 40} | shape)), weighting)


def _parts(batches: list[Batch] | Stream) -> list[tuple[Row, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Row, tokens, labels and weights of every row."""
    return [
        part
        for batch in batches
        for micro in batch.micro_batches
        for part in zip(micro.rows, *(by_row(micro, values) for values in micro[:3]), strict=True)
    ]


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


def test_every_row_is_there_with_its_ids_and_the_answer_alone_is_learned():
    parts = _parts(_stream())
    assert sorted(int(row.item_id) for row, *_ in parts) == list(range(160))
    for row, tokens, labels, weights in parts:
        ids = row.prompt + row.learned
        assert tokens.tolist() == ids[:-1] and labels.tolist() == ids[1:]
        assert labels[weights > 0].tolist() == row.learned


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_a_mean_of_what_they_say(weighting):
    rows = _rows(8)
    weight_of = {
        row.item_id: weights[weights > 0] for row, _, _, weights in _parts([make_batch(rows, Shape(40), weighting)])
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
        assert batch.num_tokens == sum(int((micro.tokens_1L != 0).sum()) for micro in batch.micro_batches)


@given(
    st.lists(st.integers(1, 900), max_size=60), st.integers(1, 3000), st.sampled_from([1, 2, 4, 8])
)  # fmt: skip
@example([500, 400, 300], 600, 1)
@example([], 10, 2)
def test_packing_takes_every_row_once_within_the_budget(lengths, budget, dp_size):
    lines = pack(lengths, budget, dp_size)
    assert sorted(number for line in lines for number in line) == list(range(len(lengths)))
    assert len(lines) % dp_size == 0 and len(lines) >= dp_size
    loads = [sum(lengths[number] for number in line) for line in lines]
    assert loads == sorted(loads, reverse=True)
    longest = max(lengths, default=0)
    assert max(loads) <= max(budget, longest)
    assert max(loads) <= sum(loads) / len(lines) + longest  # the lines are even: Graham's bound
    assert all(load <= budget or len(line) == 1 for load, line in zip(loads, lines, strict=True))
    if longest <= budget / 2:  # by that bound
        assert len(lines) <= 2 * sum(lengths) / budget + 2 * dp_size
    assert all(lines) or len(lengths) < len(lines)


@given(
    st.lists(st.integers(1, 900), max_size=60),
    st.lists(st.integers(1, 3000), max_size=5),
    st.integers(900, 3000),
    st.sampled_from([1, 2, 4, 8]),
)
@example([300] * 31, [4], 4096, 1)
def test_rows_over_the_budget_cost_at_most_a_line_each(short, beyond, budget, dp_size):
    """Graham's rule gives each long row a line that takes nothing else, and packs the others as it packs them alone."""
    long = [budget + more for more in beyond]
    lines = pack([*long, *short], budget, dp_size)
    assert all([number] in lines for number in range(len(long)))
    assert len(lines) // dp_size <= len(pack(short, budget, dp_size)) // dp_size + -(-len(long) // dp_size)


def test_a_rank_without_rows_has_a_line_of_padding():
    """Three rows on two ranks with room for one each: equally many passes of equal shapes."""
    halves = [make_batch(_rows(3), Shape(1, 4, rank, 2)) for rank in range(2)]
    assert [[micro.tokens_1L.shape for micro in half.micro_batches] for half in halves][0] == [
        micro.tokens_1L.shape for micro in halves[1].micro_batches
    ]
    assert sorted(len(micro.rows) for half in halves for micro in half.micro_batches) == [0, 1, 1, 1]
    alone = next(micro for half in halves for micro in half.micro_batches if not micro.rows)
    assert not alone.weights_1L.any() and list(alone.lengths) == [alone.tokens_1L.shape[1]]
    assert by_row(alone, alone.weights_1L) == [] and torch.equal(in_line(alone, []), alone.weights_1L)


def test_lines_are_padded_to_a_multiple_which_the_last_row_takes():
    for batch in _stream(multiple=4):
        for micro in batch.micro_batches:
            length = micro.tokens_1L.shape[1]
            assert length % 4 == 0 and (micro.tokens_1L[0, length - 4 :] != 0).any()
            assert sum(micro.lengths) == length
            assert list(micro.lengths[:-1]) == [row.num_tokens - 1 for row in micro.rows[:-1]]
            assert micro.lengths[-1] >= micro.rows[-1].num_tokens - 1
            assert torch.equal(in_line(micro, by_row(micro, micro.weights_1L)), micro.weights_1L)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_data_parallel_ranks_share_the_batch_in_equal_shapes(weighting):
    whole, *halves = (
        _stream(weighting=weighting, **shape)[3] for shape in ({}, {"dp_size": 2}, {"dp_size": 2, "dp_rank": 1})
    )
    shapes = [[micro.tokens_1L.shape for micro in half.micro_batches] for half in halves]
    assert shapes[0] == shapes[1]
    learned = [
        sorted(
            (labels[weights > 0].tolist(), round(float(weights.max()), 7)) for _, _, labels, weights in _parts(batches)
        )
        for batches in ([whole], halves)
    ]
    assert learned[0] == learned[1]
    assert whole.num_tokens == halves[0].num_tokens == halves[1].num_tokens


def test_uneven_batches_are_refused():
    with pytest.raises(UsageError, match="batch_size 8 over 3"):
        _stream(dp_size=3)


@pytest.mark.parametrize(("dp_size", "mean"), [(1, 300), (2, 300), (4, 300), (8, 300), (4, 0)])
def test_less_than_a_twentieth_of_the_full_tasks_is_padding(dp_size, mean, full_lengths):
    """The steps of `experiment=nano_30b`, TP 2: rows as long as the full tasks write them, and scaled to 300 tokens on average."""
    recipe = trainings.config("experiment", "nano_30b")["recipe"]
    scale = mean / (sum(full_lengths) / len(full_lengths)) if mean else 1.0
    rows = [Row(str(n), "roman", [5], [6] * round(length * scale), "") for n, length in enumerate(full_lengths)]
    random.Random(1).shuffle(rows)
    places = tokens = 0
    size = recipe["batch_size"]
    for begin in range(0, len(rows) - size + 1, size):
        for rank in range(dp_size):
            batch = make_batch(rows[begin : begin + size], Shape(recipe["micro_batch_tokens"], 2, rank, dp_size))
            places += sum(micro.tokens_1L.numel() for micro in batch.micro_batches)
        tokens += batch.num_tokens
    assert places < tokens / 0.95, f"{1 - tokens / places:.3f} of the places is padding"


@pytest.fixture(scope="module")
def full_lengths(tmp_path_factory) -> list[int]:
    """Tokens of solved puzzles of every family, as the tiny tokenizer counts them, which has nearly one for each character."""
    from substrate.data.rows import read_examples
    from substrate.data.tokenizer import Tokenizer
    from substrate.payload import write_payload

    folder = tmp_path_factory.mktemp("full")
    write_payload(
        folder, seed=1, level="full", num_per_family=80, families=trainings.config("tasks", "full")["families"]
    )
    tokenizer = Tokenizer.from_file(trainings.ROOT / "substrate/base/tokenizer.json")
    return [
        len(tokenizer.encode_prompt(one.prompt)) + len(tokenizer.encode_answer(one.traces["stepwise"], one.answer)) - 1
        for one in read_examples(folder / "data/train.jsonl")
    ]
