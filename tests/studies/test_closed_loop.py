"""Test simulated campaigns that the real code decides: decisions follow from the log, and rows hold the campaigns' results."""

import json
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import t as student

from pipeline.campaign import canonical
from pipeline.decision import derive
from pipeline.stats.design import Design
from studies import closed_loop, worlds
from studies.closed_loop import OURS, POLICIES, Ours, campaign
from studies.simulated import World

SMALL = Design(dev_items=100, fresh_items=100, submissions=2)


@cache
def ours(world: str = "healthy") -> Ours:
    """One campaign of ours, kept with its records."""
    kept: list[Ours] = []

    class Kept(Ours):
        def __post_init__(self) -> None:
            super().__post_init__()
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_loop, "Ours", Kept)
        campaign({**worlds.NULLS, **worlds.DESIGNED}[world], replace(SMALL, rounds=4), OURS, 0)
    return kept[0]


def test_ours_is_what_the_real_code_derives_from_the_log_before_each_decision():
    player = ours()
    decided = [n for n, record in enumerate(player.records) if record["event"] == "decision"]
    assert len(decided) == 4
    for position in decided:
        record = player.records[position]
        again = derive.derive(json.loads(json.dumps(player.records[:position])), record["round"]).decision
        assert canonical.plain(asdict(again)) == record["decision"]
    assert player.decision is not None and player.final() == player.decision.winner


def test_submissions_are_those_of_the_design_and_the_references():
    events = [record for record in ours().records if record["event"] == "submission"]
    assert [record["number"] for record in events] == list(range(1, 2 + 2 * 4 + 1))
    assert [record["arm"] for record in events[:2]] == ["reference", "reference"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_campaign_is_the_same_again(policy):
    first = campaign(worlds.DESIGNED["G_rev"], SMALL, policy, 3)
    assert first == campaign(worlds.DESIGNED["G_rev"], SMALL, policy, 3)
    assert first.regret >= 0 and 0 <= first.kept <= SMALL.rounds


def test_the_reference_gains_nothing():
    result = campaign(World(), SMALL, "standing only", 1)
    assert result.gain == 0 and result.kept == 0 and result.regret > 0


def test_rows_hold_means_their_intervals_and_paired_differences():
    rows = list(closed_loop.measure({"healthy": World()}, SMALL, 4, lambda line: None))
    assert [row["policy"] for row in rows] == list(POLICIES)
    gains = [campaign(World(), SMALL, "max dev", n).gain for n in range(4)]
    row = next(row for row in rows if row["policy"] == "max dev")
    half = student.ppf(0.975, 3) * np.std(gains, ddof=1) / 2
    assert row["gain"] == {
        "mean": pytest.approx(np.mean(gains), abs=1e-3),
        "low": pytest.approx(np.mean(gains) - half, abs=2e-3),
        "high": pytest.approx(np.mean(gains) + half, abs=2e-3),
    }
    assert rows[0]["ours_minus_it"]["mean"] == 0
    assert row["ours_minus_it"]["mean"] == pytest.approx(rows[0]["gain"]["mean"] - row["gain"]["mean"], abs=2e-3)
    printed = closed_loop.table(rows)
    assert len(printed) == 6 and {len(line) for line in printed} == {6}


def test_ours_gains_more_than_greed_where_dev_is_learned():
    """Twenty campaigns, paired by their luck; docs/evidence.md has a hundred of each world."""
    found = {
        name: [campaign(worlds.DESIGNED["G_rev"], Design(), name, n).gain for n in range(20)]
        for name in (OURS, "max dev")
    }
    ahead = np.array(found[OURS]) - np.array(found["max dev"])
    assert ahead.mean() > 0.2
