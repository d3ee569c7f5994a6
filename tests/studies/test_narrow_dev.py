"""Test the studies of narrow dev: the mixture of items is what the slice says, and the tables say what the campaigns' logs and marks say."""

import json

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from pipeline.campaign.log import Log
from pipeline.stats.design import Design
from studies.narrow_dev import campaigns, sliced
from tests.support.decided import decided_campaign

DESIGN = Design(rounds=2, arms=8, families=3, dev_items=400, fresh_items=400, board_rows=300, submissions=2)


@pytest.mark.parametrize("probits", [-1.0, 0.6])
def test_half_of_the_fresh_items_lie_outside_and_are_that_much_easier(probits):
    seen = next(sliced.batches(sliced.Slice(probits), DESIGN, (1,), 50))[0]
    levels = np.array([float(level) for level in DESIGN.accuracies])
    halves = seen.fresh.marks[:, :, :200].mean((0, 2)), seen.fresh.marks[:, :, 200:].mean((0, 2))
    inside, outside = seen.dev.marks.mean((0, 2)), ndtr(ndtri(levels) + probits)
    assert np.abs(inside - levels).max() < 0.02 and np.abs(halves[0] - levels).max() < 0.02
    assert np.abs(halves[1] - outside).max() < 0.02


def test_effects_outside_go_their_own_way_only_where_the_slice_says_so():
    def differences(world):
        seen = next(sliced.batches(world, DESIGN, (2,), 50))[0]
        inside, outside = seen.fresh.answers[..., :200].mean(-1), seen.fresh.answers[..., 200:].mean(-1)
        return (inside - outside).var()

    assert differences(sliced.Slice(slope_sd=4.0)) > 1.5 * differences(sliced.Slice())


def test_a_difference_has_the_standard_error_of_paired_items():
    one, other = "1" * 30 + "0" * 10 + "1" * 60, "1" * 40 + "0" * 60
    pairs = np.array([int(a) - int(b) for a, b in zip(one, other, strict=True)])
    assert campaigns._difference(one, other) == f"{100 * pairs.mean():+.1f} ± {196 * pairs.std() / 10:.1f}"
    assert campaigns._difference(one, one) == "+0.0 ± 0.0"


def test_the_tables_say_what_logs_and_marks_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(campaigns, "ROUNDS", 1)
    runs = tmp_path / "runs"
    runs.mkdir()
    for kind, right in (("reversal", 70), ("reversal_greedy", 60)):
        for seed in (1, 2):
            parent = tmp_path / f"{kind}_{seed}"
            parent.mkdir()
            decided_campaign(parent).folder.rename(runs / parent.name)
            more = seed if kind == "reversal" else 0
            marks = {"right": "1" * (right + more) + "0" * (100 - right - more), "reference": "1" * 100}
            (runs / f"{parent.name}.json").write_text(json.dumps({"seconds": 90.0, **marks}))
    assert campaigns.main([str(runs), "--table"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line]
    assert len([row for row in rows if row[0] in campaigns.KINDS]) == 4
    row = next(row for row in rows if row[:2] == ["reversal", "1"])
    name, arm = campaigns.winner(campaigns.read_history(Log(runs / "reversal_1/log.jsonl").records()))
    assert row[4].startswith(f"{arm} of {name}: ") and row[-1] == "1.5"
    assert row[6].startswith("71.0 ±") and row[7].startswith("-29.0 ±")
    assert rows[-1] == ["mean", "+11.5, standard error 0.5 over 2 seeds"]
