"""Test `export --as csv`: every row follows from the log, open rounds and secrets stay inside, and the campaign stays as it was."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.layout import Campaign
from pipeline.decision.history import read_history
from pipeline.exports import reading, tables
from tests.support import told
from tests.support.campaigns import NUM_ITEMS, publish, tree
from tests.support.decided import decided_campaign, with_open_round
from tests.support.sealed import played


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Round 1 is decided (a1 failed, a6 never came), and round 2 is open with a score of one arm. No test changes it for good."""
    return with_open_round(decided_campaign(tmp_path_factory.mktemp("tables")))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def exported(campaign: Campaign, target: Path, *words: str) -> dict[str, list[dict[str, str]]]:
    assert main(["export", str(campaign.folder), "--to", str(target), "--as", "csv", *words]) == 0
    return {name: rows_of(target / "csv" / f"{name}.csv") for name in ("items", "arms", "decisions")}


def test_every_item_outcome_is_a_row_that_the_log_confirms(campaign, tmp_path):
    found = exported(campaign, tmp_path / "out")
    outcomes = read_history(reading.read_campaign(campaign).records).outcomes
    arms = [arm for (name, arm), outcome in outcomes.items() if name == "r0001" and outcome.status == "completed"]
    for arm in arms:
        for item_set, families in outcomes["r0001", arm].outcomes.items():
            at = ("r0000", "a0") if (arm, item_set) == ("reference", "dev") else ("r0001", arm)
            rows = [row for row in found["items"] if (row["round"], row["arm"], row["set"]) == (*at, item_set)]
            marks = "".join("T" if r["truncated"] == "true" else "1" if r["correct"] == "true" else "0" for r in rows)
            assert marks == "".join(families.values())
            assert [row["item_id"] for row in rows] == [f"roman-{n:06d}" for n in range(NUM_ITEMS)]
            assert {row["num_tokens"] for row in rows} == {"9"}
    # Six arms on two sets, the reference on fresh items, and on dev items once, in r0000.
    assert len(arms) == 7 and len(found["items"]) == (6 * 2 + 2) * NUM_ITEMS
    best = [row for row in found["items"] if row["arm"] == "a2"]
    assert {(row["moved_key"], row["moved_value"]) for row in best} == {("recipe.lora.rank", "8")}


def test_the_reference_s_answers_to_new_dev_items_are_rows_of_the_round_in_which_they_begin(tmp_path):
    """Without them, dev rows of later rounds would be compared with the reference's answers to other puzzles."""
    reversed_ = Campaign.at(told.reversal(tmp_path / "reversal", rounds=4, num_items=300))
    for file in reversed_.folder.rglob("*.h5"):
        file.unlink()  # they hold no results here; the log has all outcomes
    history = read_history(reading.read_campaign(reversed_).records)
    replaced = {
        (first, family)
        for name, plan in history.plans.items()
        for family, first in plan.policy.repaired
        if first == name
    }
    assert len(replaced) > 1
    marks: dict[tuple[str, str], str] = {}
    for row in exported(reversed_, tmp_path / "out")["items"]:
        if row["arm"] == "reference" and row["set"] == "dev":
            mark = "T" if row["truncated"] == "true" else "1" if row["correct"] == "true" else "0"
            at = (row["round"], row["family"])
            marks[at] = marks.get(at, "") + mark
    assert marks == {
        (first, family): history.outcomes[first, "reference"].outcomes["dev"][family] for first, family in replaced
    }


def test_a_finalist_has_its_board_score(campaign):
    read = reading.read_campaign(campaign)
    sent = {"round": "r0001", "arm": "a2", "adapter_digest": "", "target": "local", "day": "2026-11-24"}
    board = [
        {"event": "submission", "number": 1, "purpose": "finalist", **sent},
        {"event": "board_score", "number": 1, "score": "0.61"},
    ]
    read = replace(read, records=[*read.records, *board])
    assert tables.board_score(read, "r0001", "a2") == 0.61 and tables.board_score(read, "r0001", "a3") is None


def test_an_arm_has_its_outcome_lift_and_what_was_decided_of_it(campaign, tmp_path):
    arms = {(row["round"], row["arm"]): row for row in exported(campaign, tmp_path / "out")["arms"]}
    best, failed, absent = (arms["r0001", name] for name in ("a2", "a1", "a6"))
    assert (best["dev_right"], best["fresh_accuracy"], best["fresh_lift"], best["kept"]) == (
        "38",
        "0.95",
        "0.45",
        "true",
    )
    assert float(best["fresh_lift_low"]) < 0.45 < float(best["fresh_lift_high"])
    assert "a2's recipe.lora.rank=8 joins the standing recipe" in best["decision_says"]
    assert (failed["status"], failed["exit_class"], failed["fresh_accuracy"], failed["kept"]) == (
        "failed",
        "diverged",
        "",
        "false",
    )
    assert (absent["status"], absent["exit_class"]) == ("absent", "never_started")
    assert [name for name, row in arms.items() if row["kept"] == "true"] == [("r0001", "a2")]


