"""Test the tokenizer: any text survives a round trip, the chat form ends thinking once, and small puzzles are short."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from substrate.base.make_tokenizer import make_tokenizer
from substrate.data.tokenizer import ASSISTANT_TURN, BOS_ID, EOS_ID, PAD_ID, SUFFIX, USER_TURN, Tokenizer
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
    assert FILE.read_text(encoding="utf-8") == made, f"run: python -m substrate.base.make_tokenizer {FILE}"


def test_it_fits_the_tiny_model():
    assert tokenizer.vocab_size <= TINY_VOCABULARY
    assert [tokenizer.encode(name) for name in ("<unk>", "<s>", "</s>")] == [[PAD_ID], [BOS_ID], [EOS_ID]]


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
    assert prompt_ids[0] == BOS_ID and prompt_ids.count(BOS_ID) == 1 and EOS_ID not in prompt_ids
    assert answer_ids[-1] == EOS_ID and answer_ids.count(EOS_ID) == 1
    assert PAD_ID not in prompt_ids + answer_ids
    assert tokenizer.decode(prompt_ids) == USER_TURN + prompt + SUFFIX + ASSISTANT_TURN
    assert tokenizer.decode(answer_ids) == f"{trace}\n</think>\n\\boxed{{{answer}}}"
    both = tokenizer.decode(prompt_ids + answer_ids)
    assert both.count("<think>") == both.count("</think>") == 1


@pytest.mark.parametrize("trace", ["4 IV\n</think>", "<think>\n4 IV"])
def test_a_second_thinking_tag_is_refused(trace):
    with pytest.raises(ValueError, match="thinking tag"):
        tokenizer.encode_answer(trace, "IV")


@pytest.mark.parametrize("style", STYLES)
@given(family=st.sampled_from(SMALL_FAMILIES), rng=generators)
def test_small_puzzles_are_short(style, family, rng):
    rules = FAMILIES[family]
    puzzle = rules.generate(rng, "small")
    prompt_ids = tokenizer.encode_prompt(rules.render(puzzle))
    answer_ids = tokenizer.encode_answer(rules.trace(puzzle, style), rules.solve(puzzle).answer)
    assert len(answer_ids) <= SMALL_ANSWER
    assert len(prompt_ids) + len(answer_ids) <= SMALL_SEQUENCE
