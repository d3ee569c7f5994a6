"""Test sets of puzzles: each item has its own key and is new, sets are complete, and training data never repeat them."""

import csv
import hmac
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from substrate.data.prompt_overlap import prompt_digest
from substrate.interface.errors import DataError, UsageError
from substrate.items import draw_items, read_task, write_items
from substrate.payload import write_payload
from substrate.tasks import FAMILIES, LEVELS, STYLES, roman
from tests.support.paths import GOLDEN, ROOT

SEED = bytes(range(32))
families = st.sampled_from(sorted(FAMILIES))
levels = st.sampled_from(LEVELS)
seeds = st.binary(min_size=32, max_size=32)


def _task(tmp_path: Path, **config: object) -> Path:
    """A task file for golden/items_task.json with another exclusion list and folder, and changed configuration."""
    task = json.loads((GOLDEN / "items_task.json").read_text())
    (tmp_path / "exclude").write_text("")
    task["config"] |= config
    task["paths"] = {"exclude": str(tmp_path / "exclude"), "out": str(tmp_path)}
    path = tmp_path / "task.json"
    path.write_text(json.dumps(task))
    return path


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@settings(max_examples=20)
@given(families, levels, seeds, st.integers(1, 8), st.integers(0, 8))
def test_a_longer_set_begins_with_the_shorter(family, level, seed, count, more):
    assert draw_items(seed, family, level, count + more)[:count] == draw_items(seed, family, level, count)


@settings(max_examples=20)
@given(families, levels, seeds)
def test_excluded_prompts_are_skipped_and_the_rest_stays(family, level, seed):
    items = draw_items(seed, family, level, 6)
    excluded = {prompt_digest(item.prompt) for item in items[::2]}
    fewer = draw_items(seed, family, level, 3, excluded)
    assert fewer == items[1::2]


@settings(max_examples=20)
@given(families, levels, seeds, seeds)
def test_prompts_are_new_and_seeds_independent(family, level, seed, other):
    items = draw_items(seed, family, level, 20)
    assert len({item.prompt for item in items}) == 20
    assert seed == other or items != draw_items(other, family, level, 20)


def test_a_used_up_family_ends_with_a_message(monkeypatch):
    monkeypatch.setitem(roman.LEVELS, "small", roman.Level(num_examples=(1, 1), largest=1))  # a single puzzle
    with pytest.raises(DataError, match="gave 1 new puzzles in 200"):
        draw_items(SEED, "roman", "small", 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shifted_set_has_longer_prompts_that_a_family_still_reads_and_solves(family):
    plain, shifted = (draw_items(SEED, family, "small", 40, shift=shift) for shift in (0, 3))
    lengths = [sum(len(item.prompt) for item in items) for items in (plain, shifted)]
    assert lengths[1] > lengths[0]
    for item in shifted:
        rules = FAMILIES[family]
        assert rules.parse(item.prompt) == item.puzzle and rules.solve(item.puzzle).determined


@settings(max_examples=20)
@given(families, seeds, st.integers(1, 3))
def test_a_shift_keeps_the_longest_of_what_the_same_key_draws(family, seed, shift):
    """Independent of `draw_items`: by drawing anew from the key as the contract states it."""
    [item] = draw_items(seed, family, "small", 1, shift=shift)
    key = hmac.new(seed, f"{family}/0".encode(), "sha256").digest()
    rng, rules = random.Random(int.from_bytes(key)), FAMILIES[family]
    drawn = [rules.render(rules.generate(rng, "small")) for _ in range(shift + 1)]
    assert item.prompt in drawn and len(item.prompt) == max(map(len, drawn))


def test_golden_task_gives_golden_files(tmp_path):
    """The keys, the generators and the printed form: a change here changes every sealed set."""
    write_items(read_task(_task(tmp_path)))
    for name in ("prompts.jsonl", "answers.jsonl"):
        assert (tmp_path / name).read_text() == (GOLDEN / name).read_text()


def test_prompts_and_answers_are_apart_and_in_order(tmp_path):
    write_items(read_task(_task(tmp_path)))
    prompts, answers = _rows(tmp_path / "prompts.jsonl"), _rows(tmp_path / "answers.jsonl")
    assert [row["item_id"] for row in prompts] == [row["item_id"] for row in answers]
    assert [row["item_id"] for row in prompts] == sorted(row["item_id"] for row in prompts)
    assert all(set(row) == {"item_id", "family", "prompt"} for row in prompts)
    assert all(set(row) == {"item_id", "family", "answer"} for row in answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        rules = FAMILIES[prompt["family"]]
        assert rules.solve(rules.parse(prompt["prompt"])).answer == answer["answer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": ["roman", "sudoku"]}, "valid: a list of bit_manipulation, equation"),
        ({"families": []}, "valid: a list of"),
        ({"families": "roman"}, "valid: a list of"),
        ({"level": "medium"}, "valid: small, full"),
        ({"num_items_per_family": 0}, "valid: 1 to"),
        ({"num_items_per_family": True}, "valid: 1 to"),
        ({"shift": -1}, "valid: 0"),
        ({"shift": "1"}, "valid: 0"),
        ({"seed_hex": "ab"}, "64 lower-case hex digits"),
    ],
)
def test_wrong_configuration_says_what_is_valid(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        read_task(_task(tmp_path, **change))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": 2, "kind": "items"}', '{"schema": 1, "kind": "train"}']
)
def test_wrong_task_file_is_refused(tmp_path, content):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(UsageError, match="task file"):
        read_task(tmp_path / "task.json")


