"""Test the commands behind `python -m pipeline evidence`, and that no other command loads numpy."""

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest

from pipeline.__main__ import main as pipeline_main
from pipeline.cli import evidence
from pipeline.stats import critical_values
from pipeline.stats.design import Design
from studies import replay, worlds
from studies.__main__ import main, parser
from studies.claims import claim_table
from studies.narrow_dev import sliced
from tests.support.paths import ROOT


@pytest.fixture
def few_claims(monkeypatch):
    """Claims are simulated in one null world of one design, and one effect is planted."""
    for name, value in (("NULLS", {"sd .01": claim_table.NULLS["sd .01"]}), ("CRASHES", {}), ("HEALTHY", {}), ("TRUNCATED", {}), ("unequal", dict),
                        ("DESIGNS", {"3 x 100": claim_table.DESIGNS["3 x 100"]}), ("PLANTED_SD", {"3 x 100": (0.01,)}),
                        ("EFFECTS", (0.05,)), ("RUINOUS", (-0.3,))):  # fmt: skip
        monkeypatch.setattr(claim_table, name, value)


def test_a_report_for_programs(few_claims, capsys):
    assert main(["simulate", "--json", "--campaigns", "20"]) == 0
    report = json.loads(capsys.readouterr().out)
    found, claims = report["alarms"], report["claims"]
    assert set(report) == {"alarms", "claims"} and set(claims) == {"levels", "power", "ruinous"}
    said = [(level["confirmation"], level["rounds"]) for level in claims["levels"]]
    assert said == [("running", 4), ("doubled", 4), ("final_round", 4), ("running", 8)]
    assert all(
        level["campaigns"] == 50 and set(level["upper"]) == set(claim_table.LIMITS) for level in claims["levels"]
    )
    assert set(found) == {
        *worlds.NULLS,
        *worlds.DESIGNED,
        *worlds.UNEQUAL,
        *worlds.BEYOND_NULLS,
        *worlds.BEYOND,
        *sliced.SLICES,
    }
    for rules in found.values():
        assert {"gap", "board", "rule", "leak"} <= set(rules)
        named = rules["board"]["names_weakest"]
        assert named is None or 0 <= named <= 1
        for numbers in rules.values():
            assert len(numbers["false_alarm_or_power_by_round"]) == 4
            assert numbers["n"] in (10, 20) and 0 <= numbers["se"] < 0.2


def test_a_report_for_people(few_claims, capsys):
    assert main(["simulate", "--campaigns", "20", "--real", "1"]) == 0
    shown = capsys.readouterr()
    assert "three D-optimal ones" in shown.out
    assert "set aside has no error rate" in shown.out and "is kept and an improvement is claimed" in shown.out
    assert "of 1 null campaigns" in shown.out and "the twin disagreed in 0" in shown.out
    assert "next: python -m pipeline evidence campaigns --campaigns 100" in shown.out
    assert "healthy: 20 campaigns" in shown.err


