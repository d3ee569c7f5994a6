"""What a round teaches the search: axes that retire, replicates that are bought, contrasts, controls and repairs of the next round. Pure.

All of it passes on in the next round's overrides and nowhere else: whoever reads them knows what the next plan will be, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm, Contrast, Decision, Policy, with_setting
from pipeline.decision import promotion
from pipeline.decision.evidence import Evidence
from pipeline.decision.family_states import StateRules
from pipeline.stats.lifts import paired_lift, show


def following(
    policy: Policy, before: Policy, evidence: Evidence, arms: Mapping[str, Arm], verdicts: Mapping[str, str],
    gains: Mapping[str, Fraction], claimed: bool, rules: Constitution,
) -> tuple[Policy, list[str]]:  # fmt: skip
    """The next policy and the reasons for what changed in it besides standing recipe and dead ends, which `policy` has already.

    before: what this round was planned with. verdicts: of each scored axis arm, as promotion.compare says. gains: of those that are worth
    more than what they moved from. claimed: whether what was kept is above noise.
    """
    states = StateRules.of(rules)
    reasons: list[str] = []
    policy, said = _retire(policy, arms, verdicts, gains, rules)
    reasons += said
    policy, said = _replicates(policy, evidence, arms, verdicts, claimed, rules)
    reasons += said
    reasons += _contrasts_told(evidence, before, arms)
    policy, said = _contrasts(policy, evidence, rules, states)
    reasons += said
    policy, said = _control(policy, before, evidence, arms, verdicts, rules, states)
    reasons += said
    policy, said = _repair(policy, evidence, states)
    return policy, reasons + said


def _retire(
    policy: Policy, arms: Mapping[str, Arm], verdicts: Mapping[str, str], gains: Mapping[str, Fraction], rules: Constitution
) -> tuple[Policy, list[str]]:  # fmt: skip
    """An axis that gained nothing in so many looks in a row stays out, while enough others are left."""
    quiet = dict(policy.quiet)
    gained = {arms[name].axis or "" for name in gains if name in verdicts}
    for axis in {arms[name].axis or "" for name in verdicts}:  # a look at an axis, however many arms it had
        quiet[axis] = 0 if axis in gained else quiet.get(axis, 0) + 1
    retired, reasons = list(policy.retired), []
    for axis in (each.name for each in policy.axes):
        is_left = len(policy.axes) - len(retired) > rules.least_axes
        if quiet.get(axis, 0) >= rules.plateau_looks and axis not in retired and is_left:
            retired.append(axis)
            reasons.append(f"article 11: {axis} gained nothing in {quiet[axis]} looks in a row and is retired")
    return replace(policy, quiet=tuple(sorted(quiet.items())), retired=tuple(retired)), reasons


def _replicates(
    policy: Policy, evidence: Evidence, arms: Mapping[str, Arm], verdicts: Mapping[str, str], claimed: bool, rules: Constitution
) -> tuple[Policy, list[str]]:  # fmt: skip
    """One more replicate instead of an axis while the noise of retraining is as large as the largest gain; none once an improvement is claimed."""
    baseline = promotion.baseline_of(arms)
    lifts = [evidence.lift(name, baseline, "fresh") for name in verdicts]
    largest = max((lift.mean for lift in lifts if lift), default=Fraction(0))
    if claimed or largest <= 0 or 2 * evidence.seed_variance < largest**2:
        return replace(policy, replicates=0), []
    bought = min(policy.replicates + 1, rules.most_replicates)
    reason = f"article 11: retraining alone moves a score as much as the largest gain ({show(largest)}): {bought} more replicate(s) instead of axes"
    return replace(policy, replicates=bought), [reason]


def _contrasts(policy: Policy, evidence: Evidence, rules: Constitution, states: StateRules) -> tuple[Policy, list[str]]:
    """For a family whose dev is suspect: half of its share in the mix, registered with what that is expected to show."""
    wanted = [
        family
        for family, state in sorted(evidence.families.items())
        if states.permit(state.name, "contrast_submission") and f"recipe.mix.{family}" in rules.open_keys
    ]
    contrasts = tuple(Contrast(family, f"recipe.mix.{family}") for family in wanted[: rules.most_contrasts])
    reasons = [
        f"article 9: registered for the next round: half of {each.key}; if what dev gained in {each.family} was learned items, "
        f"dev falls and fresh holds"
        for each in contrasts
    ]
    return replace(policy, contrasts=contrasts), reasons


def _contrasts_told(evidence: Evidence, before: Policy, arms: Mapping[str, Arm]) -> list[str]:
    """What this round's contrasts showed of the hypothesis that they were registered with."""
    reasons = []
    runs = {outcome.arm: outcome for outcome in evidence.outcomes}
    against = next((runs[arm.name] for arm in arms.values() if arm.replicate_of == "standing"), runs["reference"])
    for contrast in before.contrasts:
        name = next((arm.name for arm in arms.values() if arm.role == "contrast" and arm.axis == contrast.family), None)
        run = runs.get(name or "")
        if run is None or not run.scored("fresh") or not against.scored("dev"):
            reasons.append(f"article 9: the contrast for {contrast.family} has no score; its hypothesis is open")
            continue
        dev, fresh = (paired_lift(run, against, item_set, "", [contrast.family]) for item_set in ("dev", "fresh"))
        fell = [lift.mean < 0 and lift.mean**2 > 4 * lift.variance for lift in (dev, fresh)]  # two standard errors
        told = "supported" if fell == [True, False] else "not supported"
        reasons.append(
            f"article 9: {name} halved {contrast.key}: dev {show(dev.mean)}, fresh {show(fresh.mean)} in {contrast.family}; "
            f"that dev's gain was learned items is {told}"
        )
    return reasons


