"""Test the scorer against its rules, one case a line, and against any string; then the entry that scores files."""

import json
import math
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate.answers import extract, is_correct
from substrate.interface.errors import DataError
from substrate.score import score
from tests.support.paths import GOLDEN, ROOT


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        # 1. The last non-empty box.
        (r"\boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{}", "1"),
        (r"\boxed{1} then \boxed{  }", "1"),
        (r"\boxed{ XIV }", "XIV"),
        (r"\boxed{cat imagines book} and 17", "cat imagines book"),
        (r"the final answer is: 5 but \boxed{6} and 7", "6"),
        ("\\boxed{a\nb}", "a\nb"),
        # Nested braces count.
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{}}", "{}"),
        (r"\boxed{a{b}c}d}", "a{b}c"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1 \boxed{}}", r"1 \boxed{}"),
        # A box that is never closed runs to the end.
        (r"\boxed{12", "12"),
        (r"\boxed{12}} \boxed{3{4}", "3{4}"),
        (r"\boxed{7} \boxed{", "7"),
        # No box without the brace.
        (r"\boxed 5 or 6", "6"),
        # 2. "final answer" patterns: to the end of the line, in this order.
        ("The final answer is: 42", "42"),
        ("THE FINAL ANSWER IS: forty two", "forty two"),
        ("so my final answer is: XIV\nbecause of 3", "XIV"),
        ("Final answer: cat\n9", "cat"),
        ("final answer\uff1a 9.5 m\n3", "9.5 m"),
        ("final answer is: 1\nfinal answer is: 2\n3", "2"),
        ("The final answer is: 1\nFinal answer: 2", "1"),
        ("Final answer is: 1\nFinal answer: 2", "1"),
        ("Final answer:\n  8\n9", "8"),
        (r"\boxed{} The final answer is: 4 of 5", "4 of 5"),
        # 3. The last number.
        ("first 1, then 2.5, done", "2.5"),
        ("-3", "-3"),
        ("it is 10.", "10"),
        ("5-3", "-3"),
        ("1,234", "234"),
        ("the final answer is 42 metres", "42"),
        (r"\boxed{} 7", "7"),
        # 4. The last line that is not blank.
        ("cat\nking sees\n\n  ", "king sees"),
        ("king", "king"),
        ("", ""),
        ("\n \n", ""),
        (r"\boxed{}", r"\boxed{}"),
    ],
)
def test_extract(completion, answer):
    assert extract(completion) == answer


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        # Gold made only of 0 and 1: text.
        ("0110", "0110", True),
        ("0110", "110", False),
        ("1", "1.0", False),
        ("0", "0", True),
        ("10", "10.05", False),
        (" 101 ", "101\n", True),
        # Both numbers: 1 % of the larger, or 1e-5.
        ("100.5", "101.5", True),
        ("200", "198", True),
        ("200", "197.9", False),
        ("200", "202", True),
        ("200", "202.1", False),
        ("0.0", "0.00001", True),
        ("0.0", "0.00002", False),
        ("16.65", "16.65 ", True),
        ("16.65", "1.665e1", True),
        ("-5", "5", False),
        ("2", "2.0", True),
        ("20", "nan", False),
        ("20", "inf", False),
        # Text, without regard to case.
        ("XIV", "xiv", True),
        ("XIV", "XVI", False),
        ("cat sees", " Cat Sees", True),
        ("cat sees", "cat  sees", False),
        ("20", "20 m", False),
        ("XIV", "14", False),
        ("cat", "", False),
    ],
)
def test_is_correct(gold, answer, correct):
    assert is_correct(gold, answer) is correct


pieces = st.sampled_from([r"\boxed{", "{", "}", " ", "\n", "final answer is:", "-1.5", "x"])
texts = st.text() | st.lists(pieces).map("".join)


@given(texts)
def test_never_raises(text):
    assert isinstance(extract(text), str)
    assert isinstance(is_correct(text, extract(text)), bool)


