"""Test result files and ledger: they are read back as written, equal rows give equal bytes, and damage is refused by name."""

import hashlib
from pathlib import Path
from typing import Any

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import IntegrityError
from pipeline.execution import results
from tests.support.campaigns import changed_byte
from tests.support.full_disk import run_on_small_disk

FAMILIES = ("roman", "text_cipher")
any_text = st.text(max_size=8)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "item_id": any_text, "family": st.sampled_from(FAMILIES), "correct": st.integers(0, 1), "answer": any_text,
            "num_tokens": st.integers(0, 10_000), "truncated": st.integers(0, 1),
        }
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


def attributes(**changes: Any) -> dict[str, Any]:
    zero = {name: kind() for name, kind in results.ATTRIBUTES.items()}
    return {
        **zero,
        "schema_version": results.SCHEMA,
        "arm": "a3",
        "role": "axis",
        "status": "completed",
        "exit_class": "completed",
        **changes,
    }


def item(number: int, correct: int = 1, truncated: int = 0) -> dict[str, Any]:
    return {
        "item_id": f"roman-{number:06d}", "family": FAMILIES[number % 2], "correct": correct,
        "answer": f"answer {number}", "num_tokens": number, "truncated": truncated,
    }  # fmt: skip


STEP = {"step": 1, "loss": 0.5, "grad_norm": 1.5, "learning_rate": 0.004, "tokens": 4096, "seconds": 0.25}
ITEMS = {"dev": [item(n, n % 3 == 0) for n in range(12)], "fresh": [item(n, 1, n == 5) for n in range(12)]}
TEXTS = {name: [f"so \\boxed{{{n}}}" for n in range(12)] for name in ITEMS}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("results") / "a3.h5"
    results.write_result(path, attributes(seed=7, gpu_seconds=1.5), ITEMS, [STEP], TEXTS)
    return path


def test_the_file_has_every_documented_name(written):
    """By plain h5py, as an outsider would read it."""
    with h5py.File(written) as file:
        assert set(file.attrs) == set(results.ATTRIBUTES)
        assert set(file) == {"items", "train", "completions"}
        assert set(file["items"]) == {"dev", "fresh"} == set(file["completions"])
        assert list(file["items/dev/item_id"].asstr()) == [row["item_id"] for row in ITEMS["dev"]]
        assert list(file["items/fresh/truncated"]) == [int(n == 5) for n in range(12)]
        assert {name: file[f"train/{name}"][0] for name in results.TRAIN_COLUMNS} == STEP
        assert list(file["completions/dev"].asstr()) == TEXTS["dev"]


def test_an_outcome_has_one_character_an_item_in_order(written):
    outcome = results.read_outcome(written, "digest")
    assert (outcome.arm, outcome.status, outcome.result_digest) == ("a3", "completed", "digest")
    assert outcome.outcomes["dev"] == {"roman": "100100", "text_cipher": "010010"}
    assert outcome.outcomes["fresh"] == {"roman": "111111", "text_cipher": "11T111"}


def test_attributes_are_read_back_with_their_types(written):
    assert results.read_attributes(written) == attributes(seed=7, gpu_seconds=1.5)


