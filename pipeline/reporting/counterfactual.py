"""What would have changed a decision: how far each arm was from another verdict, the quorum from failing, and a family from trust.

All lines are for people. Values and lifts are differences of accuracies and are shown in points.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm, Plan
from pipeline.decision import family_states, promotion
from pipeline.decision.derive import Derived
from pipeline.decision.evidence import Assessment
from pipeline.stats import lifts


def of_choice(derived: Derived, arms: Mapping[str, Arm], rules: Constitution, choice: str) -> list[str]:
    """By how much the kept arm was ahead of its baseline and the next arm, and which finalists tie. Empty for an undecided round.

    choice: what the campaign froze (`promotion.CHOICES`).
    """
    look, decision = derived.evidence.look, derived.decision
    if decision.state == "decided" and choice == promotion.MAX_DEV:
        return _of_dev(derived, arms)
    if look is None or decision.state != "decided":
        return []
    baseline = promotion.baseline_of(arms)
    base = promotion.baseline_value(look.values, arms, baseline)
    against = promotion.baseline_in_words(look.values, arms, baseline)
    edited = {
        outcome.arm for outcome in derived.evidence.outcomes if outcome.edited
    }  # never kept, whatever they are worth
    recipes = {name for name, arm in arms.items() if arm.role == "axis"} - edited
    gains = {arm: Fraction(value) - base for arm, value in look.values.items() if arm in recipes}
    kept_gain = gains.pop(decision.kept or "", Fraction(0))
    runner_up = max(gains, key=lambda arm: (gains[arm], -arms[arm].index), default=None)
    margin = Fraction(rules.promotion_margin)
    lines = []
    if decision.kept:
        lines.append(
            f"The value of {decision.kept} is {lifts.amount(kept_gain)} above that of {against}. It would not have been kept if it were "
            f"{lifts.amount(kept_gain - margin)} lower."
        )
        if runner_up:
            ahead = lifts.amount(kept_gain - gains[runner_up])
            lines.append(f"{runner_up} comes next. It would have been kept if its value were {ahead} higher.")
    elif runner_up:
        lines.append(
            f"{runner_up} comes nearest to being kept: its value minus that of {against} is {lifts.show(gains[runner_up])}. "
            f"An arm is kept if this difference is more than {lifts.amount(margin)}."
        )
    values = {
        arm: Fraction(look.values[arm]) for arm in sorted(edited & look.values.keys()) if arms[arm].role == "axis"
    }
    least = Fraction(look.values[decision.kept]) if decision.kept else base + margin
    than = (
        f"{decision.kept}, which is kept ({lifts.show(least)})"
        if decision.kept
        else f"an arm needs to be kept ({lifts.show(least)})"
    )
    lines += [
        f"{arm}, which ran edited code, has a larger value ({lifts.show(value)}) than {than}. It is not kept, because no setting says what "
        "its code did (article 16); a person may put its patch into another campaign's image (section Agents)."
        for arm, value in values.items()
        if value > least
    ]
    return lines + _finalists(look, rules)


def _of_dev(derived: Derived, arms: Mapping[str, Arm]) -> list[str]:
    """The same where the largest dev lift is kept, whatever the tests say."""
    leads, kept = promotion.axes_by_dev(derived.evidence, arms), derived.decision.kept
    baseline = f"the {promotion.baseline_of(arms)} recipe on dev"
    nearest = next((arm for arm in leads if arm != kept), None)
    if kept is None:
        near = f"; {nearest} comes nearest with {lifts.show(leads[nearest])}" if nearest else ""
        return [f"No axis is ahead of {baseline}, so none is kept{near}."]
    lines = [
        f"{kept} is {lifts.amount(leads[kept])} ahead of {baseline}. It would not have been kept without this lead."
    ]
    if nearest:
        lines.append(
            f"{nearest} comes next. It would have been kept if its dev lift were more than {lifts.amount(leads[kept] - leads[nearest])} higher."
        )
    return lines


def _finalists(look: Assessment, rules: Constitution) -> list[str]:
    """The finalist with the largest value, and those that cannot be told apart from it."""
    if not look.finalists:
        return []
    first, *others = look.finalists
    distance = promotion.tie_distance(rules)
    ties = [
        f"{arm.arm} of {arm.round} ({lifts.show(Fraction(arm.value))}{', which has gap alarms of its own' if arm.alarms else ''})"
        for arm in others
        if (Fraction(first.value) - Fraction(arm.value)) ** 2 <= distance * (first.variance + arm.variance)
    ]
    near = (
        f"Within a standard error of it: {', '.join(ties)}."
        if ties
        else "No other arm is within a standard error of it."
    )
    value = lifts.show(Fraction(first.value))
    return [
        f"The largest value of the campaign so far is that of {first.arm} of {first.round}: {value} over the reference adapter. {near}"
    ]


def of_arms_and_families(
    derived: Derived, arms: Mapping[str, Arm], plan: Plan, rules: Constitution, choice: str
) -> list[str]:
    """How far the quorum was from failing, each axis arm from another verdict, and each UNPROVEN family from trust.

    choice: what the campaign froze; with MAX_DEV no verdict sets a setting aside.
    """
    is_greedy = choice == promotion.MAX_DEV
    evidence, baseline = derived.evidence, "standing" if plan.policy.standing else "reference"
    scored = [run for run in evidence.outcomes if run.arm in arms and run.scored("fresh")]
    lines = [f"{len(scored)} arms have a score, and the quorum is {rules.quorum}."]
    for run in scored:
        lift = evidence.lift(run.arm, baseline, "fresh")
        if (
            arms[run.arm].role != "axis" or lift is None or run.edited
        ):  # article 16: no score of an edited arm sets anything aside
            continue
        worse = evidence.claims.worse_arms.get(run.arm)
        if worse and worse.is_shown:
            lines.append(f"{run.arm} is shown to be worse by {lifts.amount(worse.difference + worse.reach)}.")
            continue
        limit = promotion.limit_of(lift, evidence.seed_variance, rules)
        verdict = promotion.compare(lift, evidence.seed_variance, rules)
        if verdict == promotion.WITHIN:
            lines.append(
                f"{run.arm} would be above noise with a fresh lift of more than {lifts.show(limit)}, {lifts.amount(limit - lift.mean)} more "
                f"than it has. Below {lifts.show(-limit)} {'it would be below noise' if is_greedy else 'its setting would be set aside'}."
            )
        else:
            how = verdict if is_greedy or verdict == promotion.ABOVE else "set aside"
            lines.append(f"{run.arm} is {how} by {lifts.amount(abs(lift.mean) - limit)}.")
    claim = evidence.claims.improvement
    if derived.decision.state == "decided" and not claim.not_evaluated:
        distance = lifts.amount(abs(claim.difference - claim.reach))
        lines.append(
            f"The claimed difference is {distance} more than noise reaches."
            if claim.is_shown
            else f"An improvement would be claimed if the difference of the standing runs were {distance} larger."
        )
    if evidence.look:
        article = family_states.StateRules.of(rules)
        lines += [
            f"Dev of {family} can become TRUSTED if the gap is at most {lifts.amount(Fraction(article.small_gap))} with 95 % confidence "
            f"(now {lifts.show(Fraction(bound))}) and the campaign has at least {article.least_scores} board scores."
            for family, bound in sorted(evidence.look.verdict.upper_bounds.items())
            if evidence.families[family].name == family_states.UNPROVEN
        ]
    return lines
