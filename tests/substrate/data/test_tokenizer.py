"""Test the tokenizer: any text survives a round trip, the chat form ends thinking once, and small puzzles are short."""

import json
import random
import shutil
from dataclasses import asdict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from substrate.base.make_tokenizer import BEGIN_ID, END_ID, PAD_ID, TEMPLATE, make_tokenizer, special_tokens
from substrate.data.chat_template import ASSISTANT_TURN, USER_TURN
from substrate.data.special_tokens import SpecialTokens
from substrate.data.tokenizer import SUFFIX, Tokenizer
from substrate.interface.errors import DataError
from substrate.tasks import FAMILIES, LEVELS, STYLES
from tests.support.paths import ROOT

FILE = ROOT / "substrate" / "base" / "tokenizer.json"
TINY_VOCABULARY = 512  # hydra_conf/model/tiny.yaml
SMALL_FAMILIES = ("roman", "text_cipher", "unit_conversion")  # hydra_conf/tasks/small.yaml
SMALL_SEQUENCE = 192  # below recipe.sequence_length 256
SMALL_ANSWER = 64  # hydra_conf/tasks/small.yaml, max_new_tokens
tokenizer = Tokenizer.from_file(FILE)
families = st.sampled_from(sorted(FAMILIES))
generators = st.integers(0, 2**64).map(random.Random)


def test_checked_in_file_is_what_the_script_makes():
    made = make_tokenizer(FILE).to_str(pretty=True) + "\n"
    assert FILE.read_text(encoding="utf-8") == made, f"run: python -m substrate.base.make_tokenizer {FILE.parent}"
    assert SpecialTokens.read(FILE.parent) == (special_tokens(), TEMPLATE)


def test_it_fits_the_tiny_model():
    assert tokenizer.vocab_size <= TINY_VOCABULARY
    assert [tokenizer.encode(name) for name in ("<unk>", "<s>", "</s>")] == [[PAD_ID], [BEGIN_ID], [END_ID]]


@given(st.text())
def test_any_text_comes_back(text):
    if not any(name in text for name in ("<unk>", "<s>", "</s>")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(alphabet="0123456789.abcxyzIVX+*= ", max_size=40))
@example(" = = = 1")
def test_puzzle_characters_are_one_token_each(text):
    """Of these characters one phrase of the traces is made, which is a token of its own."""
    assert len(tokenizer.encode(text)) == len(text.replace(" = ", "="))


@given(families, st.sampled_from(LEVELS), generators, st.sampled_from(STYLES))
def test_chat_form(family, level, rng, style):
    rules = FAMILIES[family]
    puzzle = rules.generate(rng, level)
    prompt, trace, answer = rules.render(puzzle), rules.trace(puzzle, style), rules.solve(puzzle).answer
    prompt_ids, answer_ids = tokenizer.encode_prompt(prompt), tokenizer.encode_answer(trace, answer)
    assert prompt_ids[0] == BEGIN_ID and prompt_ids.count(BEGIN_ID) == 1 and END_ID not in prompt_ids
    assert answer_ids[-1] == END_ID and answer_ids.count(END_ID) == 1
    assert PAD_ID not in prompt_ids + answer_ids
    assert tokenizer.decode(prompt_ids) == USER_TURN + prompt + SUFFIX + ASSISTANT_TURN
    assert tokenizer.decode(answer_ids) == f"{trace}\n</think>\n\\boxed{{{answer}}}"
    both = tokenizer.decode(prompt_ids + answer_ids)
    assert both.count("<think>") == both.count("</think>") == 1


@given(st.text(max_size=20))
def test_the_tiny_form_is_the_one_that_its_weights_were_trained_in(prompt):
    assert tokenizer.encode_prompt(prompt) == [
        BEGIN_ID,
        *tokenizer.encode(USER_TURN + prompt + SUFFIX + ASSISTANT_TURN),
    ]


@pytest.mark.parametrize(
    ("trace", "words"),
    [("4 IV\n</think>", "thinking tag"), ("<think>\n4 IV", "thinking tag"), ("4 IV</s>", "an end token")],
)
def test_a_second_end_is_refused(trace, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.encode_answer(trace, "IV")


def test_nothing_after_the_end_of_a_turn_is_read():
    """Whatever an engine writes on, a box after the end cannot replace the one before it."""
    answered, boxed = tokenizer.encode_answer("4 IV", "IV"), tokenizer.encode("\\boxed{V}")
    assert tokenizer.decode([*answered, *boxed, END_ID]) == tokenizer.decode(answered) == "4 IV\n</think>\n\\boxed{IV}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"end_ids": []}, r"turn_end_ids \(2,\) must end with one of end_ids"),
        ({"turn_end_ids": [1]}, "must end with one of end_ids"),
        ({"end_ids": [True]}, r"end_ids is \[True\]"),
        ({"pad_id": -1}, "pad_id is -1"),
        ({"begin_id": None}, "prompt_has_begin is true, and begin_id is null"),
        ({"schema": 2}, "schema must be 1"),
        ({"more": 1}, "the keys begin_id, .* are needed"),
        (
            {"template": {**asdict(special_tokens().template), "compared": True}},
            "a template was compared that does not exist",
        ),
        (
            {"template": {**asdict(special_tokens().template), "sha256": "0"}},
            "is not the template that tokens.json names",
        ),
    ],
)
def test_damaged_facts_are_refused_with_the_cure(tmp_path, change, words):
    shutil.copyfile(FILE, tmp_path / FILE.name)
    special_tokens().write(tmp_path, TEMPLATE)
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=rf"{words}.*; build the image again"):
        Tokenizer.from_file(tmp_path / FILE.name)


@pytest.mark.parametrize("style", STYLES)
@given(family=st.sampled_from(SMALL_FAMILIES), rng=generators)
def test_small_puzzles_are_short(style, family, rng):
    rules = FAMILIES[family]
    puzzle = rules.generate(rng, "small")
    prompt_ids = tokenizer.encode_prompt(rules.render(puzzle))
    answer_ids = tokenizer.encode_answer(rules.trace(puzzle, style), rules.solve(puzzle).answer)
    assert len(answer_ids) <= SMALL_ANSWER
    assert len(prompt_ids) + len(answer_ids) <= SMALL_SEQUENCE
