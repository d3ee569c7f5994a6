"""What a campaign says of its recipes after a round: the improvement that it claims, and what is shown to be worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import ConfigError
from pipeline.claims.claim_test import Comparison, compare, level_of_round
from pipeline.claims.runs import REFERENCE, STANDING, Run, of_kind
from pipeline.claims.worse_test import ArmComparison, worse_arms, worse_standing

RUNNING, DOUBLED, FINAL_ROUND = "running", "doubled", "final_round"
CONFIRMATIONS: Mapping[str, str] = {
    RUNNING: "once something was kept, one run of the standing recipe in every round; tested from round 2 on",
    DOUBLED: "from round 2 on two runs of the reference recipe in every round and, once something was kept, two of the standing recipe, so two "
    "axes fewer; tested from round 2 on",
    FINAL_ROUND: "if an earlier round kept something, the last round moves no axis and has four runs of the standing recipe and four of the "
    "reference recipe; tested only then",
}
"""How a campaign confirms an improvement. A person chooses at `init` (policy.confirmation), and the choice is frozen."""


@dataclass(frozen=True)
class Claims:
    """The findings of one round. `level` is this round's part of the level of claims, and `worse_level` that of "the standing recipe is
    shown to be worse"; 0 where nothing is tested in this round.

    `num_missing` is the number of planned runs of the standing recipe and of the reference recipe without a score (`runs`).
    """

    level: Fraction = Fraction(0)
    improvement: Comparison = Comparison(not_evaluated="no runs were compared")
    worse_standing: Comparison = Comparison(not_evaluated="no runs were compared")
    worse_arms: Mapping[str, ArmComparison] = field(default_factory=dict)
    num_missing: tuple[int, int] = (0, 0)
    worse_level: Fraction = Fraction(0)

    @property
    def is_claimed(self) -> bool:
        """Whether an improvement of the standing recipe is claimed in this round."""
        return self.improvement.is_shown

    @property
    def shown_worse(self) -> tuple[str, ...]:
        """The axis arms that are shown to be worse, in the order of the plan."""
        return tuple(arm for arm, found in self.worse_arms.items() if found.is_shown)


def check_confirmation(name: str, num_rounds: int, most_rounds: int) -> None:
    """Raise ConfigError for a name that is not in CONFIRMATIONS, or a number of rounds that it cannot have (0: `most_rounds`)."""
    if name not in CONFIRMATIONS:
        raise ConfigError(f"policy.confirmation = {name!r}", f"Valid: {', '.join(CONFIRMATIONS)}")
    least = 2 if name == FINAL_ROUND else 1
    if num_rounds and not least <= num_rounds <= most_rounds:
        why = " leaves no round before the one that confirms" if num_rounds == 1 else ""
        raise ConfigError(
            f"policy.rounds = {num_rounds}{why}",
            f"Valid with policy.confirmation={name}: {least} to {most_rounds}, or 0 for {most_rounds}, the constitution's number",
        )


def claims_after(
    runs: Sequence[Run],
    round_number: int,
    num_rounds: int,
    confirmation: str,
    rules: Constitution,
    unpaired: Sequence[int] = (),
) -> Claims:
    """The findings after a round, from all runs of the campaign up to it. `num_rounds` is the number of rounds that the levels are for.

    `unpaired` has the rounds in which the reference adapter has no fresh score. Nothing is claimed while there is one: its runs cannot be
    compared, and a run that may be left out at will proves nothing.

    An axis arm that is shown to be worse counts in no later variance: one ruinous setting would otherwise hide every improvement.
    """
    runs, worse = _without_worse(tuple(runs), round_number, rules.worse_level, num_rounds, rules.crash_allowance)
    if why := _not_tested(round_number, num_rounds, confirmation, unpaired):
        nothing = Comparison(not_evaluated=why)
        return Claims(improvement=nothing, worse_standing=nothing, worse_arms=worse)
    if confirmation == FINAL_ROUND:
        standing = of_kind(runs, STANDING, [round_number])
        level, worse_level = rules.final_round_level, rules.worse_level
    else:
        standing = [run for run in of_kind(runs, STANDING) if run.round > 1]
        level = level_of_round(rules.claim_level(num_rounds), round_number, num_rounds)
        worse_level = level_of_round(rules.worse_level, round_number, num_rounds)
    if not standing:
        nothing = Comparison(
            not_evaluated="no earlier round kept anything, so the standing recipe is the reference recipe"
        )
        return Claims(level, nothing, nothing, worse, worse_level=worse_level)
    scored = [run for run in runs if not run.is_missing]
    worse_of_standing = worse_standing([run for run in standing if not run.is_missing], scored, worse_level)
    missing = sum(run.is_missing for run in standing), sum(run.is_missing for run in of_kind(runs, REFERENCE))
    return Claims(level, compare(standing, runs, level), worse_of_standing, worse, missing, worse_level)


@lru_cache(maxsize=64)
def _without_worse(
    runs: tuple[Run, ...], round_number: int, level: Fraction, num_rounds: int, allowance: Fraction
) -> tuple[tuple[Run, ...], Mapping[str, ArmComparison]]:
    """The runs without those that this round or an earlier one showed to be worse, and this round's comparisons.

    The cache: the earlier rounds' answer was found when they were decided, and runs of later rounds do not change it.
    """
    if round_number < 1:
        return runs, {}
    before = tuple(run for run in runs if run.round < round_number)
    counted, _ = _without_worse(before, round_number - 1, level, num_rounds, allowance)
    counted = (*counted, *(run for run in runs if run.round >= round_number))
    scored = [run for run in counted if not run.is_missing]
    worse = worse_arms(scored, round_number, level, num_rounds, allowance)
    shown = {arm for arm, found in worse.items() if found.is_shown}
    # A setting that is shown to be worse is no measure of how far chance moves a run.
    return tuple(run for run in counted if not (run.round == round_number and run.arm in shown)), worse


def _not_tested(round_number: int, num_rounds: int, confirmation: str, unpaired: Sequence[int]) -> str:
    """Why the standing recipe is not tested in a round; an empty string where it is."""
    if num_rounds < 2:
        return "it takes two rounds, and this campaign has one"
    if round_number < 2:
        return "it takes a run of the standing recipe, and so at least round 2"
    if unpaired:
        names = ", ".join(f"r{number:04d}" for number in unpaired)
        return f"the reference has no score on the fresh items of {names}; judge it there first"
    if confirmation == FINAL_ROUND and round_number < num_rounds:
        return f"this campaign tests once, in its last round r{num_rounds:04d}"
    return ""