def test_a_secret_seed_is_not_printed(tmp_path):
    with pytest.raises(UsageError) as error:
        read_task(_task(tmp_path, seed_hex="c0ffee"))
    assert "c0ffee" not in str(error.value)


def _run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_entry_exit_codes(tmp_path):
    task = _task(tmp_path)
    assert _run("substrate.items", task).returncode == 0
    (tmp_path / "exclude").write_text("no digest\n")
    for arguments, code in (((task,), 65), ((tmp_path / "absent.json",), 64), (("--what",), 64)):
        done = _run("substrate.items", *arguments)
        assert done.returncode == code
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_three_hundred_items_are_quick(tmp_path):
    task = read_task(_task(tmp_path, num_items_per_family=100))
    write_items(task)
    start = time.process_time()
    write_items(task)
    assert time.process_time() - start < 0.3


def _real(family: str, seed: int) -> tuple[str, str]:
    puzzle = FAMILIES[family].generate(random.Random(seed), "full")
    return FAMILIES[family].render(puzzle), FAMILIES[family].solve(puzzle).answer


def _csv(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "prompt", "answer"), *rows])
    return path


def _payload(out: Path, **changes: object) -> dict[str, list[dict]]:
    arguments = {"seed": 1, "level": "small", "num_per_family": 4, "families": ("roman", "gravity")} | changes
    write_payload(out, **arguments)
    return {path.stem: _rows(path) for folder in (out / "data", out / "held") for path in folder.glob("*.jsonl")}


