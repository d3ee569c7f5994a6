"""Test that canaries fire as seldom as they should, by Student's t and by simulation."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import t

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.records import Outcome
from pipeline.stats import canaries
from pipeline.stats.alarms import round_counts
from pipeline.stats.counts import count


def test_the_quantiles_are_students_rounded_up():
    for degrees, quantile in enumerate(canaries.STUDENT, start=1):
        assert 0 <= float(quantile) - t.isf(0.005, degrees) < 1.1e-4


def test_one_more_repeat_fires_in_half_a_percent():
    draws = np.random.default_rng(8).integers(0, 10_000, (4000, 5)) + np.random.default_rng(9).normal(
        0, 900, (4000, 5)
    ).astype(int)
    gaussian = (np.random.default_rng(10).normal(5000, 800, draws.shape)).astype(int)
    fired = sum(
        canaries.fires("length", Fraction(int(row[0])), [Fraction(int(value)) for value in row[1:]]) for row in gaussian
    )
    assert 0.0025 < fired / len(gaussian) < 0.0085  # 0.5 % and three standard errors


def test_it_fires_upwards_alone_and_never_on_three_repeats():
    repeats = [Fraction(n, 100) for n in (10, 11, 12, 10, 11)]
    assert canaries.fires("truncation", Fraction(1, 2), repeats)
    assert not canaries.fires("truncation", Fraction(0), repeats)
    assert not canaries.fires("truncation", Fraction(1), repeats[:3])
    assert canaries.fires("truncation", Fraction(1), repeats[:4])


def test_equal_repeats_prove_nothing_where_items_alone_move_a_run():
    """The prediction interval is never narrower than the choice of items makes it."""
    equal, floor = [Fraction(1, 10)] * 4, Fraction(9, 10_000)  # p = 0.1 on 100 items
    reach = float(canaries.STUDENT[2]) * (float(floor) * 5 / 4) ** 0.5
    assert not canaries.fires("truncation", Fraction(1, 10) + Fraction(reach - 0.001), equal, floor)
    assert canaries.fires("truncation", Fraction(1, 10) + Fraction(reach + 0.001), equal, floor)


def test_an_unknown_canary_is_refused():
    repeats = [Fraction(0)] * 4
    with pytest.raises(ConfigError, match="'birdsong' is no canary"):
        canaries.fires("birdsong", Fraction(1), repeats)


def test_a_generator_that_drifts_is_seen_in_the_reference():
    rng = np.random.default_rng(1)

    def scored(accuracy: float):
        reference = "".join("1" if right else "0" for right in rng.random(300) < accuracy)
        return count([reference], reference)

    assert not canaries.generator_drifts(scored(0.4), [])  # nothing to compare the first round with
    assert not canaries.generator_drifts(scored(0.6), [scored(0.6)] * 2)
    assert canaries.generator_drifts(scored(0.6), [scored(0.4)])
    assert canaries.generator_drifts(scored(0.6), [scored(0.8), scored(0.7)])
    fired = sum(canaries.generator_drifts(scored(0.6), [scored(0.6), scored(0.6)]) for _ in range(2000))
    assert fired <= 14  # 0.27 %, and three standard errors


def test_each_canary_of_a_look_fires_alone() -> None:
    """The mean arm is held against the repeats; arms like them fire nothing, and each single departure fires its own canary."""

    def run(arm: str, roman: str, gravity: str) -> Outcome:
        marks = {"roman": roman * 10, "gravity": gravity * 10}
        return Outcome(arm, "axis", "completed", "completed", outcomes={"dev": marks, "fresh": marks})

    reference = run("reference", "11110", "11110")
    repeats = [
        (run(f"a{k}", roman, "11110"), reference) for k, roman in enumerate(("11110", "1111T", "11100", "11110"))
    ]
    same = round_counts(reference, [run("a1", "11110", "11110")], {}, Decimal(0))
    alike, cut, lagging = run("a1", "11110", "11110"), run("a1", "1111T", "1111T"), run("a1", "00000", "11111")
    assert canaries.fired("roman", [alike], repeats, [same, same], reference) == ()
    assert canaries.fired("gravity", [cut], repeats, [same, same], reference) == ("truncation",)
    assert canaries.fired("roman", [lagging], repeats, [same, same], reference) == ("worst_family",)
    assert canaries.fired("roman", [lagging], repeats[:3], [same, same], reference) == ()
    assert canaries.fired("roman", [], repeats, [same, same], reference) == ()
    drifted = replace(same, fresh={family: replace(counts, marks=2**10 - 1) for family, counts in same.fresh.items()})
    assert canaries.fired("roman", [alike], repeats, [same, drifted], reference) == ("generator_drift",)
    assert canaries.fired("roman", [alike], repeats, [drifted], reference) == ()
