"""Test training rows: the same for the same seed, in the shares asked for, with everything that is left out reported."""

import json
from collections import Counter
from pathlib import Path

import pytest

from substrate.data.prompt_overlap import prompt_digest
from substrate.data.rows import Example, Plan, Prepared, Row, family_order, prepare, read_examples
from substrate.interface.errors import DataError, UsageError

MIX = {"roman": 1.0, "unit_conversion": 2.0, "text_cipher": 0.5, "unused": 0.0}
FAMILIES = [family for family, share in MIX.items() if share]


def _examples(per_family: int = 10, source: str = "generated") -> list[Example]:
    return [
        Example(
            f"{source}-{family}-{n:06d}", family, f"{family} {source} {n}", str(n), {"stepwise": "t" * (n % 5)}, source
        )
        for family in FAMILIES
        for n in range(per_family)
    ]


def _encode(example: Example) -> tuple[list[int], list[int]]:
    return [1] * len(example.prompt), [3 + ord(letter) for letter in example.traces["stepwise"] + example.answer] + [2]


def _plan(**changes) -> Plan:
    plan = {"mix": MIX, "real_share": 0.0, "epochs": 0.0, "curriculum": "shuffled", "holdout_per_family": 0}
    return Plan(**(plan | {"sequence_length": 64, "num_places": 160, "seed": 7} | changes))


def _prepared(examples: list[Example] | None = None, **changes) -> Prepared:
    return prepare(_examples() if examples is None else examples, _encode, _plan(**changes))


def _ids(rows: list[Row]) -> list[str]:
    return [row.item_id for row in rows]


def test_shares_are_followed_at_every_prefix():
    total = sum(MIX.values())
    counts: Counter[str] = Counter()
    for place, row in enumerate(_prepared().rows, start=1):
        counts[row.family] += 1
        for name, share in MIX.items():
            assert abs(counts[name] - share / total * place) <= 1.0
    assert counts["unused"] == 0 and counts.total() == 160
    assert counts == Counter(family_order(MIX, 160))


def test_same_seed_same_rows_and_another_seed_another_order():
    assert _prepared() == _prepared()
    assert _ids(_prepared().rows) != _ids(_prepared(seed=8).rows)


def test_a_longer_run_begins_with_the_shorter():
    assert _ids(_prepared(num_places=300).rows)[:160] == _ids(_prepared().rows)


def test_a_pass_visits_every_example_once():
    rows = _prepared(mix={"roman": 1.0}, num_places=30).rows
    passes = [sorted(_ids(rows[start : start + 10])) for start in (0, 10, 20)]
    assert passes[0] == passes[1] == passes[2] and len(set(passes[0])) == 10
    assert _ids(rows[:10]) != _ids(rows[10:20])


@pytest.mark.parametrize(("epochs", "different"), [(0.0, 10), (1.0, 10), (2.0, 10), (5.0, 6), (30.0, 1), (1e-320, 10)])
def test_epochs_say_how_many_examples_are_different(epochs, different):
    prepared = _prepared(mix={"roman": 1.0}, num_places=30, epochs=epochs)
    assert len(set(_ids(prepared.rows))) == different
    assert prepared.card["families"]["roman"]["examples"] == different
    counts = Counter(_ids(prepared.rows))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_short_first_within_each_family():
    prepared = _prepared(curriculum="short_first")
    for family in FAMILIES:
        lengths = [len(row.learned) for row in prepared.rows if row.family == family]
        assert lengths == sorted(lengths)
    assert Counter(_ids(prepared.rows)) == Counter(_ids(_prepared().rows))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_real_rows_have_their_share_of_each_family(share):
    examples = _examples() + _examples(source="real")
    prepared = _prepared(examples, real_share=share)
    for family in FAMILIES:
        rows = [row for row in prepared.rows if row.family == family]
        assert abs(sum(row.item_id.startswith("real") for row in rows) - share * len(rows)) <= 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("real_share", [0.0, 0.5])