def test_training_data_are_reproducible_and_excluded(tmp_path):
    for name in ("one", "two"):
        write_payload(tmp_path / name, seed=1, level="small", num_per_family=30, families=FAMILIES)
    files = [sorted((tmp_path / name / "data").iterdir()) for name in ("one", "two")]
    assert [file.name for file in files[0]] == ["card.json", "train.jsonl", "train_prompts.sha256"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    rows = _rows(files[0][1])
    assert len(rows) == 30 * len(FAMILIES)
    assert files[0][2].read_text().splitlines() == sorted(prompt_digest(row["prompt"]) for row in rows)
    assert json.loads(files[0][0].read_text())["rows"]["generated"] == dict.fromkeys(sorted(FAMILIES), 30)
    for row in rows:
        assert list(row) == ["item_id", "family", "prompt", "answer", "traces", "source"]
        rules = FAMILIES[row["family"]]
        assert row["traces"] == {style: rules.trace(rules.parse(row["prompt"]), style) for style in STYLES}


def test_real_rows_are_split_and_what_is_unfit_is_listed(tmp_path, capsys):
    rows = [(f"r{n}", *_real("roman", n)) for n in range(60)] + [(f"g{n}", *_real("gravity", n)) for n in range(60)]
    rows += [("cipher", *_real("text_cipher", 1)), ("odd", "What is it?", "7"), ("false", _real("roman", 99)[0], "MMM")]
    rows += [("brace", _real("roman", 98)[0], "}")]
    found = _payload(tmp_path, csv=_csv(tmp_path / "train.csv", rows), held_out=tmp_path / "held")
    said = capsys.readouterr().out
    assert said.startswith("124 rows: ") and "; of families that tasks.families leaves out: 1 text_cipher\n" in said
    assert "1 because its prompt begins as no family's does (id odd)" in said
    card = json.loads((tmp_path / "data/card.json").read_text())
    listed = {row_id for ids in card["real"]["left_out"].values() for row_id in ids}
    assert {"odd", "brace"} <= listed <= {"odd", "brace", "false"} and "cipher" not in str(found)
    real = {row["item_id"] for row in found["train"] if row["source"] == "real"}
    held = {row["item_id"] for row in found["prompts"]}
    assert held == {row["item_id"] for row in found["answers"]} and 0 < len(held) < 40
    assert not real & held and real | held | {"real-false"} == {f"real-{row[0]}" for row in rows[:120]} | {"real-false"}
    assert card["rows"]["real"] == dict(Counter(row["family"] for row in found["train"] if row["source"] == "real"))
    assert set(found["prompts"][0]) == {"item_id", "family", "prompt"}
    digests = (tmp_path / "data/train_prompts.sha256").read_text().split()
    assert not {prompt_digest(row["prompt"]) for row in found["prompts"]} & set(digests)


def test_registered_prompt_among_real_rows_is_refused_by_name(tmp_path):
    prompt, _ = _real("roman", 5)
    registered = tmp_path / "mine.jsonl"
    registered.write_text(json.dumps({"item_id": "exam-7", "prompt": prompt.upper().replace(" ", "  ")}) + "\n")
    path = _csv(tmp_path / "train.csv", [(f"r{n}", *_real("roman", n)) for n in range(20) if n != 5])
    _payload(tmp_path, csv=path, held_out=tmp_path / "held", registered=[registered])
    assert int(prompt_digest(prompt), 16) % 10  # it would be trained on
    planted = [(f"r{n}", *_real("roman", n)) for n in range(20)]
    with pytest.raises(DataError, match="rows of .* repeat registered prompts: real-r5 repeats exam-7"):
        _payload(
            tmp_path, csv=_csv(path, planted), held_out=tmp_path / "held", registered=[registered]
        )  # fmt: skip


def test_generated_puzzles_keep_away_from_registered_ones(tmp_path):
    found = _payload(tmp_path / "one")["train"]
    registered = tmp_path / "mine.jsonl"
    registered.write_text(json.dumps({"item_id": "exam-1", "prompt": found[0]["prompt"].lower()}) + "\n")
    again = _payload(tmp_path / "two", registered=[registered])["train"]
    assert len(again) == len(found) and found[0]["prompt"] not in {row["prompt"] for row in again}


def test_csv_without_a_row_to_train_on_is_refused(tmp_path):
    path = _csv(tmp_path / "train.csv", [("cipher", *_real("text_cipher", 1))])
    with pytest.raises(
        DataError,
        match="none of the rows can be trained on: of families that .* out: 1 text_cipher; .*has gravity, roman",
    ):
        _payload(tmp_path, csv=path, held_out=tmp_path / "held")


def test_payload_command_line(tmp_path):
    arguments = ("substrate.payload", "--out", tmp_path, "--seed", 1, "--level", "small", "--num-per-family")
    assert _run(*arguments, 2).returncode == 0
    for wrong in ((0,), (2, "--families", "sudoku"), (2, "--csv", "x.csv")):
        done = _run(*arguments, *wrong)
        assert (done.returncode, done.stderr.count("\n")) == (64, 1)
