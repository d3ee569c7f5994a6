"""Evidence + articles -> Decision: what is kept, what is learned of the search, the next round's policy. Exact arithmetic, no I/O.

The rule of article 7: an axis is above noise when its lift > z * sqrt(item variance + 2 * seed variance) on fresh items, that is when lift
> 0 and lift^2 > z^2 * variance, which needs no square root. The lift is over the recipe that the axis moved from: the reference, or
this round's run of the standing recipe once there is one. Of several above noise the one of largest value (pipeline.selection) is kept,
never one whose own dev runs ahead of its fresh; ties go to the lower arm. An axis that is as far below becomes a dead end. Below the
quorum nothing is decided at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

from pipeline import search, states
from pipeline.constitution import Constitution
from pipeline.evidence import show
from pipeline.gaussian import decimal_of, exactly
from pipeline.records import Arm, Decision, Evidence, Finalist, Lift, Policy, with_setting

CLOSING = ("decided", "closed")  # states of a decision after which a round is over


def decide(evidence: Evidence, arms: Mapping[str, Arm], policy: Policy, constitution: Constitution) -> Decision:
    """One decision for one state of a round. `arms` are the plan's, by name; `policy` is what it was planned with."""
    ours = [outcome for outcome in evidence.outcomes if outcome.arm in arms]
    scored = [outcome.arm for outcome in ours if outcome.scored("fresh")]
    missing = {outcome.arm: f"{outcome.status} ({outcome.exit_class})" for outcome in ours if outcome.arm not in scored}
    baseline = "standing" if policy.standing else "reference"
    if why := _undecidable(evidence, scored, missing, len(ours), baseline, constitution):
        return Decision(evidence.round, "undecided", None, policy, (why,), evidence.families, evidence.external)

    reasons = [f"article 3: {len(scored)} of {len(ours)} arms have a score"]
    reasons += [f"{arm} has no score: {why}" for arm, why in missing.items()]
    reasons += _said(evidence)
    verdicts: dict[str, str] = {}
    for name in scored:
        lift = evidence.lift(name, baseline, "fresh")
        if arms[name].role == "axis" and lift is not None:
            verdicts[name] = compare(lift, evidence.seed_variance, constitution)
            key, value = arms[name].overrides[-1]
            limit = show(limit_of(lift, evidence.seed_variance, constitution))
            reasons.append(
                f"article 7: {name} ({key}={value}) fresh lift {show(lift.mean)} over the {baseline} is {verdicts[name]}; "
                f"noise reaches to {limit}"
            )
    above = [name for name, verdict in verdicts.items() if verdict == "above noise"]
    kept, why_not = choose(evidence, baseline, above)
    reasons += why_not
    standing = policy.standing
    if kept is None:
        reasons.append("article 7: no axis is kept; the standing recipe stays")
    else:
        moved = arms[kept].overrides[-1]
        standing = with_setting(standing, moved)
        reasons.append(f"article 8: {kept}'s {moved[0]}={moved[1]} joins the standing recipe")
    below = [arms[name].overrides[-1] for name, verdict in verdicts.items() if verdict == "below noise"]
    dead_ends = policy.dead_ends + tuple(setting for setting in below if setting not in policy.dead_ends)
    following, more = search.following(
        replace(policy, standing=standing, dead_ends=dead_ends), policy, evidence, arms, verdicts, kept, constitution
    )
    finalists = evidence.look.finalists if evidence.look else ()
    return Decision(
        evidence.round,
        "decided",
        kept,
        following,
        (*reasons, *more),
        evidence.families,
        evidence.external,
        winner(finalists),
        ladder(evidence.board, constitution.ladder_step),
    )


def _undecidable(
    evidence: Evidence,
    scored: list[str],
    missing: Mapping[str, str],
    num: int,
    baseline: str,
    constitution: Constitution,
) -> str:
    """Why nothing can be decided yet; empty where it can."""
    if len(scored) < constitution.quorum:
        what = ", ".join(f"{arm} {why}" for arm, why in missing.items())
        return f"article 3: {len(scored)} of {num} arms have a score, {constitution.quorum} are needed; missing: {what}"
    if not any(lift.baseline == baseline and lift.item_set == "fresh" for lift in evidence.lifts):
        return f"article 7: the {baseline} recipe has no score on this round's fresh items"
    return ""