def test_a_slice_has_its_share_of_the_generated_rows_of_the_families_that_have_one(share, real_share):
    examples = _examples() + _examples(source="real")
    examples += [example for example in _examples(source="slice") if example.family == "roman"]
    prepared = _prepared(examples, slice_share=share, real_share=real_share)
    for family in FAMILIES:
        rows = [row for row in prepared.rows if row.family == family]
        num_real = sum(row.item_id.startswith("real") for row in rows)
        in_slice = sum(row.item_id.startswith("slice") for row in rows)
        assert abs(num_real - real_share * len(rows)) <= 1
        if family != "roman":
            assert in_slice == 0
        elif share == 1:
            assert in_slice == len(rows) - num_real
        else:  # the other generated rows are drawn from all of the family, and half of those lie in the slice
            mean = (share + (1 - share) / 2) * (len(rows) - num_real)
            assert abs(in_slice - mean) <= 4


def test_slices_change_no_row_of_a_recipe_that_does_not_ask_for_them():
    examples = _examples()
    marked = [example._replace(source="slice") if n % 3 else example for n, example in enumerate(examples)]
    assert _prepared(marked).rows == _prepared(examples).rows


def test_a_share_of_a_slice_that_no_row_is_in_is_refused():
    with pytest.raises(DataError, match="no row of the training file lies in a declared slice; set it to 0"):
        _prepared(slice_share=0.5)
    with pytest.raises(UsageError, match="slice_share is 1.5; valid are 0 to 1"):
        _plan(slice_share=1.5)


def test_holdout_is_never_trained_on_and_alike_for_all_seeds():
    one, other = (_prepared(holdout_per_family=3, seed=seed) for seed in (1, 2))
    assert one.holdout == other.holdout
    held = {item_id for rows in one.holdout.values() for item_id in _ids(rows)}
    assert len(held) == 3 * len(FAMILIES) and not held & set(_ids(one.rows + other.rows))


def test_too_long_examples_are_left_out_and_listed():
    prepared = _prepared(sequence_length=31)
    for family in FAMILIES:
        described = prepared.card["families"][family]
        assert described["longest"] <= 31
        long = {e.item_id for e in _examples() if e.family == family and sum(map(len, _encode(e))) > 31}
        assert set(described["too_long"]) == long and not long & set(_ids(prepared.rows))
    with pytest.raises(DataError, match="every generated example of roman is longer than sequence_length 4"):
        _prepared(sequence_length=4)


def test_card_counts_what_is_there_and_names_every_prompt():
    prepared = _prepared(num_places=40, holdout_per_family=1)
    card = prepared.card
    assert sum(described["places"] for described in card["families"].values()) == 40
    assert sum(d["tokens"] for d in card["families"].values()) == sum(row.num_tokens for row in prepared.rows)
    by_id = {example.item_id: example.prompt for example in _examples()}
    named = {prompt_digest(by_id[row.item_id]) for row in prepared.rows}
    assert card["prompts"] == sorted(named)
    assert json.loads(json.dumps(card)) == card


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mix": {"sudoku": 1.0}}, DataError, "mix names sudoku, which the training file lacks; it holds roman, text"),
        ({"mix": {"roman": 0.0}}, UsageError, "valid are shares >= 0, of which one is > 0"),
        ({"mix": {}}, UsageError, "valid are shares"),
        ({"mix": {"roman": 2.0, "text_cipher": -1.0}}, UsageError, "valid are shares"),
        ({"mix": {"roman": float("inf")}}, UsageError, "valid are shares"),
        ({"curriculum": "hardest_first"}, UsageError, "valid are shuffled, short_first"),
        ({"real_share": 0.5}, DataError, "no real example of roman is left"),
        ({"holdout_per_family": 10}, DataError, "no generated example of roman is left"),
    ],
)
def test_what_cannot_be_made_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        _prepared(**changes)


def test_reading_names_the_bad_line(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(example._asdict()) + "\n" for example in _examples()))
    assert read_examples(path) == _examples()
    path.write_text(path.read_text() + '{"item_id": "x"}\n')
    with pytest.raises(DataError, match=r"train.jsonl line 31: .* an object with item_id"):
        read_examples(path)
