"""What would have changed a decision: how far each arm was from another verdict, the quorum from failing, the tests from speaking. For people."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm, Plan
from pipeline.decision import promotion
from pipeline.decision.derive import Derived
from pipeline.decision.evidence import Evidence
from pipeline.stats import lifts


def of_choice(derived: Derived, arms: Mapping[str, Arm], rules: Constitution) -> list[str]:
    """By how much an arm was kept, or not; who is as good as the campaign's best so far."""
    seen, decision = derived.evidence, derived.decision
    if seen.look is None or decision.state != "decided":
        return []
    baseline = promotion.baseline_of(arms)
    base = promotion.baseline_value(seen.look.values, arms, baseline)
    over = {
        arm: Fraction(value) - base
        for arm, value in seen.look.values.items()
        if arms[arm].role == "axis" and arm != decision.kept
    }
    after = max(over, key=lambda arm: (over[arm], -arms[arm].index), default=None)
    lines = []
    if decision.kept:
        mine = Fraction(seen.look.values[decision.kept]) - base
        lines.append(
            f"{decision.kept} is worth {lifts.amount(mine)} more than the {baseline} recipe; with so much less it would not have been kept."
        )
        if after:
            lines.append(
                f"{after} comes next: with {lifts.amount(mine - over[after])} more value it would have been kept."
            )
    elif after:
        lines.append(
            f"{after} comes nearest to the {baseline} recipe: {lifts.show(over[after])}; above 0 it would have been kept."
        )
    first, *others = seen.look.finalists or (None,)
    if first:
        distance = promotion.tie_distance(rules)
        ties = [
            f"{each.arm} of {each.round} ({lifts.show(Fraction(each.value))}{', alarms of its own' if each.alarms else ''})"
            for each in others
            if (Fraction(first.value) - Fraction(each.value)) ** 2 <= distance * (first.variance + each.variance)
        ]
        lines.append(
            f"Best so far by value: {first.arm} of {first.round} ({lifts.show(Fraction(first.value))}); "
            + (
                f"within a standard error of it: {', '.join(ties)}."
                if ties
                else "nobody is within a standard error of it."
            )
        )
    return lines


def of_arms_and_families(seen: Evidence, arms: Mapping[str, Arm], plan: Plan, rules: Constitution) -> list[str]:
    """How far each axis was from another verdict, the quorum from failing, the tests from speaking."""
    baseline = "standing" if plan.policy.standing else "reference"
    scored = [run for run in seen.outcomes if run.arm in arms and run.scored("fresh")]
    lines = [f"{len(scored) - rules.quorum:+d} arms beyond the quorum of {rules.quorum}."]
    for run in scored:
        lift = seen.lift(run.arm, baseline, "fresh")
        if arms[run.arm].role != "axis" or lift is None:
            continue
        limit = promotion.limit_of(lift, seen.seed_variance, rules)
        verdict = promotion.compare(lift, seen.seed_variance, rules)
        if verdict == "within noise":
            lines.append(
                f"{run.arm} would be above noise from {lifts.show(limit)} on, {lifts.amount(limit - lift.mean)} more than it has; "
                f"a dead end from {lifts.show(-limit)}."
            )
        else:
            lines.append(f"{run.arm} is {verdict} by {lifts.amount(abs(lift.mean) - limit)}.")
    if seen.look:
        for family, bound in sorted(seen.look.verdict.upper_bounds.items()):
            if seen.families[family].name == "UNPROVEN":
                lines.append(
                    f"dev of {family} could be TRUSTED with a gap of at most 5 % (now at most {100 * float(bound):.1f} %) and four board scores."
                )
    return lines
