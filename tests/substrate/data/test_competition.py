"""Test the competition's rows: reading, refusals with the line's number, the split by puzzle, and solutions.

The rows are never part of this repository. Without them the tests that need them are skipped with that reason.
"""

import csv
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from substrate.answers import is_correct
from substrate.data import families_report
from substrate.data.competition import Row, read_rows
from substrate.data.families_report import Count
from substrate.interface.errors import DataError
from substrate.tasks import FAMILIES, bit_manipulation, text_cipher
from tests.support.paths import ROOT

REAL_ROWS = Path(os.environ.get("NEMOTRON_TRAIN_CSV", ROOT / "../shared/data/nemotron_challenge/train.csv"))
HEADER = "id,prompt,answer\n"
SOLVED = {"bit_manipulation": 0.985, "equation": 0.7}  # at least, of the rows below; the other families all


def _write(path: Path, *rows: tuple[str, str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("id", "prompt", "answer"), *rows])
    return path


def _made(family: str, seed: int) -> tuple[str, str]:
    puzzle = FAMILIES[family].generate(random.Random(seed), "full")
    return FAMILIES[family].render(puzzle), FAMILIES[family].solve(puzzle).answer


def _run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "substrate.families", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: ''; the header must be id,prompt,answer"),
        ("id,question,answer\n", "line 1: 'id,question,answer'"),
        ('"id"x,prompt,answer\n', "line 1: "),
        (HEADER, "has no rows"),
        (HEADER + "1,p,a\n2,p\n", "line 3: 2 fields"),
        (HEADER + "1,p,a,b\n", "line 2: 4 fields"),
        (HEADER + "1,p,\n", "line 2: no answer"),
        (HEADER + "1,  ,a\n", "line 2: no prompt"),
        (HEADER + '1,"two\nlines",a\n2,p,a\n1,p,a\n', "line 5: id 1 came before, on line 3"),
        (HEADER + '1,"never closed,a\n', "line 2: unexpected end of data"),
        (HEADER + '1,"p"x,a\n', "line 2:"),
    ],
)
def test_malformed_file_is_told_with_its_line(tmp_path, text, message):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert message in str(error.value)


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"id,prompt,answer\n1,\xff,2\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_rows(tmp_path / "train.csv")
    done = _run("report", tmp_path / "absent.csv")
    assert (done.returncode, done.stderr.count("\n")) == (65, 1)


def test_report_counts_each_kind_of_row(tmp_path):
    prompt, answer = _made("roman", 1)
    cipher, plain = _made("text_cipher", 2)
    rows = read_rows(
        _write(
            tmp_path / "train.csv",
            ("right", prompt, answer),
            ("wrong", prompt, "MMM"),
            ("other", "What is it?", "7"),
            ("broken", FAMILIES["gravity"].PHRASES[0] + "and no more", "7"),
            ("brace", cipher, plain + "}"),
        )
    )
    found = families_report.report(rows)
    assert found.by_family["roman"].rows == 2
    assert (found.by_family["roman"].correct, found.by_family["roman"].wrong) == (1, 1)
    assert found.by_family[families_report.UNKNOWN] == Count(rows=1)
    assert (found.by_family["gravity"].rows, found.by_family["gravity"].recognised) == (1, 0)
    assert found.by_family["text_cipher"].unscorable == 1
    text = found.as_text(with_rows=True)
    for row_id in ("wrong", "other", "broken", "brace"):
        assert f" {row_id}: " in text
    assert "solved 20.00 % of 5 rows" in text


def test_same_puzzle_is_in_one_part_whatever_its_white_space():
    row = Row(2, "1", "a  b\nc", "x", "", None)
    assert row.is_dev == Row(3, "2", " a b c ", "y", "", None).is_dev
    parts = Counter(Row(2, "1", str(number), "x", "", None).is_dev for number in range(2000))
    assert 140 < parts[True] < 260  # a tenth, five standard deviations to each side


def test_commands_print_tables_and_json(tmp_path):
    rows = [(f"{family}-{seed}", *_made(family, seed)) for family in FAMILIES for seed in range(6)]
    path = _write(tmp_path / "train.csv", *rows)
    found = json.loads(_run("report", path, "--json").stdout)
    assert list(found) == sorted(FAMILIES)
    names = {"rows", "recognised", "identical", "correct", "wrong", "undetermined", "seconds"}
    assert all(names <= set(counts) and counts["correct"] == counts["rows"] == 6 for counts in found.values())
    compared = json.loads(_run("compare", path, "--json").stdout)
    assert {each["family"] for each in compared} == set(FAMILIES)
    assert all(0 <= each["p_value"] <= 1 for each in compared)
    assert "answer: " in _run("show", "bit_manipulation", "--seed", 3).stdout


def test_difference_is_seen():
    """Puzzles of level small under the name of real rows: nearly every test must object."""
    puzzles = [FAMILIES["roman"].generate(random.Random(seed), "small") for seed in range(200)]
    rows = [Row(1, str(n), "", "", "roman", puzzle) for n, puzzle in enumerate(puzzles)]
    assert min(each.p_value for each in families_report.compare(rows).differences) < 1e-9


@pytest.fixture(scope="module")
def real_rows() -> list[Row]:
    if not REAL_ROWS.is_file():
        pytest.skip(f"the competition's train.csv is not at {REAL_ROWS}; set NEMOTRON_TRAIN_CSV to its path")
    return read_rows(REAL_ROWS)


def test_every_real_row_is_recognised_and_printed_back(real_rows):
    assert all(row.puzzle and FAMILIES[row.family].render(row.puzzle) == row.prompt for row in real_rows)
    assert min(Counter(row.family for row in real_rows).values()) > 1300


@pytest.mark.parametrize("family", FAMILIES)
def test_real_rows_are_solved_and_explained(real_rows, family):
    """Every fourth row (the whole takes half a minute, and `report` counts it): what is called determined is right."""
    rows, rules = [row for row in real_rows if row.family == family][::4], FAMILIES[family]
    right = 0
    for row in rows:
        solution = rules.solve(row.puzzle)
        correct = is_correct(row.answer, solution.answer)
        right += correct
        assert correct or not solution.determined
        assert rules.trace(row.puzzle, "stepwise")
    assert right >= SOLVED.get(family, 1.0) * len(rows)


@pytest.mark.parametrize("family", ["bit_manipulation", "gravity", "roman", "text_cipher", "unit_conversion"])
def test_full_level_looks_like_the_real_rows(real_rows, family):
    """No feature's p-value is one that five families would show by chance less than once in a thousand runs.

    Equations take a minute: `compare` shows them.
    """
    rows = [row for row in real_rows if row.family == family][:500]
    differences = families_report.compare(rows).differences
    assert min(each.p_value for each in differences) > 0.001 / (5 * len(differences))


def test_eleven_rules_are_needed_and_enough(real_rows):
    """Rules that only half of the rows show explain the other half: they are the generator's, not a list of rows."""
    rows = [row.puzzle for row in real_rows if row.family == "bit_manipulation"]
    found = [{reading.rule.name for reading in bit_manipulation.readings(puzzle)} for puzzle in rows[::4]]
    assert all(found)
    assert {next(iter(names)) for names in found if len(names) == 1} == set(bit_manipulation.RULES)


def test_lexicon_is_that_of_the_real_rows(real_rows):
    words: Counter[str] = Counter()
    for row in real_rows:
        if row.family == "text_cipher":
            words.update(row.answer.split())
            for _, plain in row.puzzle.examples:
                words.update(plain.split())
    assert set(words) == {word for slot in text_cipher.LEXICON.values() for word in slot}
