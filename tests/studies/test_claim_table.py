"""Test the tables of claims: levels near what is stated, power that grows with the effect, and the real code beside the twin."""

from dataclasses import asdict

import numpy as np
import pytest

from studies.alarm_table import upper_95
from studies.claims import claim_check, claim_table
from studies.claims.claim_check import NullNature
from studies.claims.claim_worlds import CRASHES, DESIGNS, NULLS, ClaimWorld
from studies.closed_loop import start

SMALL = "3 x 100"


@pytest.mark.parametrize("confirmation", ["running", "doubled", "final_round"])
def test_false_claims_are_as_rare_as_stated(confirmation):
    world = {"sd .03": NULLS["sd .03"]}
    level = next(claim_table.levels(world, [SMALL], confirmation, 4, 4000))
    assert 0.02 < level.claimed < 0.045  # .032, and four standard errors
    assert level.worse < 0.02 and level.suspect < 0.002 and 0.3 < level.set_aside < 0.7
    assert level.upper["claimed"] == round(upper_95(round(4000 * level.claimed), 4000), 4)
    assert level.beyond == ()


def test_a_level_beyond_its_limit_is_said():
    level = next(claim_table.levels(CRASHES, [SMALL], "running", 4, 500))
    assert level.beyond == ("worse",) and level.worse > 0.2
    lines = claim_table.level_lines({"levels": [asdict(level)]})
    assert lines[1][-1] == "BEYOND worse" and len(lines[0]) == len(lines[1])


def test_campaigns_that_are_too_few_to_tell_are_called_so_and_not_beyond():
    (level,) = claim_table.levels({"sd .01": NULLS["sd .01"]}, [SMALL], "running", 4, 50)
    assert level.suspect == 0 and level.upper["suspect"] > claim_table.LIMITS["suspect"] and level.beyond == ()
    assert claim_table.level_lines({"levels": [asdict(level)]})[1][-1] == "too few for claimed, worse, suspect"
    assert [claim_table.is_enough(n, "suspect") for n in (298, 299)] == [False, True]


def test_power_grows_with_the_effect_and_with_the_runs_that_confirm(monkeypatch):
    monkeypatch.setattr(claim_table, "PLANTED_SD", {SMALL: (0.01,)})
    found = {name: list(claim_table.powers(name, 1500)) for name in ("running", "doubled", "final_round")}
    for rows in found.values():
        assert [row.by_round_4 for row in rows] == sorted(row.by_round_4 for row in rows)
        assert all(row.by_round_3 <= row.by_round_4 <= row.kept for row in rows)
    assert found["running"][2].by_round_4 > 0.7
    assert found["doubled"][1].by_round_4 > found["running"][1].by_round_4 + 0.05
    assert all(row.by_round_3 == 0 for row in found["final_round"])
    assert len(claim_table.power_lines({"power": [asdict(row) for row in found["running"]]})) == 4


def test_a_ruinous_arm_is_shown_to_be_worse_where_noise_is_small(monkeypatch):
    monkeypatch.setattr(claim_table, "RUINOUS", (-0.2,))
    quiet, loud = (row for row in claim_table.ruinous(500) if row["design"] == "6 x 300")
    assert quiet["round_3"] > quiet["round_1"] > loud["round_1"] + 0.2 and quiet["round_3"] > 0.9


def test_the_real_code_and_the_twin_say_the_same_of_real_campaigns():
    # A single noisy axis and few items: something is said in a few of the campaigns.
    design = DESIGNS[SMALL]
    size = type(design)(**{**design.to_json(), "board_rows": 0, "submissions": 0})
    said = [claim_check.campaign(ClaimWorld(seed_sd=0.04), size, "running", number) for number in range(3)]
    assert all(each.agrees for each in said) and not any(each.suspect for each in said)
    assert claim_check.campaign(ClaimWorld(seed_sd=0.04), size, "running", 0) == said[0]


def test_the_binomial_test_is_over_all_worlds(monkeypatch):
    monkeypatch.setattr(claim_table, "NULLS", {"sd .01": NULLS["sd .01"]})
    said = iter([True] * 4 + [False] * 96)
    monkeypatch.setattr(
        claim_check, "campaign", lambda *_: claim_check.Said(next(said), False, False, False, agrees=True)
    )
    levels = list(claim_table.levels({"sd .01": NULLS["sd .01"]}, [SMALL], "running", 4, 1000))
    found = claim_table.real(levels, 100, lambda _: None)
    assert found["claimed"] == 4 and found["campaigns"] == 100 and found["twin_disagrees"] == 0
    assert found["p_value"] > 0.05


def test_a_world_reaches_the_real_code_as_it_is():
    truth = ClaimWorld(seed_sd=0.0, reference_luck=-0.07, truncated=0.5, fresh_easier=1.0)
    size = DESIGNS[SMALL]
    nature = NullNature(
        truth, type(size)(**{**size.to_json(), "fresh_items": 4000, "dev_items": 4000}), 0, start().families[:3]
    )
    arms = claim_check.plan.make_arms(start().policy, 1, 0, 1, start().reference)
    played = nature.play(1, arms)
    text = {f: run.outcomes for f, run in (("arm", played.outcomes[0]), ("reference", played.reference))}
    families = start().families[:3]
    dev = [text["reference"]["dev"][family].count("1") / 4000 for family in families]
    assert dev == pytest.approx([0.88, 0.73, 0.23], abs=0.02)
    fresh = [text["arm"]["fresh"][family].count("1") / 4000 for family in families]
    assert fresh == pytest.approx([0.996, 0.967, 0.683], abs=0.02)
    marks = "".join(text["arm"]["dev"].values())
    assert marks.count("T") / (marks.count("T") + marks.count("0")) == pytest.approx(0.5, abs=0.03)
    assert np.isclose(len(marks), 12_000)