def _said(evidence: Evidence) -> list[str]:
    """What the tests said, one line for each family that is not as it began, and what a silence is worth."""
    lines = [
        f"article 9: dev of {family} is {state.name} ({state.code})"
        for family, state in sorted(evidence.families.items())
        if state.name != states.UNPROVEN
    ]
    if evidence.external != states.EXTERNAL_CLEAR:
        lines.append("article 9: the board runs ahead of fresh items: it is no target any more (EXTERNAL-SUSPECT)")
    if evidence.look and not evidence.look.verdict["alarm"]:
        gaps = {family: Fraction(gap) for family, gap in evidence.look.power["gap_now"].items()}
        family = max(gaps, key=lambda name: (gaps[name], name))
        lines.append(f"article 10: no alarm; a gap of {show(gaps[family])} in {family} would have been seen with 80 %")
    return lines


def choose(evidence: Evidence, baseline: str, above: list[str], old: bool = False) -> tuple[str | None, list[str]]:
    """The arm to keep of those above noise, and what was said against others. old: by the objective in which every dev counts."""
    look = evidence.look
    alarmed = {} if look is None else {test["arm"]: test["family"] for test in look.verdict["arm_alarms"]}
    worth = {} if look is None else (look.old_values if old else look.values)
    said = [
        f"article 9: {arm} is not kept: its dev runs ahead of its fresh in {alarmed[arm]}"
        for arm in above
        if arm in alarmed
    ]
    open_ = [arm for arm in above if old or arm not in alarmed]

    def by(arm: str) -> tuple[Decimal, Fraction]:
        lift = evidence.lift(arm, baseline, "fresh")
        assert lift is not None
        return Decimal(worth.get(arm, "0")), lift.mean

    return max(open_, key=by, default=None), said


def winner(finalists: tuple[Finalist, ...]) -> tuple[str, str] | None:
    """(round, arm). Within one standard error of the best: fewest families of its own alarm, then the earlier round, the lower arm."""
    if not finalists:
        return None
    top = finalists[0]

    def ties(each: Finalist) -> bool:
        return (Fraction(top.value) - Fraction(each.value)) ** 2 <= top.variance + each.variance

    chosen = min(filter(ties, finalists), key=lambda each: (len(each.alarms), each.round, each.arm))
    return chosen.round, chosen.arm


def ladder(board: Mapping[str, Mapping[str, str]], step: Decimal) -> str:
    """The board score that workers and proposers may know: a new best only when it beats the old by a step (Blum and Hardt 1502.04585)."""
    known = Decimal(-1)
    for _, scores in sorted(board.items()):
        best = max(map(Decimal, scores.values()), default=known)
        known = best if known < 0 or best >= known + step else known
    return "" if known < 0 else format(known, "f")


def by_hand(decision: Decision, policy: Policy) -> Decision:
    """What a person's closing makes of an undecided round: the policy as it was, and the next round may come."""
    reasons = (*decision.reasons, "closed by hand: nothing was decided, the policy stays as it was")
    return replace(decision, state="closed", policy=policy, reasons=reasons)


def compare(lift: Lift, seed_variance: Fraction, constitution: Constitution) -> str:
    """'above noise', 'below noise' or 'within noise', by lift^2 against z^2 times its variance."""
    variance = lift.variance + 2 * seed_variance
    if lift.mean**2 <= Fraction(constitution.z) ** 2 * variance:
        return "within noise"
    return "above noise" if lift.mean > 0 else "below noise"


def limit_of(lift: Lift, seed_variance: Fraction, constitution: Constitution) -> Fraction:
    """What a lift must exceed to be above noise, for people: z times the root, to 34 digits."""
    with exactly():
        return Fraction(constitution.z * decimal_of(lift.variance + 2 * seed_variance).sqrt())