def _control(
    policy: Policy,
    before: Policy,
    evidence: Evidence,
    arms: Mapping[str, Arm],
    verdicts: Mapping[str, str],
    rules: Constitution,
    states: StateRules,
) -> tuple[Policy, list[str]]:
    """Where a state took some dev out of the objective and that changes what is kept, the old objective's recipe runs beside."""
    reasons = []
    standing_arm = next((arm.name for arm in arms.values() if arm.replicate_of == "standing"), "")
    lift = evidence.lift(standing_arm, "control", "fresh")
    if lift is not None:
        z2 = lift.mean**2 / (lift.variance + 2 * evidence.seed_variance) if lift.variance else Fraction(0)
        told = "beats" if lift.mean > 0 and z2 > 4 else "does not beat"
        reasons.append(f"article 9: the new objective's recipe {told} the old one's: {show(lift.mean)} on fresh items")
    if evidence.look is None or all(
        states.permit(each.name, "dev_in_selection") for each in evidence.families.values()
    ):
        return policy, reasons
    baseline = promotion.baseline_of(arms)
    old = promotion.best(
        promotion.gaining(evidence.look.old_values, arms, baseline, verdicts, rules), evidence, baseline
    )
    recipe = before.standing if before.control is None else before.control
    control = with_setting(recipe, arms[old].overrides[-1]) if old else recipe
    if control == policy.standing:
        return replace(policy, control=None), reasons
    if before.control is None:
        reasons.append(
            f"article 9: by the old objective {old or 'nothing'} would have been kept: that recipe runs beside, as a control"
        )
    return replace(policy, control=control), reasons


def _repair(policy: Policy, evidence: Evidence, states: StateRules) -> tuple[Policy, list[str]]:
    """A family whose dev was reversed in this look gets new dev items from the next round on."""
    following_round = f"r{int(evidence.round[1:]) + 1:04d}"
    reversed_now = [
        family
        for family, state in sorted(evidence.families.items())
        if states.permit(state.name, "propose_repair")
        # Reversed by an earlier decision of this round, too, whose repair no plan took up.
        and (state.code in ("gap_alarm", "board_alarm") or family not in dict(policy.repaired))
    ]
    repaired = {**dict(policy.repaired), **dict.fromkeys(reversed_now, following_round)}
    reasons = [
        f"article 9: dev of {family} is quarantined: its items are new from {following_round} on"
        for family in reversed_now
    ]
    return replace(policy, repaired=tuple(sorted(repaired.items()))), reasons


def overrides(decision: Decision, next_round: str, rules: Constitution) -> dict[str, Any]:
    """The content of the next round's Hydra file. Raises Refused when a setting is not on the allow-list (article 2)."""
    policy = decision.policy
    rules.check_settings(policy.standing)
    rules.check_settings(policy.control or ())
    return {"round": next_round, "policy": policy.to_hydra()}
