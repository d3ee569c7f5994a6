"""What a round changes in the search: axes that retire, replicates that are bought, and the next round's contrasts, control and repairs.

All of this is part of the next round's overrides and is stored nowhere else, so a reader of that file knows the next plan. The functions
are pure.
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
    gains: Mapping[str, Fraction], rules: Constitution, has_experiments: bool = True,
) -> tuple[Policy, list[str]]:  # fmt: skip
    """The next policy and the reasons for its changes. `policy` has the new standing recipe, dead ends and settings aside already.

    before: the policy that this round was planned with.
    verdicts: each scored axis arm's noise verdict (`promotion.compare`).
    gains: the arms that are worth more than the recipe that they moved from, and by how much.
    has_experiments: whether the next round has room for contrasts, a control and replicates. A round that only confirms has none.
    """
    states = StateRules.of(rules)
    reasons: list[str] = []
    policy, more = _retire(policy, arms, verdicts, gains, rules)
    reasons += more
    reasons += _contrast_results(evidence, before, arms)
    if not has_experiments:
        return replace(policy, replicates=0, contrasts=(), control=None), reasons
    policy, more = _replicates(policy, evidence, arms, verdicts, rules)
    reasons += more
    policy, more = _contrasts(policy, evidence, rules, states)
    reasons += more
    policy, more = _control(policy, before, evidence, arms, verdicts, rules, states)
    reasons += more
    policy, more = _repair(policy, evidence, states)
    return policy, reasons + more


def _retire(
    policy: Policy, arms: Mapping[str, Arm], verdicts: Mapping[str, str], gains: Mapping[str, Fraction], rules: Constitution
) -> tuple[Policy, list[str]]:  # fmt: skip
    """Retire each axis that gained nothing in `plateau_looks` looks in a row, as long as `least_axes` axes stay."""
    quiet = dict(policy.quiet)
    gained = {arms[name].axis or "" for name in gains if name in verdicts}
    for axis in {arms[name].axis or "" for name in verdicts}:  # one look, however many arms moved the axis
        quiet[axis] = 0 if axis in gained else quiet.get(axis, 0) + 1
    retired, reasons = list(policy.retired), []
    for axis in (axis.name for axis in policy.axes):
        is_left = len(policy.axes) - len(retired) > rules.least_axes
        if quiet.get(axis, 0) >= rules.plateau_looks and axis not in retired and is_left:
            retired.append(axis)
            reasons.append(f"article 11: {axis} gained nothing in {quiet[axis]} looks in a row and is retired")
    return replace(policy, quiet=tuple(sorted(quiet.items())), retired=tuple(retired)), reasons


def _replicates(
    policy: Policy, evidence: Evidence, arms: Mapping[str, Arm], verdicts: Mapping[str, str], rules: Constitution
) -> tuple[Policy, list[str]]:  # fmt: skip
    """Buy one more replicate while retraining noise is at least as large as the largest gain.

    Whether an improvement is claimed plays no part: the runs that a claim rests on must not depend on the claim.
    """
    baseline = promotion.baseline_of(arms)
    lifts = [evidence.lift(name, baseline, "fresh") for name in verdicts]
    largest = max((lift.mean for lift in lifts if lift), default=Fraction(0))
    if largest <= 0 or 2 * evidence.seed_variance < largest**2:
        return replace(policy, replicates=0), []
    bought = min(policy.replicates + 1, rules.most_replicates)
    more = "1 more replicate instead of an axis" if bought == 1 else f"{bought} more replicates instead of axes"
    reason = f"article 11: retraining alone moves a score as much as the largest gain ({show(largest)}): {more}"
    return replace(policy, replicates=bought), [reason]


def _contrasts(policy: Policy, evidence: Evidence, rules: Constitution, states: StateRules) -> tuple[Policy, list[str]]:
    """Register a contrast for each family whose state demands one: half of its share in the mix, with the result that is expected."""
    wanted = [
        family
        for family, state in sorted(evidence.families.items())
        if states.permit(state.name, "contrast_submission") and f"recipe.mix.{family}" in rules.open_keys
    ]
    contrasts = tuple(Contrast(family, f"recipe.mix.{family}") for family in wanted[: rules.most_contrasts])
    reasons = [
        f"article 9: registered for the next round: half of {contrast.key}; if what dev gained in {contrast.family} was learned items, "
        f"dev falls and fresh holds"
        for contrast in contrasts
    ]
    return replace(policy, contrasts=contrasts), reasons


def _contrast_results(evidence: Evidence, before: Policy, arms: Mapping[str, Arm]) -> list[str]:
    """The reasons that say whether this round's contrasts support the hypotheses that they were registered with."""
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
        result = "supported" if fell == [True, False] else "not supported"
        reasons.append(
            f"article 9: {name} halved {contrast.key}: dev {show(dev.mean)}, fresh {show(fresh.mean)} in {contrast.family}; "
            f"that dev's gain was learned items is {result}"
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
    """Run the old objective's recipe as a control, where a state took some dev out of the objective and this changed what was kept."""
    reasons = []
    standing_arm = next((arm.name for arm in arms.values() if arm.replicate_of == "standing"), "")
    lift = evidence.lift(standing_arm, "control", "fresh")
    if lift is not None:
        z2 = lift.mean**2 / (lift.variance + 2 * evidence.seed_variance) if lift.variance else Fraction(0)
        comparison = "beats" if lift.mean > 0 and z2 > 4 else "does not beat"
        reasons.append(
            f"article 9: the new objective's recipe {comparison} the old one's: {show(lift.mean)} on fresh items"
        )
    if evidence.look is None or all(
        states.permit(state.name, "dev_in_selection") for state in evidence.families.values()
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
    """Give new dev items, from the next round on, to each family whose dev was reversed in this look."""
    following_round = f"r{int(evidence.round[1:]) + 1:04d}"
    reversed_now = [
        family
        for family, state in sorted(evidence.families.items())
        if states.permit(state.name, "propose_repair")
        # This includes a family that an earlier decision of this round reversed, if no plan has used its repair.
        and (state.code in ("gap_alarm", "board_alarm") or family not in dict(policy.repaired))
    ]
    repaired = {**dict(policy.repaired), **dict.fromkeys(reversed_now, following_round)}
    reasons = [
        f"article 9: dev of {family} is quarantined: its items are new from {following_round} on"
        for family in reversed_now
    ]
    return replace(policy, repaired=tuple(sorted(repaired.items()))), reasons


def overrides(decision: Decision, next_round: str, rules: Constitution) -> dict[str, Any]:
    """The content of the next round's Hydra file. Raises Refused where a setting is not on the allow-list (article 2)."""
    policy = decision.policy
    rules.check_settings(policy.standing)
    rules.check_settings(policy.control or ())
    return {"round": next_round, "policy": policy.to_hydra()}