def test_a_round_that_is_not_closed_stays_inside_and_so_do_prompts_answers_and_secrets(campaign, tmp_path, capsys):
    found = exported(campaign, tmp_path / "out")
    assert "left out, because they are not decided and closed: r0002" in capsys.readouterr().out
    assert {row["round"] for table in found.values() for row in table} == {"r0000", "r0001"}
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    seeds = json.loads(campaign.seeds.read_text())
    for secret in (
        b"XIV",
        b"PRIVATE KEY",
        *(seed.encode() for seed in seeds.values()),
    ):  # XIV is the answer of every item
        assert secret not in written
    assert exported(campaign, tmp_path / "none", "--round", "r0002")["items"] == []


def test_an_export_changes_no_byte_of_the_campaign_and_gives_the_same_bytes_again(campaign, tmp_path):
    before = tree(campaign.folder)
    exported(campaign, tmp_path / "out")
    first = tree(tmp_path / "out")
    exported(campaign, tmp_path / "out")
    assert tree(tmp_path / "out") == first
    assert tree(campaign.folder) == before


def test_the_readme_and_the_json_name_the_log_head(campaign, tmp_path, capsys):
    assert main(["export", str(campaign.folder), "--to", str(tmp_path / "out"), "--as", "csv", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["forms"]["csv"]
    assert made["log_head"] == str(reading.read_campaign(campaign).anchor)
    assert (made["rounds"], made["left_out"]) == (["r0000", "r0001"], ["r0002"])
    assert [file["path"] for file in made["files"]] == ["csv/items.csv", "csv/arms.csv", "csv/decisions.csv"]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert made["log_head"] in readme and "no source of truth" in readme


def test_a_result_file_that_the_log_does_not_name_is_refused_and_the_earlier_export_stays(campaign, tmp_path, capsys):
    exported(campaign, tmp_path / "out")
    before = tree(tmp_path / "out")
    published = campaign.round("r0001").published("a3")
    true = published.read_bytes()
    publish(campaign.round("r0001"), "a3", 39)
    code = main(["export", str(campaign.folder), "--to", str(tmp_path / "out"), "--as", "csv"])
    published.write_bytes(true)
    assert code == IntegrityError.exit_code
    assert "a3.h5 is not a file that the log names" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before


def test_an_arm_that_was_started_again_has_the_outcome_that_the_log_names(campaign, tmp_path):
    folder = Campaign.at(shutil.copytree(campaign.folder, tmp_path / "smoke")).round("r0001")
    before = exported(folder.campaign, tmp_path / "out")
    (folder.folder / "a3" / "attempt_00").mkdir(parents=True)
    shutil.copy(folder.published("a3"), folder.folder / "a3" / "attempt_00" / "result.h5")
    publish(folder, "a3", 39)  # a later attempt's, which no meta stage has seen yet
    assert exported(folder.campaign, tmp_path / "out") == before


def test_the_vault_is_not_needed(campaign, tmp_path):
    copy = Campaign.at(shutil.copytree(campaign.folder, tmp_path / "smoke", ignore=shutil.ignore_patterns("vault")))
    assert exported(copy, tmp_path / "copy") == exported(campaign, tmp_path / "whole")


def test_a_copy_without_hdf5_files_gives_the_outcomes_of_the_log(tmp_path):
    folder = played(2).write(tmp_path / "sealed")
    for path in folder.rglob("*.h5"):
        path.unlink()
    read = reading.read_campaign(Campaign.at(folder))
    items, arms, decisions = tables.of_campaign(read)
    rows = list(items.rows())
    assert read.decided == ("r0001", "r0002") and {row["item_id"] for row in rows} == {None}
    for row in arms.rows():
        mine = [
            each for each in rows if (each["round"], each["arm"], each["set"]) == (row["round"], row["arm"], "fresh")
        ]
        assert sum(each["correct"] for each in mine) == (row["fresh_right"] or 0)
        assert len(mine) == (row["fresh_items"] or 0)
    assert [row["round"] for row in decisions.rows()] == ["r0001", "r0002"]
    reference = read.history.outcomes["r0001", "reference"]
    dev = [row["correct"] for row in rows if (row["round"], row["arm"], row["set"]) == ("r0000", "a0", "dev")]
    assert dev == [mark == "1" for _, marks in sorted(reference.outcomes["dev"].items()) for mark in marks]
    gpu = {row["arm"]: row["gpu_seconds"] for row in arms.rows() if row["round"] == "r0001"}
    assert gpu == dict.fromkeys(gpu, 100)


@pytest.mark.parametrize(
    ("name", "says"),
    [("inside", "is inside the campaign"), ("other", "has files and is no export"), ("file", "is a file")],
)
def test_a_folder_that_is_not_for_this_export_is_refused(campaign, tmp_path, capsys, name, says):
    target = {"inside": campaign.folder / "out", "other": tmp_path / "other", "file": tmp_path / "file"}[name]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    assert main(["export", str(campaign.folder), "--to", str(target), "--as", "csv"]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine" and not (campaign.folder / "out").exists()


def test_a_form_that_does_not_exist_is_named_with_those_that_do(campaign, tmp_path, capsys):
    assert main(["export", str(campaign.folder), "--to", str(tmp_path / "out"), "--as", "excel"]) == 2
    assert (
        "--as excel is no form of an export. Valid: csv, parquet, tensorboard, mlflow, wandb" in capsys.readouterr().err
    )