def test_critical_values_of_one_design(tmp_path, capsys, monkeypatch):
    text = "rounds=2,arms=3,families=2,dev_items=20,fresh_items=20,board_rows=0,submissions=0"
    assert main(["nulls", "--campaigns", "50", "--out", str(tmp_path), "--design", text]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r2_a3_f2_d20_s20_b0_k0.json"]
    assert "gap_level" in capsys.readouterr().out
    assert not list(critical_values.HERE.glob("r2_*"))
    assert main(["nulls", "--campaigns", "50", "--design", text]) == 0
    assert "nothing was written; --write keeps them" in capsys.readouterr().out
    monkeypatch.setattr(critical_values, "HERE", tmp_path / "where init looks")
    monkeypatch.setattr("studies.__main__.LEAST_TO_WRITE", 50)
    assert main(["nulls", "--campaigns", "50", "--write", "--design", text]) == 0
    assert "frozen from now on take these values" in capsys.readouterr().out
    assert [path.name for path in critical_values.HERE.iterdir()] == ["r2_a3_f2_d20_s20_b0_k0.json"]
    assert json.loads((tmp_path / "r2_a3_f2_d20_s20_b0_k0.json").read_text())["campaigns_per_null"] == 50


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "--campaigns", "0"], "says nothing"), (["e-values", "--campaigns", "0"], "says nothing"),
        (["nulls", "--design", "round=3"], "is no design"), (["e-values", "--design", "arms=2"], "out of range"),
        (["nulls", "--design", "arms=2"], "out of range"), (["nulls", "--design", "rounds=x"], "is no design"),
        (["nulls", "--design", "rounds=9"], "At most 8 rounds"), (["nulls", "--campaigns", "19"], "says nothing"),
        (["nulls", "--campaigns", "999", "--write"], "makes no critical values to freeze. Valid: 1000 or more"),
        (["nulls", "--design", "submissions=9"], "out of range"), (["replay", "nothing.csv"], "cannot read"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_other_commands_start_without_numpy():
    code = "import sys, pipeline.__main__ as m; m.declared(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_campaigns_say_their_table_or_json_and_refuse_a_number_without_an_interval(capsys, monkeypatch):
    monkeypatch.setattr("studies.worlds.DESIGNED", {})
    monkeypatch.setattr("studies.worlds.NULLS", {"healthy": worlds.NULLS["healthy"]})
    assert main(["campaigns", "--campaigns", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["world", "policy", "true"] and len(lines) == 1 + 5 + 3
    assert lines[-1].startswith("next: python -m pipeline evidence")
    assert main(["campaigns", "--campaigns", "2", "--json"]) == 0
    assert [row["policy"] for row in json.loads(capsys.readouterr().out)][0] == "ours"
    assert main(["campaigns", "--campaigns", "1"]) == 2


def test_the_published_campaign(capsys):
    assert main(["replay", str(replay.EXAMPLE), "--json"]) == 0
    rounds = {line["round"]: line for line in json.loads(capsys.readouterr().out)["rounds"]}
    assert [rounds[number]["verdict"] for number in "123"] == ["none", "none", "alarm"]
    assert {line["family"] for line in rounds.values()} == {"not identifiable"}
    assert rounds["4"]["beats_the_round_before"] == "not supported"
    assert float(rounds["4"]["z"]) == pytest.approx(0.43, abs=0.01)
    assert 0.002 < float(rounds["3"]["p_value"]) < 0.02


def test_a_person_is_told_what_to_type_next(capsys):
    assert main(["replay", str(replay.EXAMPLE), "--board-rows", "500"]) == 0
    shown = capsys.readouterr().out
    assert (
        "500 board rows" in shown and "next, with another number of rows: python -m pipeline evidence replay" in shown
    )


def test_the_pipeline_passes_words_and_exit_code_on(capfd):
    assert pipeline_main(["evidence", "replay", "nothing.csv"]) == 2
    assert capfd.readouterr().err.startswith("NotFound: cannot read nothing.csv")
    assert pipeline_main(["evidence", "replay", "--help"]) == 0
    assert "usage: python -m pipeline evidence replay" in capfd.readouterr().out


def test_the_pipeline_lists_every_act():
    acts = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(evidence.STUDIES) == set(acts.choices)


def test_e_values_say_their_table_or_json(capsys, monkeypatch):
    monkeypatch.setattr("studies.worlds.NULLS", {"het": worlds.NULLS["het"]})
    assert main(["e-values", "--campaigns", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["world", "het", "X_flat", "G_flat"] and lines[4].startswith(
        "het, one target"
    )
    assert lines[-1] == "next: python -m pipeline evidence combine BUNDLE BUNDLE"
    design = "arms=3,families=2,dev_items=20,fresh_items=20,board_rows=60,submissions=2"
    assert main(["e-values", "--campaigns", "20", "--json", "--design", design]) == 0
    found = json.loads(capsys.readouterr().out)
    assert float(found["divisor"]) >= 1 and max(found["worlds"]["het"]["mean_by_round"]) <= 1
    for row in found["worlds"].values():
        assert len(row["mean_by_round"]) == len(row["se_by_round"]) == 4
        assert list(row["together"]) == ["1", "2", "5", "10"]
        assert all(each["product"] <= each["product_upper_95"] for each in row["together"].values())


def test_what_combine_divides_e_by_is_written_beside_what_is_there(tmp_path, monkeypatch):
    small = Design(rounds=2, arms=3, families=2, dev_items=20, fresh_items=20, board_rows=60, submissions=2)
    other = dataclasses.replace(small, arms=4)
    monkeypatch.setattr(critical_values, "HERE", tmp_path)
    monkeypatch.setattr(critical_values, "GRID", (small, dataclasses.replace(small, board_rows=0, submissions=0)))
    text = ",".join(f"{name}={value}" for name, value in other.to_json().items())
    assert main(["e-values", "--write", "--campaigns", "40", "--design", text]) == 0
    assert main(["e-values", "--write", "--campaigns", "40"]) == 0
    written = json.loads((tmp_path / critical_values.E_VALUES).read_text())["designs"]
    assert set(written) == {critical_values.file_name(design) for design in (small, other)}
    for design in (small, other):
        largest = max(map(float, written[critical_values.file_name(design)]["largest_mean"].values()))
        by = critical_values.e_divisor(design, tmp_path)
        assert max(1, largest) - 0.0001 <= by <= max(1, largest) + 0.0011
