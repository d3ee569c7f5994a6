"""The training stream and the schedule: same seed same batches, shares as asked, prompts not learned, NeMo's numbers."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from substrate.data import Example, Stream, family_order, read_examples
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
    arguments = {"seed": 7, "num_steps": 20, "batch_size": 8, "sequence_length": 64} | changes
    return Stream(_examples(), MIX, _encode, **arguments)


def _families(stream: Stream) -> list[str]:
    """The family of each place, read back from the marker that ends a prompt."""
    return [
        FAMILIES[int(row[(row >= 300) & (row < 310)][0]) - 300] for batch in stream for row in batch.tokens_BL  # B L
    ]


def test_shares_are_followed_at_every_prefix():
    total = sum(MIX.values())
    counts: Counter[str] = Counter()
    for place, family in enumerate(family_order(MIX, 500), start=1):
        counts[family] += 1
        for name, share in MIX.items():
            assert abs(counts[name] - share / total * place) <= 1.0
    assert counts["unused"] == 0


def test_stream_holds_each_family_by_its_share():
    counts = Counter(_families(_stream()))
    assert counts == Counter(family for family in family_order(MIX, 160))
    assert counts["unit_conversion"] == pytest.approx(160 * 2 / 3.5, abs=1)


def test_same_seed_same_batches_in_any_order():
    first, second = _stream(), _stream()
    for step in (13, 0, 19):  # the second is asked for batches it has not drawn up to
        for one, other in zip(first[step], second[step], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_other_seed_other_batches():
    rows = [_stream(seed=seed, sequence_length=64)[0].labels_BL for seed in (7, 8)]
    assert rows[0].shape != rows[1].shape or not torch.equal(*rows)


def test_a_pass_visits_every_example_once():
    stream = Stream(_examples(8), {"roman": 1}, _encode, seed=1, num_steps=2, batch_size=8, sequence_length=64)
    passes = [sorted(map(tuple, batch.labels_BL.tolist())) for batch in stream]
    assert passes[0] == passes[1] and len(set(passes[0])) == 8


def test_prompt_and_padding_are_not_learned_and_the_answer_is():
    for batch in _stream():
        for tokens, labels, mask in zip(batch.tokens_BL, batch.labels_BL, batch.mask_BL, strict=True):
            learned = labels[mask == 1]
            assert learned[-1] == EOS and not (learned >= 200).any()
            first, last = int(mask.nonzero()[0]), int(mask.nonzero()[-1])
            assert torch.equal(tokens[1 : last + 1], labels[:last])
            assert tokens[first] >= 300  # the prompt's last token predicts the answer's first
        assert batch.num_targets == int(batch.mask_BL.sum())
        assert batch.num_tokens == int((batch.tokens_BL != 0).sum())


def test_padding_is_the_longest_rounded_up():
    for batch in _stream(multiple=4):
        length = batch.tokens_BL.shape[1]
        assert length % 4 == 0 and (batch.tokens_BL[:, length - 4 :] != 0).any()


def test_data_parallel_slices_make_up_the_batch():
    whole, halves = _stream()[3], [_stream(dp_rank=rank, dp_size=2)[3] for rank in range(2)]
    for field in ("tokens_BL", "labels_BL", "mask_BL"):
        assert torch.equal(torch.cat([getattr(half, field) for half in halves]), getattr(whole, field))
    assert {half.num_targets for half in halves} == {whole.num_targets}


def test_too_long_an_example_is_named():
    with pytest.raises(DataError, match=r"unit_conversion-\d{6} has \d+ tokens; sequence_length allows 4"):
        list(_stream(sequence_length=4))


def test_family_without_examples_and_uneven_batches_are_refused():
    with pytest.raises(DataError, match="mix names bit_rules, which the training file lacks; it holds roman"):
        Stream(_examples(), {"bit_rules": 1.0}, _encode, seed=1, num_steps=1, batch_size=1, sequence_length=9)
    with pytest.raises(UsageError, match="batch_size 8 over 3"):
        _stream(dp_size=3)


def test_reading_names_the_bad_line(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(example._asdict()) + "\n" for example in _examples()))
    assert read_examples(path) == _examples()
    path.write_text(path.read_text() + '{"item_id": "x"}\n')
    with pytest.raises(DataError, match=r"train.jsonl line 31: KeyError\('family'\)"):
        read_examples(path)
