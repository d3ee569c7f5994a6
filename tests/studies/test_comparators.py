"""Test four simple policies: what each keeps, and what each submits at the end."""

from dataclasses import replace

import pytest

from pipeline.campaign.records import Arm, Outcome, Policy
from pipeline.decision import evidence
from pipeline.decision.evidence import Evidence
from studies.comparators import COMPARATORS, first_by_dev, following, max_board, max_dev

RANK = ("recipe.lora.rank", "16")
FIRST = (
    Arm(0, "anchor", 1, replicate_of="reference"),
    *(Arm(n, "axis", n, (("recipe.clip_norm", f"0.{n}"),), axis="clip_norm") for n in (1, 2, 3)),
    Arm(4, "replicate", 5, replicate_of="reference"),
)
LATER = (
    *(replace(arm, overrides=(RANK, *arm.overrides)) if arm.role == "axis" else arm for arm in FIRST[:4]),
    Arm(4, "replicate", 5, (RANK,), replicate_of="standing"),
)


def run(arm: str, right: int, fresh: int = 10) -> Outcome:
    def marks(number: int) -> dict[str, dict[str, str]]:
        return {"roman": "1" * number + "0" * (20 - number)}

    return Outcome(arm, "axis", "completed", "completed", outcomes={"dev": marks(right), "fresh": marks(fresh)})


def seen(
    dev: dict[str, int], plan: tuple[Arm, ...] = FIRST, name: str = "r0001", board: dict | None = None
) -> Evidence:
    """A round with these dev scores; an arm that is not named has none, the reference has 10 of 20."""
    outcomes = [
        run(arm.name, dev[arm.name]) if arm.name in dev else Outcome(arm.name, arm.role, "failed", "diverged")
        for arm in plan
    ]
    found = evidence.of_one_round(name, run("reference", 10), outcomes, plan)
    return replace(found, board={name: board} if board else {})


def arms(plan: tuple[Arm, ...] = FIRST) -> dict[str, Arm]:
    return {arm.name: arm for arm in plan}


@pytest.mark.parametrize(
    ("dev", "kept"),
    [
        ({"a0": 20, "a1": 12, "a2": 15, "a3": 11, "a4": 19}, "a2"),  # only an axis can be kept
        ({"a0": 10, "a1": 12, "a2": 12, "a3": 11, "a4": 10}, "a1"),
        ({"a0": 10, "a1": 9, "a2": 10, "a3": 3, "a4": 10}, None),
        ({"a0": 10, "a3": 11}, "a3"),
        ({"a0": 10}, None),
    ],
)
def test_the_best_dev_score_is_kept_if_it_gains(dev, kept):
    assert max_dev(seen(dev), arms()) == kept


def test_later_rounds_gain_over_what_stands():
    dev = {"a0": 10, "a1": 14, "a2": 15, "a3": 13, "a4": 15}
    assert max_dev(seen(dev, LATER, "r0002"), arms(LATER)) is None
    assert max_dev(seen({**dev, "a2": 16}, LATER, "r0002"), arms(LATER)) == "a2"


def test_a_printed_record_is_kept_and_a_tie_with_the_record_is_not():
    dev = dict.fromkeys(arms(), 10)
    first = seen(dev, board={"reference-1": "0.72", "a1": "0.73", "a2": "0.74", "a0": "0.99"})
    assert max_board(first, arms()) == "a2"
    later = {"r0001": first.board["r0001"] | {"a0": "0.7"}}
    second = seen(dev, LATER, "r0002")
    assert max_board(replace(second, board={**later, "r0002": {"a3": "0.74"}}), arms(LATER)) is None
    assert max_board(replace(second, board={**later, "r0002": {"a3": "0.75", "a1": "0.75"}}), arms(LATER)) == "a1"
    assert max_board(second, arms(LATER)) is None


def test_random_search_and_standing_only_keep_nothing():
    found = seen(dict.fromkeys(arms(), 15) | {"a2": 20})
    for name in ("random search", "standing only"):
        assert COMPARATORS[name].choose(found, arms()) is None


def test_what_goes_out():
    rounds = [
        (seen({"a0": 10, "a1": 15, "a2": 14}, board={"a1": "0.73", "a2": "0.75", "reference-1": "0.9"}), arms()),
        (seen({"a0": 15, "a1": 13, "a2": 15}, LATER, "r0002", {"a1": "0.75", "a0": "0.7"}), arms(LATER)),
    ]
    assert COMPARATORS["max dev"].final(rounds) == COMPARATORS["random search"].final(rounds) == ("r0001", "a1")
    assert COMPARATORS["max board"].final(rounds) == ("r0001", "a2")  # a tie: the larger dev lift
    assert COMPARATORS["standing only"].final(rounds) is None
    nothing = [(seen({}), arms())]
    assert [each.final(nothing) for each in COMPARATORS.values()] == [None] * 4


def test_the_first_by_dev_are_submitted():
    found = seen({"a0": 10, "a1": 12, "a2": 15, "a4": 12})
    assert first_by_dev(found, arms(), 3) == ("a2", "a1", "a4")
    assert first_by_dev(found, arms(), 9) == ("a2", "a1", "a4", "a0")


def test_what_is_kept_joins_what_stands_and_nothing_else_changes():
    policy = Policy((RANK,), (), (("recipe.clip_norm", "9"),))
    after = following(policy, "a2", arms(LATER))
    assert after == replace(policy, standing=(RANK, ("recipe.clip_norm", "0.2")))
    assert following(policy, None, arms(LATER)) is policy
