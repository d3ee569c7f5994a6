"""Four simple policies that the decision is compared with, each a pure function of the same evidence.

    random search    keeps no axis, and sends out the arm with the best dev score of the campaign
    max dev          keeps the axis with the best dev score of each round if it gains, and sends out the best dev score of the campaign
    max board        keeps the axis with the best printed score of each round if it is a record, and sends out the best printed score; it
                     submits the arms with the best dev scores of each round
    standing only    keeps no axis, and sends out the reference's adapter

A comparator sees what the decision sees (records.Evidence and the plan's arms) and says which arm is kept. It knows no noise, no dead ends
and no family states. Of these, only max dev may decide a real campaign, if a person froze policy.choice=max_dev.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import islice

from pipeline.campaign.records import Arm, Policy, with_setting
from pipeline.decision import promotion
from pipeline.decision.evidence import Evidence

Arms = Mapping[str, Arm]
SeenRound = tuple[Evidence, Arms]
Choose = Callable[[Evidence, Arms], str | None]
Final = Callable[[Sequence[SeenRound]], tuple[str, str] | None]


@dataclass(frozen=True)
class Comparator:
    """`choose` names the arm whose axis joins the standing recipe. `final` names the (round, arm) that goes out, None for the reference's own
    adapter. `submits` says whether the board scores arms for it."""

    choose: Choose
    final: Final
    submits: bool = False


def keep_nothing(evidence: Evidence, arms: Arms) -> str | None:
    """No axis ever joins the standing recipe."""
    return None


def max_dev(evidence: Evidence, arms: Arms) -> str | None:
    """The axis arm of largest dev lift over the recipe that it moved from; None where none gains. Ties go to the lower arm."""
    return next(iter(promotion.ahead_on_dev(evidence, arms)), None)


def max_board(evidence: Evidence, arms: Arms) -> str | None:
    """The axis arm of largest printed score, if it is the campaign's record (the reference's scores included). Ties go to the lower arm."""
    printed = {name: Decimal(score) for name, score in evidence.board.get(evidence.round, {}).items()}
    earlier = [
        Decimal(score)
        for name, scores in evidence.board.items()
        for arm, score in scores.items()
        if name != evidence.round or arm not in arms
    ]
    mine = [(printed[name], -arm.index, name) for name, arm in arms.items() if arm.role == "axis" and name in printed]
    if not mine or max(mine)[0] <= max(earlier, default=Decimal(0)):
        return None
    return max(mine)[2]


def best_dev_of_all(rounds: Sequence[SeenRound]) -> tuple[str, str] | None:
    """The largest dev lift over the reference of the whole campaign; ties go to the earlier round and the lower arm."""
    found = [
        (mean, -number, evidence.round, name)
        for number, (evidence, arms) in enumerate(rounds)
        for name, mean in islice(promotion.by_dev(evidence, arms, "reference").items(), 1)
    ]
    return max(found)[2:] if found else None


def best_board_of_all(rounds: Sequence[SeenRound]) -> tuple[str, str] | None:
    """The largest printed score of an arm; ties go to the larger dev lift, then to the earlier round and the lower arm."""
    found = []
    for number, (evidence, arms) in enumerate(rounds):
        for name, score in evidence.board.get(evidence.round, {}).items():
            if name in arms:
                lift = evidence.lift(name, "reference", "dev")
                key = (Decimal(score), lift.mean if lift else Fraction(0), -number, -arms[name].index)
                found.append((key, (evidence.round, name)))
    return max(found)[1] if found else None


def first_by_dev(evidence: Evidence, arms: Arms, num: int) -> tuple[str, ...]:
    """Return the arms to submit: the `num` with the largest dev lift over the reference."""
    return tuple(islice(promotion.by_dev(evidence, sorted(arms), "reference"), num))


def following(policy: Policy, kept: str | None, arms: Arms) -> Policy:
    """Return the next round's policy: the kept arm's axis joins the standing recipe, and nothing else changes."""
    if kept is None:
        return policy
    return replace(policy, standing=with_setting(policy.standing, arms[kept].overrides[-1]))


COMPARATORS: Mapping[str, Comparator] = {
    "random search": Comparator(keep_nothing, best_dev_of_all),
    "max dev": Comparator(max_dev, best_dev_of_all),
    "max board": Comparator(max_board, best_board_of_all, submits=True),
    "standing only": Comparator(keep_nothing, lambda rounds: None),
}
