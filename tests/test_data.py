"""The training stream: same seed same batches, shares as asked, prompts and padding not learned."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from substrate.data import Batch, Example, Stream, family_order, read_examples
from substrate.errors import DataError, UsageError

MIX = {"roman": 1.0, "unit_conversion": 2.0, "text_cipher": 0.5, "unused": 0.0}
FAMILIES = [family for family, share in MIX.items() if share]
EOS = 2


def _examples(per_family: int = 10) -> list[Example]:
    return [
        Example(f"{family}-{index:06d}", family, f"p{'x' * (index % 7)}", str(index), "t" * (index % 5))
        for family in FAMILIES
        for index in range(per_family)
    ]


def _encode(example: Example) -> tuple[list[int], list[int]]:
    """A tokenizer of bytes: ids from 3 on, prompts from 200 on."""
    prompt = [200 + ord(letter) for letter in example.prompt] + [300 + FAMILIES.index(example.family)]
    return prompt, [3 + ord(letter) for letter in example.trace + example.answer] + [EOS]


def _stream(**changes) -> Stream:
    arguments = {"seed": 7, "num_steps": 20, "batch_size": 8, "micro_batch_size": 3, "sequence_length": 64} | changes
    return Stream(_examples(), MIX, _encode, **arguments)


def _rows(stream: Stream) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, labels and mask of every row."""
    return [row for batch in stream for micro_batch in batch.micro_batches for row in zip(*micro_batch, strict=True)]


def test_shares_are_followed_at_every_prefix():
    total = sum(MIX.values())
    counts: Counter[str] = Counter()
    for place, family in enumerate(family_order(MIX, 500), start=1):
        counts[family] += 1
        for name, share in MIX.items():
            assert abs(counts[name] - share / total * place) <= 1.0
    assert counts["unused"] == 0


def test_stream_holds_each_family_by_its_share():
    markers = [int(tokens[(tokens >= 300) & (tokens < 310)][0]) - 300 for tokens, _, _ in _rows(_stream())]
    counts = Counter(FAMILIES[marker] for marker in markers)
    assert counts == Counter(family for family in family_order(MIX, 160))
    assert counts["unit_conversion"] == pytest.approx(160 * 2 / 3.5, abs=1)


def _equal(one: Batch, other: Batch) -> bool:
    pairs = zip(one.micro_batches, other.micro_batches, strict=True)
    return one[1:] == other[1:] and all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_same_seed_same_batches_in_any_order():
    first, second = _stream(), _stream()
    assert all(_equal(first[step], second[step]) for step in (13, 0, 19))


def test_other_seed_other_order():
    rows = [[labels.tolist() for _, labels, _ in _rows(_stream(seed=seed))] for seed in (7, 8)]
    assert rows[0] != rows[1]


def test_a_pass_visits_every_example_once():
    arguments = {"num_steps": 2, "batch_size": 8, "micro_batch_size": 8, "sequence_length": 64}
    stream = Stream(_examples(8), {"roman": 1}, _encode, seed=1, **arguments)
    passes = [sorted(map(tuple, batch.micro_batches[0].labels_BL.tolist())) for batch in stream]
    assert passes[0] == passes[1] and len(set(passes[0])) == 8


def test_prompt_and_padding_are_not_learned_and_the_answer_is():
    for tokens, labels, mask in _rows(_stream()):
        learned = labels[mask == 1]
        assert learned[-1] == EOS and not (learned >= 200).any()
        first, last = int(mask.nonzero()[0]), int(mask.nonzero()[-1])
        assert mask[first : last + 1].all()
        assert tokens[first] >= 300  # the prompt's last token predicts the answer's first
        assert torch.equal(tokens[1 : last + 1], labels[:last])


def test_counts_are_those_of_the_whole_batch():
    for batch in _stream():
        assert batch.num_targets == sum(int(micro.mask_BL.sum()) for micro in batch.micro_batches)
        assert batch.num_tokens == sum(int((micro.tokens_BL != 0).sum()) for micro in batch.micro_batches)


def test_padding_is_the_longest_of_the_micro_batch_rounded_up():
    for batch in _stream(multiple=4):
        assert [len(micro.tokens_BL) for micro in batch.micro_batches] == [3, 3, 2]
        for micro in batch.micro_batches:
            length = micro.tokens_BL.shape[1]
            assert length % 4 == 0 and (micro.tokens_BL[:, length - 4 :] != 0).any()


def test_data_parallel_ranks_share_the_batch_in_equal_shapes():
    whole, halves = _stream()[3], [_stream(dp_rank=rank, dp_size=2)[3] for rank in range(2)]
    shapes = [[micro.tokens_BL.shape for micro in half.micro_batches] for half in halves]
    assert shapes[0] == shapes[1]
    rows = [
        sorted(labels[mask == 1].tolist() for micro in batches for labels, mask in zip(*micro[1:], strict=True))
        for batches in (whole.micro_batches, halves[0].micro_batches + halves[1].micro_batches)
    ]
    assert rows[0] == rows[1]
    assert whole[1:] == halves[0][1:] == halves[1][1:]


def test_too_long_an_example_is_named():
    with pytest.raises(DataError, match=r"unit_conversion-\d{6} has \d+ tokens; sequence_length allows 4"):
        list(_stream(sequence_length=4))


def test_family_without_examples_and_uneven_batches_are_refused():
    with pytest.raises(DataError, match="mix names bit_rules, which the training file lacks; it holds roman"):
        arguments = {"num_steps": 1, "batch_size": 1, "micro_batch_size": 1, "sequence_length": 9}
        Stream(_examples(), {"bit_rules": 1.0}, _encode, seed=1, **arguments)
    with pytest.raises(UsageError, match="batch_size 8 over 3"):
        _stream(dp_size=3)


def test_reading_names_the_bad_line(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(example._asdict()) + "\n" for example in _examples()))
    assert read_examples(path) == _examples()
    path.write_text(path.read_text() + '{"item_id": "x"}\n')
    with pytest.raises(DataError, match=r"train.jsonl line 31: KeyError\('family'\)"):
        read_examples(path)
