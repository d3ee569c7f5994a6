"""Test the canaries about an agent's edits: planted leaks are seen, honest edits are not, hostile text costs little."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agent import added_text, leak_check
from pipeline.agent.fork_diff import difference
from pipeline.agent.leak_check import Internals, canaries_of, held_prompts, look_at, signs
from pipeline.campaign.errors import Interrupted
from tests.support.leaks import CODE, INTERNALS, PLANTED, ROOT, Item, draw_items, found_in

GOLDEN = ROOT / "tests/golden"
# What the check does not see, measured in docs/log.md.
UNSEEN = ("a prompt with one word in twenty replaced", "prompts backwards")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return draw_items(5, 4, "full")


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in UNSEEN])
def test_planted_leaks_are_seen(name: str, items: list[Item]) -> None:
    kind, plant = PLANTED[name]
    for start in range(0, len(items), 5):
        found = found_in(*plant(items[start:] + items[:start], random.Random(start)), items)
        assert kind in {each.kind for each in found}
        for each in found:
            assert each.kind in leak_check.KINDS and each.line >= 0
            assert all(item["prompt"] not in each.detail for item in items)  # a canary repeats no judged item


def test_the_line_of_a_leak(items: list[Item]) -> None:
    source = CODE + f"\n\nx = 1\nX = {items[0]['prompt']!r}\n"
    found = [
        each for each in found_in("substrate/recipes/x.py", CODE, source, items) if each.kind == "evaluation_prompt"
    ]
    wanted = next(number for number, line in enumerate(source.split("\n"), 1) if line.startswith("X = "))
    assert wanted in {each.line for each in found} and found[0].detail == f"dev/{items[0]['item_id']} 100 %"


def test_honest_edits_are_silent(items: list[Item]) -> None:
    """What is in the image already, fixed texts of puzzles, own puzzles of another seed in the data, ordinary code."""
    others = [each for each in draw_items(6, 20, "full") if each["prompt"] not in {item["prompt"] for item in items}]
    rows = "".join(json.dumps({"prompt": each["prompt"], "answer": each["answer"]}) + "\n" for each in others)
    assert found_in("data/train.jsonl", "", rows, items) == []
    for name in (
        "substrate/recipes/grpo.py",
        "substrate/data/rows.py",
        "substrate/training/schedule.py",
        "substrate/training/run.py",
    ):
        text = (ROOT / name).read_text()
        assert found_in(name, "", text, items) == []
    scorer = (ROOT / "substrate/training/rollouts.py").read_text()
    assert {each.kind for each in found_in("substrate/training/rollouts.py", "", scorer, items)} == {
        "scorer_import",
        "scorer_copy",
    }
    assert (
        found_in("substrate/training/rollouts.py", scorer, scorer.replace("import", "import", 1) + "\nx = 1\n", items)
        == []
    )


def test_the_scorers_internals_follow_its_source() -> None:
    assert {"is_correct", "REL_TOLERANCE", "_closing_brace"} <= INTERNALS.names and "extract" not in INTERNALS.names
    assert r"final answer is:\s*([^\n]+)" in INTERNALS.patterns
    other = Internals.of(["_MAGIC_VALUE = 3\nX = 1\n\n\ndef judge_it_well(x):\n    return x\n"])
    assert other.names == {"_MAGIC_VALUE", "judge_it_well"} and not other.patterns


def test_seeds_of_judged_sets() -> None:
    seed = "ab" * 32
    found = signs("substrate/recipes/x.py", f"x = '{seed.upper()}'\n", {1: f"x = '{seed.upper()}'"}, INTERNALS, [seed])
    assert [(each.kind, each.detail) for each in found] == [("secret_seed", "a seed of a judged set")]


def test_a_fork_is_looked_at(tmp_path: Path, items: list[Item]) -> None:
    pristine, fork = tmp_path / "pristine", tmp_path / "fork"
    shutil.copytree(ROOT / "substrate", pristine / "substrate", ignore=shutil.ignore_patterns("__pycache__", "base"))
    shutil.copytree(pristine, fork)
    (fork / "substrate/recipes/sft_lora.py").write_text(CODE + f"\nX = {items[0]['prompt']!r}\n")
    (fork / "substrate/recipes/blob.npy").write_bytes(b"\x93NUMPY\xff\xfe")
    (fork / "data").mkdir()
    (fork / "data/train.jsonl").write_text(json.dumps({"prompt": items[1]["prompt"]}) + "\n")
    look = look_at(pristine, fork, difference(pristine, fork))
    assert [each.record() for each in look.canaries] == [
        {"kind": "binary_file", "path": "substrate/recipes/blob.npy", "line": 0, "detail": "8 bytes"}
    ]
    assert {"data/train.jsonl:1": items[1]["prompt"]}.items() <= look.texts.items()
    json.dumps([each.record() for each in look.canaries])


def test_too_much_text_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pristine, fork = tmp_path / "pristine", tmp_path / "fork"
    shutil.copytree(ROOT / "substrate", pristine / "substrate", ignore=shutil.ignore_patterns("__pycache__", "base"))
    shutil.copytree(pristine, fork)
    (fork / "rows.jsonl").write_text("".join(f'{{"prompt": "row {n}"}}\n' for n in range(1000)))
    monkeypatch.setattr(leak_check, "MAX_TEXT_IN_ALL", 1000)
    look = look_at(pristine, fork, difference(pristine, fork))
    assert [each.kind for each in look.canaries] == ["unread_file"] and 0 < look.canaries[0].line < 1000
    monkeypatch.setattr(leak_check, "MAX_TEXT", 5)
    look = look_at(pristine, fork, difference(pristine, fork))
    assert all(len(text) <= 5 for text in look.texts.values())
    assert look.canaries[0].detail.endswith("only 5 are compared with judged prompts")
    monkeypatch.setattr(leak_check, "MAX_READ_BYTES", 1000)
    with pytest.raises(leak_check.Failure):  # the image's own scorer, which the worker always can read
        look_at(pristine, fork, difference(pristine, fork))


def test_golden_overlaps_give_canaries() -> None:
    """The file that the image's entry writes (tests/substrate/data/test_prompt_overlap.py) is read here."""
    rows, texts, answers = (
        [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]
        for name in ("overlaps.jsonl", "texts.jsonl", "answers.jsonl")
    )
    found = canaries_of(
        rows,
        {each["text_id"]: each["text"] for each in texts},
        {each["item_id"]: each["answer"] for each in answers},
        "dev",
    )
    assert [(each.kind, each.path, each.line, each.detail) for each in found] == [
        ("evaluation_prompt", "substrate/recipes/a.py", 7, "dev/roman-000000 100 %"),
        ("evaluation_answer", "substrate/recipes/a.py", 7, "dev/roman-000000 100 %"),
        ("similar_prompt", "substrate/recipes/b.py", 1, "dev/roman-000001 99 %"),
    ]