@given(rows)
def test_marks_follow_the_rows_whatever_they_hold(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "any.h5"
    results.write_result(
        path, attributes(traceback=table[0]["answer"]), {"dev": table}, [], {"dev": [row["answer"] for row in table]}
    )
    expected = {
        family: "".join("T" if row["truncated"] else str(row["correct"]) for row in table if row["family"] == family)
        for family in sorted({row["family"] for row in table})
    }
    assert results.read_outcome(path, "").outcomes["dev"] == expected


def test_a_failed_attempt_has_facts_and_no_score(tmp_path):
    path = tmp_path / "a3.h5"
    results.write_result(path, attributes(status="failed", exit_class="diverged", traceback="…\n" * 3), {}, [], {})
    outcome = results.read_outcome(path, "")
    assert (outcome.status, outcome.exit_class, outcome.outcomes) == ("failed", "diverged", {})
    assert results.status_of(path) == "failed"


def test_the_same_rows_give_the_same_bytes(tmp_path, written):
    reordered = {name: ITEMS[name] for name in reversed(list(ITEMS))}
    results.write_result(tmp_path / "again.h5", attributes(seed=7, gpu_seconds=1.5), reordered, [STEP], TEXTS)
    assert (tmp_path / "again.h5").read_bytes() == written.read_bytes()


@pytest.mark.parametrize("change", [{"colour": "red"}, {"seed": None}])
def test_a_missing_or_surplus_attribute_is_a_defect_of_the_caller(tmp_path, change):
    given_attributes = {name: value for name, value in {**attributes(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=next(iter(change))):
        results.write_result(tmp_path / "a.h5", given_attributes, {}, [], {})
    assert not (tmp_path / "a.h5").exists()


def refused(path: Path) -> str:
    for read in (results.read_attributes, lambda path: results.read_outcome(path, "")):
        with pytest.raises(IntegrityError, match=path.name) as error:
            read(path)
    assert results.status_of(path) == ""
    return str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path, written):
    whole = written.read_bytes()
    path = tmp_path / "a3.h5"
    cuts = {*range(0, 100), *range(100, len(whole), 499), len(whole) - 1}
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert "start the arm again to replace it" in refused(path)


def test_a_flipped_bit_anywhere_is_refused(tmp_path, written):
    whole, path = written.read_bytes(), tmp_path / "a3.h5"
    for position in {*range(0, len(whole), 211), 0, 63, 64, 511, 512, len(whole) - 1}:
        path.write_bytes(whole)
        with changed_byte(path, position):
            assert "checksum" in refused(path)


def reseal(path: Path) -> None:
    """The checksum that fits what a test has changed."""
    content = path.read_bytes()[results.USER_BLOCK :]
    path.write_bytes(hashlib.sha256(content).hexdigest().encode().ljust(results.USER_BLOCK, b"\0") + content)


def test_absent_foreign_and_other_files_are_refused(tmp_path):
    assert "The arm has published no result yet" in refused(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("no HDF5 at all")
    refused(tmp_path / "text.h5")
    (tmp_path / "folder.h5").mkdir()
    refused(tmp_path / "folder.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file.attrs["made_by"] = "somebody else"
    refused(tmp_path / "foreign.h5")


def test_another_schema_is_refused_with_the_one_that_is_read(tmp_path, written):
    path = tmp_path / "a3.h5"
    path.write_bytes(written.read_bytes())
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 1
        del file.attrs["edited_files"]  # the first schema had none
    reseal(path)
    assert "has schema 1. Read it with a version for that schema; this one reads 2" in refused(path)


@pytest.mark.parametrize(
    "damage", ["attribute of another kind", "no column", "a column too short", "a table that is none"]
)
def test_what_does_not_fit_the_schema_is_refused(tmp_path, written, damage):
    path = tmp_path / "a3.h5"
    path.write_bytes(written.read_bytes())
    with h5py.File(path, "r+") as file:
        if damage == "attribute of another kind":
            file.attrs["seed"] = "seven"
        elif damage == "no column":
            del file["items/dev/answer"]
        elif damage == "a column too short":
            del file["items/dev/correct"]
            file["items/dev/correct"] = [1, 0]
        else:
            del file["items"]
            file["items"] = [1, 2, 3]
    reseal(path)
    if damage == "attribute of another kind":
        refused(path)
    with pytest.raises(IntegrityError, match="a3.h5 is not a readable result file"):
        results.read_outcome(path, "")
    with pytest.raises(IntegrityError, match="a3.h5 is not a readable result file"):
        results.write_ledger(tmp_path / "ledger.h5", {"r0001": {"a3": path}})
    assert not (tmp_path / "ledger.h5").exists()


def test_the_ledger_holds_every_item_of_every_arm(tmp_path, written):
    failed = tmp_path / "a1.h5"
    results.write_result(failed, attributes(arm="a1", status="failed"), {}, [], {})
    results.write_ledger(tmp_path / "ledger.h5", {"r0002": {"a3": written}, "r0001": {"a3": written, "a1": failed}})
    with h5py.File(tmp_path / "ledger.h5") as ledger, h5py.File(written) as source:
        assert {name: set(ledger[name]) for name in ledger} == {"r0001": {"a1", "a3"}, "r0002": {"a3"}}
        assert ledger["r0001/a1"].attrs["status"] == "failed"
        assert dict(ledger["r0002/a3"].attrs) == dict(source.attrs)
        for item_set in ITEMS:
            for name in results.ITEM_COLUMNS:
                assert list(ledger[f"r0002/a3/items/{item_set}/{name}"]) == list(source[f"items/{item_set}/{name}"])


def test_the_ledger_is_the_same_bytes_from_the_same_files(tmp_path, written):
    rounds = {"r0001": {"a0": written, "a3": written}, "r0002": {"a3": written}}
    backwards = {name: dict(reversed(arms.items())) for name, arms in reversed(rounds.items())}
    results.write_ledger(tmp_path / "one.h5", rounds)
    results.write_ledger(tmp_path / "two.h5", backwards)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_a_full_disk_leaves_the_earlier_result(tmp_path):
    code = """
from pipeline.campaign.errors import WorkFailed
from tests.execution.test_results import ITEMS, STEP, TEXTS, attributes
from pipeline.execution import results
results.write_result(disk / "a3.h5", attributes(attempt=0), ITEMS, [STEP], TEXTS)
fill()
try:
    results.write_result(disk / "a3.h5", attributes(attempt=1), ITEMS, [STEP] * 500, TEXTS)
except WorkFailed as error:
    print(error)
print(results.read_attributes(disk / "a3.h5")["attempt"], sorted(path.name for path in disk.iterdir()))
"""
    printed = run_on_small_disk(code, tmp_path / "disk")
    assert "a3.h5: No space left on device" in printed
    assert "0 ['a3.h5', 'ballast']" in printed
