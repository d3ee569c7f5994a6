"""Test the comparison of training prompts with evaluation prompts: a repeated prompt is named, however it is spelled."""

import hashlib
import json
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate.data.prompt_overlap import overlaps, prompt_digest, tokens_of
from substrate.interface.errors import DataError
from substrate.overlap import held_by, read_card_digests
from substrate.tasks import FAMILIES
from tests.support.paths import ROOT

families = st.sampled_from(sorted(FAMILIES))


def _prompts(family: str, count: int, level: str = "full") -> list[tuple[str, str]]:
    rules = FAMILIES[family]
    return [(f"{family}-{n}", rules.render(rules.generate(random.Random(n), level))) for n in range(count)]


DEV = [item for family in FAMILIES for item in _prompts(family, 6)]


def _respelled(prompt: str) -> str:
    """The same puzzle with other white space, letter case and numbers."""
    words = prompt.upper().replace("\n", "  \r\n\t").split(" ")
    # A whole number with more zeros; none of the families writes a number so.
    return "   ".join(f"00{word}" if word.isdigit() else word for word in words)


@pytest.mark.parametrize("change", [str, str.upper, lambda p: " ".join(p.split()), _respelled], ids=range(4))
@pytest.mark.parametrize("planted", DEV[::3], ids=lambda item: item[0])
def test_planted_prompt_is_named(planted, change):
    others = [(f"other-{n}", prompt) for n, (_, prompt) in enumerate(_prompts("roman", 50, "small"))]
    found = overlaps([*others, ("planted", change(planted[1]))], DEV)
    assert [(each.training_id, each.evaluation_id) for each in found] == [("planted", planted[0])]
    assert "planted repeats" in str(found[0])


def test_number_written_otherwise_is_the_same_number():
    assert tokens_of("16.70 m, 007, 1.0") == tokens_of("16.7 M , 7, 1")
    assert tokens_of("16.70") != tokens_of("16.07") and tokens_of("70") != tokens_of("7")
    assert tokens_of("\uff11\uff12") == ["12"]  # full-width digits


@pytest.mark.parametrize("family", FAMILIES)
def test_nearly_the_same_prompt_is_named_and_another_is_not(family):
    (_, prompt), *others = _prompts(family, 100)
    nearly = f"Solve this riddle. {prompt.replace('Alice', 'Bob')} Take your time."
    assert [each.evaluation_id for each in overlaps([("near", nearly)], [("dev", prompt)])] == ["dev"]
    assert not overlaps(others, [("dev", prompt)])


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_in_another_order_are_the_same_puzzle(family):
    """Lines of examples are those between the family's fixed first and last sentences."""
    for item_id, prompt in _prompts(family, 20):
        header = FAMILIES[family].PHRASES[0]
        lines = prompt.removeprefix(header).split("\n")
        count = prompt.count("\n") - header.count("\n") - FAMILIES[family].PHRASES[-1].count("\n")
        turned = header + "\n".join([*reversed(lines[:count]), *lines[count:]])
        if count >= 4:
            assert [each.evaluation_id for each in overlaps([("turned", turned)], [(item_id, prompt)])] == [item_id]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.replace(" ", " \u200b"),
        lambda p: p.replace("->", "\u2192"),
        lambda p: p.replace("'", "\u2019"),
        lambda p: "\ufeff" + p.replace("-", "\u2212"),
        lambda p: "\n".join(f"**{line}**" if line else line for line in p.split("\n")),
        lambda p: p.translate({ord(d): 0x660 + int(d) for d in "0123456789"}),
    ],
    ids=["zero width", "arrow", "quote", "minus", "emphasis", "digits"],
)
def test_characters_that_look_alike_are_alike(change):
    evaluation = [item for item in DEV if not item[0].startswith("equation")]  # whose symbols are these very characters
    for item_id, prompt in evaluation:
        assert prompt_digest(change(prompt)) == prompt_digest(prompt), item_id


def test_text_that_is_no_unicode_can_be_compared():
    assert prompt_digest("\ud800") != prompt_digest("\ud801")


def test_many_prompts_of_one_family_are_compared_quickly():
    prompts = _prompts("gravity", 2000)
    begun = time.process_time()
    assert not overlaps([(f"t-{n}", FAMILIES["gravity"].render(FAMILIES["gravity"].generate(random.Random(n), "full")))
                         for n in range(10_000, 12_000)], prompts)  # fmt: skip
    assert time.process_time() - begun < 5


@given(families, st.integers(0, 2**32))
def test_equal_digest_means_equal_tokens(family, seed):
    rules = FAMILIES[family]
    prompt = rules.render(rules.generate(random.Random(seed), "small"))
    assert prompt_digest(_respelled(prompt)) == prompt_digest(prompt)
    assert prompt_digest(prompt + " 7") != prompt_digest(prompt)


@given(st.text(), st.text())
def test_any_two_texts_can_be_compared(one, other):
    found = overlaps([("a", one)], [("b", other)])
    assert bool(found) == (tokens_of(one) == tokens_of(other)) or found[0].share < 1


def _run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "substrate.overlap", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_entry_names_the_items_of_a_card(tmp_path):
    card, prompts, out = (tmp_path / name for name in ("card.json", "dev.jsonl", "out.jsonl"))
    prompts.write_text("".join(json.dumps({"item_id": i, "family": "", "prompt": p}) + "\n" for i, p in DEV))
    digests = sorted([prompt_digest(_respelled(DEV[5][1])), hashlib.sha256(b"other").hexdigest()])
    for named, expected in ((digests, [{"item_id": DEV[5][0]}]), ([], [])):
        card.write_text(json.dumps({"schema": 1, "prompts": named}))
        done = _run("--card", card, "--prompts", prompts, "--out", out)
        assert (done.returncode, done.stderr) == (0, "")
        assert [json.loads(line) for line in out.read_text().splitlines()] == expected


def test_entry_names_the_prompts_that_golden_texts_hold(tmp_path):
    golden = ROOT / "tests" / "golden"
    done = _run("--texts", golden / "texts.jsonl", "--prompts", golden / "prompts.jsonl", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out").read_text() == (golden / "overlaps.jsonl").read_text()
    for words in ((), ("--texts", "x", "--card", "y")):
        assert _run(*words, "--prompts", golden / "prompts.jsonl", "--out", tmp_path / "out").returncode == 64


@given(st.sampled_from(DEV), st.text(), st.text())
def test_a_text_holds_a_prompt_whatever_stands_around_it(item, before, after):
    """What stands around it must not join its first or last word: that is another word."""
    text = f"{before}\n. {_respelled(item[1])} .\n{after}"
    assert {"text_id": "t", "item_id": item[0], "percent": 100} in list(held_by([("t", text)], [item]))
    found = list(held_by([("t", before + after)], DEV))
    assert all(80 <= each["percent"] <= 100 for each in found)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"prompts": "x"}', '{"prompts": ["no digest"]}', "[" * 99999])
def test_card_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(DataError):
        read_card_digests(tmp_path / "card.json")
