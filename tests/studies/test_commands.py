"""`evidence simulate` and `evidence nulls` as one types them; numpy is not loaded by any other command."""

import json
import subprocess
import sys

import pytest

from pipeline.__main__ import main
from pipeline.stats.critical_values import read_critical_values
from studies import worlds
from tests.support.paths import ROOT


def test_a_report_for_programs(capsys):
    assert main(["evidence", "simulate", "--json", "--campaigns", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {*worlds.NULLS, *worlds.DESIGNED, *worlds.BEYOND_NULLS, *worlds.BEYOND}
    for rules in found.values():
        assert {"gap", "board", "rule", "leak"} <= set(rules)
        for numbers in rules.values():
            assert len(numbers["false_alarm_or_power_by_round"]) == 4
            assert numbers["n"] in (10, 20) and 0 <= numbers["se"] < 0.2


def test_a_report_for_people(capsys):
    assert main(["evidence", "simulate", "--campaigns", "20"]) == 0
    shown = capsys.readouterr()
    assert "three D-optimal ones" in shown.out and "next: python -m pipeline evidence simulate --regret" in shown.out
    assert "healthy: 20 campaigns" in shown.err


def test_regret(capsys):
    assert main(["evidence", "simulate", "--regret", "--json", "--campaigns", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {*worlds.NULLS, *worlds.DESIGNED}
    assert all(cost["regret"] >= 0 and cost["n"] == 20 for costs in found.values() for cost in costs.values())


def test_critical_values_of_one_design(tmp_path, capsys):
    text = "rounds=2,arms=3,families=2,dev_items=20,fresh_items=20,board_rows=0,submissions=0"
    assert main(["evidence", "nulls", "--campaigns", "50", "--out", str(tmp_path), "--design", text]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r2_a3_f2_d20_s20_b0_k0.json"]
    assert "gap_level" in capsys.readouterr().out
    assert json.loads((tmp_path / "r2_a3_f2_d20_s20_b0_k0.json").read_text())["campaigns_per_null"] == 50
    assert read_critical_values.__doc__


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "--campaigns", "0"], "says nothing"), (["nulls", "--design", "round=3"], "is no design"),
        (["nulls", "--design", "arms=2"], "out of range"), (["nulls", "--design", "rounds=x"], "is no design"),
        (["nulls", "--design", "submissions=9"], "out of range"), (["replay", "nothing.csv"], "cannot read"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence(words, said, capsys):
    assert main(["evidence", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_other_commands_start_without_numpy():
    code = "import sys, pipeline.__main__ as m; m.declared(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_campaigns_say_their_table_or_json_and_refuse_a_number_without_an_interval(capsys, monkeypatch):
    monkeypatch.setattr("studies.worlds.DESIGNED", {})
    monkeypatch.setattr("studies.worlds.NULLS", {"healthy": worlds.NULLS["healthy"]})
    assert main(["evidence", "campaigns", "--campaigns", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["world", "policy", "true"] and len(lines) == 1 + 5 + 3
    assert lines[-1].startswith("next: python -m pipeline evidence")
    assert main(["evidence", "campaigns", "--campaigns", "2", "--json"]) == 0
    assert [row["policy"] for row in json.loads(capsys.readouterr().out)][0] == "ours"
    assert main(["evidence", "campaigns", "--campaigns", "1"]) == 2