@given(texts, texts.filter(lambda text: text.strip()))
def test_a_closed_box_at_the_end_decides(before, answer):
    if "{" not in answer and "}" not in answer:
        assert extract(f"{before}\\boxed{{{answer}}}") == answer.strip()


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_close_as_the_rule_says(gold, answer):
    assert is_correct(repr(gold), repr(answer)) is math.isclose(gold, answer, rel_tol=1e-2, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("gold", "completion", "correct"),
    [
        # A pattern up to the first brace would read `{` + `"` and `1 \\frac{1`.
        ('{"}', r'\boxed{{"}}', True),
        (r"1 \frac{1}{2}", r"so \boxed{1 \frac{1}{2}}", True),
        # As numbers these would be equal within one percent.
        ("00110100", r"\boxed{110100}", False),
        ("10000001", r"\boxed{10000000}", False),
        ("00110100", r"\boxed{00110100}", True),
    ],
)
def test_faults_that_a_simpler_scorer_has(gold, completion, correct):
    """Boxes cut at their first closing brace, and bit strings taken for numbers."""
    assert is_correct(gold, extract(completion)) is correct


def test_a_hundred_thousand_random_strings_raise_nothing():
    generator = random.Random(1)
    words = [
        r"\boxed{",
        "{",
        "}",
        " ",
        "\n",
        "final answer is:",
        "the final answer is:",
        "-",
        "1",
        "0.5",
        "e9",
        "nan",
        "\0",
    ]
    for _ in range(100_000):
        kind = generator.random()
        if kind < 0.5:
            text = "".join(generator.choices(words, k=generator.randint(0, 12)))
        else:  # any code point, surrogates among them
            text = "".join(chr(generator.randrange(0x110000)) for _ in range(generator.randint(0, 20)))
        answer = extract(text)
        assert isinstance(is_correct(answer, text), bool) and isinstance(is_correct(text, answer), bool)


def test_a_box_opened_for_ever_is_quick():
    assert extract(r"\boxed{" * 20_000)


def _completion(item_id: str, text: str = "") -> dict:
    return {"item_id": item_id, "completion": text, "num_tokens": 3, "truncated": False}


def _answer(item_id: str) -> dict:
    return {"item_id": item_id, "family": "roman", "answer": "IV"}


def test_scores_come_in_item_order():
    scores = score([_completion("b", "IV"), _completion("a", "VI")], [_answer("a"), _answer("b")])
    assert [(row["item_id"], row["correct"], row["answer"]) for row in scores] == [("a", 0, "VI"), ("b", 1, "IV")]


@pytest.mark.parametrize(
    ("completions", "answers", "message"),
    [
        (["a"], ["a", "b"], "'b' has no completion"),
        (["a", "b"], ["a"], "'b' has a completion but no answer"),
        (["a", "a"], ["a"], "'a' is repeated in the completions"),
        (["a"], ["a", "a"], "'a' is repeated in the answers"),
    ],
)
def test_wrong_item_is_named(completions, answers, message):
    with pytest.raises(DataError, match=message):
        score([_completion(item) for item in completions], [_answer(item) for item in answers])


def _run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "substrate.score", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_golden_completions_give_golden_scores(tmp_path):
    out = tmp_path / "scores.jsonl"
    done = _run("--completions", GOLDEN / "completions.jsonl", "--answers", GOLDEN / "answers.jsonl", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_text() == (GOLDEN / "scores.jsonl").read_text()
    assert {row["correct"] for row in map(json.loads, out.read_text().splitlines())} == {0, 1}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1"),
        ("", "line 1"),
        ('{"item_id": "a", "completion": "x", "num_tokens": "3", "truncated": false}\n', "num_tokens (int)"),
        ('{"item_id": "a", "completion": "x", "num_tokens": true, "truncated": false}\n', "num_tokens (int)"),
        (json.dumps(_completion("a")) + "\n\n", "line 2"),
    ],
)
def test_bad_file_is_one_line_and_65(tmp_path, content, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    done = _run("--completions", bad, "--answers", GOLDEN / "answers.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 65
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_command_line_is_one_line_and_64():
    done = _run("--completions", "x")
    assert (done.returncode, done.stderr.count("\n")) == (64, 1)
    assert done.stderr.startswith("error: ")
