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


def test_it_fires_upwards_alone_and_never_on_one_repeat():
    repeats = [Fraction(n, 100) for n in (10, 11, 12, 10, 11)]
    assert canaries.fires("truncation", Fraction(1, 2), repeats)
    assert not canaries.fires("truncation", Fraction(0), repeats)
    assert not canaries.fires("truncation", Fraction(1), repeats[:1])
    assert canaries.fires("truncation", Fraction(2), [Fraction(1)] * 3)  # repeats without any spread
    with pytest.raises(ConfigError, match="'birdsong' is no canary"):
        canaries.fires("birdsong", Fraction(1), repeats)


def test_a_generator_that_drifts_is_seen_in_the_reference():
    rng = np.random.default_rng(1)

    def scored(accuracy: float):
        reference = "".join("1" if right else "0" for right in rng.random(300) < accuracy)
        return count([reference], reference)

    assert not canaries.generator_drifts(scored(0.6), scored(0.6))
    assert canaries.generator_drifts(scored(0.6), scored(0.4))
    assert canaries.generator_drifts(scored(0.6), scored(0.8))
    fired = sum(canaries.generator_drifts(scored(0.6), scored(0.6)) for _ in range(2000))
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
    assert canaries.fired("roman", [alike], reference, repeats, same) == ()
    assert canaries.fired("gravity", [cut], reference, repeats, same) == ("truncation",)
    assert canaries.fired("roman", [lagging], reference, repeats, same) == ("worst_family",)
    assert canaries.fired("roman", [], reference, repeats, same) == ()
    drifted = replace(same, fresh={family: replace(counts, marks=2**10 - 1) for family, counts in same.fresh.items()})
    assert canaries.fired("roman", [alike], reference, repeats, drifted) == ("generator_drift",)