HOSTILE = {
    "an endless literal": 'X = """' + "a\n" * 60_000,
    "quotation marks": '"' * 60_000,
    "brackets": "(" * 60_000,
    "lambda in lambda": "x = " + "lambda: " * 20_000,
    "minus": "x = " + "-" * 60_000 + "1",
    "one long line": "x = [" + "1, " * 60_000 + "]",
    "backslashes": "x = '" + "\\" * 60_000,
    "numbers below the limit": ("1 " * 98 + "x ") * 3000,
    "NUL and surrogates": "x = '\\ud800\\x00'\n" * 20_000,
    "indentation": "".join(" " * n + "if x:\n" for n in range(500)),
    "many literals": "x = " + "'a' + " * 20_000 + "'b'\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_costs_little(text: str) -> None:
    began = time.process_time()
    added = added_text.added_lines("", text)
    for path in ("substrate/recipes/x.py", "data/x.jsonl"):
        found = signs(path, text, added, INTERNALS)
        assert len(found) <= leak_check.MAX_OF_A_KIND * len(leak_check.KINDS)
        assert sum(len(each) for _, each in added_text.texts_of(path, text, added)) <= 4 * len(text)
    assert time.process_time() - began < 20


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_can_be_looked_at(before: str, after: str) -> None:
    added = added_text.added_lines(before, after)
    assert set(added.values()).isdisjoint(before.split("\n"))
    for path in ("a.py", "a.jsonl", "a.md"):
        signs(path, after, added, INTERNALS)
        for line, _ in added_text.texts_of(path, after, added):
            assert 1 <= line <= after.count("\n") + 1


def test_the_image_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[Item]) -> None:
    """The entry of this checkout, with the sandbox's folders at their places outside of one. A stop ends it."""

    def start(
        root: Path, entry: str, words: list[str], binds: dict[str, Path], work: Path, log: Path, watch: Any
    ) -> Path:
        watch()
        (work / "out").mkdir()
        places = [word.replace("/in/", f"{binds['/in']}/").replace("/out/", f"{work}/out/") for word in words]
        subprocess.run([sys.executable, "-m", f"substrate.{entry}", *places], cwd=root, check=True)
        return work / "out"

    monkeypatch.setattr(leak_check.image_process, "start", start)
    for name in ("dev", "fresh"):
        (tmp_path / name).mkdir()
    for name, half in (("dev", items[:12]), ("fresh", items[12:])):
        for file in ("prompts", "answers"):
            (tmp_path / name / f"{file}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in half))
    texts = {
        "substrate/recipes/a.py:3": f"{items[0]['prompt']} and {items[20]['prompt']}",
        "substrate/recipes/b.py:1": "x",
    }
    sets = {name: tmp_path / name for name in ("dev", "fresh")}
    found = held_prompts(ROOT, texts, sets, tmp_path, tmp_path / "log")

    def stop() -> None:
        raise Interrupted("the worker is to stop")

    with pytest.raises(Interrupted):
        held_prompts(ROOT, texts, sets, tmp_path / "again", tmp_path / "log", stop)
    prompts = [each.detail for each in found if each.kind == "evaluation_prompt"]
    assert prompts == [f"dev/{items[0]['item_id']} 100 %", f"fresh/{items[20]['item_id']} 100 %"]


def test_nothing_is_asked_without_texts(tmp_path: Path) -> None:
    assert held_prompts(tmp_path, {}, {"dev": tmp_path}, tmp_path, tmp_path / "log") == []


def test_a_line_that_is_made_to_be_slow_takes_no_time() -> None:
    """The worker's main thread reads an agent's lines, and nothing could interrupt a pattern of cubic time."""
    lines = {number: mark * 100_000 + "+" * 100_000 + "!" for number, mark in enumerate("b+'\\ ", 1)}
    began = time.process_time()
    signs("substrate/recipes/x.txt", "\n".join(lines.values()), lines, Internals())
    assert time.process_time() - began < 5


def test_signs_are_listed_up_to_a_bound(tmp_path: Path) -> None:
    pristine, fork = tmp_path / "pristine", tmp_path / "fork"
    for root in (pristine, fork):
        for name in leak_check.SCORER:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("")
    for number in range(30):
        (fork / f"substrate/{number}.py").write_text(f"{'a' * 200}\n" * 20)
    canaries = look_at(pristine, fork, difference(pristine, fork)).canaries
    assert len(canaries) == leak_check.MAX_CANARIES + 1 and canaries[-1].detail.endswith("more signs are not listed")
