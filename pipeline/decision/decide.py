"""Evidence + articles -> Decision: what is kept, what is learned of the search, the next round's policy. Exact arithmetic, no I/O.

The axis of largest shrunk value joins the standing recipe when that value exceeds its baseline's (pipeline.promotion), never one whose own dev
runs ahead of its fresh. That is what the search builds on; an improvement is claimed only of one whose fresh lift is above noise, by
article 7's z. An axis that is as far below becomes a dead end. Below the quorum nothing is decided at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm, Decision, Policy, with_setting
from pipeline.decision import family_states, policy_update, promotion
from pipeline.decision.evidence import Evidence, Finalist
from pipeline.stats.lifts import amount, show

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
            verdicts[name] = promotion.compare(lift, evidence.seed_variance, constitution)
            key, value = arms[name].overrides[-1]
            limit = show(promotion.limit_of(lift, evidence.seed_variance, constitution))
            reasons.append(
                f"article 7: {name} ({key}={value}) fresh lift {show(lift.mean)} over the {baseline} is {verdicts[name]}; "
                f"noise reaches to {limit}"
            )
    values = evidence.look.values if evidence.look else {}
    gains = promotion.gaining(values, arms, baseline, verdicts, constitution)
    closed = promotion.alarmed(evidence)
    kept = promotion.best(gains, evidence, baseline, closed)
    claimed = kept is not None and verdicts[kept] == promotion.ABOVE
    reasons += [
        f"article 9: {arm} is not kept: its dev runs ahead of its fresh in {closed[arm]}"
        for arm in gains
        if arm in closed
    ]
    standing = policy.standing
    if kept is None:
        reasons.append(
            f"article 7: no axis is worth more than the {baseline} recipe: nothing is kept; the standing recipe stays"
        )
    else:
        moved = arms[kept].overrides[-1]
        standing = with_setting(standing, moved)
        told = "is an improvement" if claimed else "is provisional, and no improvement is claimed"
        reasons.append(
            f"article 7: {kept} is worth most, {amount(gains[kept])} more than the {baseline} recipe; that {told}"
        )
        reasons.append(f"article 8: {kept}'s {moved[0]}={moved[1]} joins the standing recipe")
    below = [arms[name].overrides[-1] for name, verdict in verdicts.items() if verdict == promotion.BELOW]
    dead_ends = policy.dead_ends + tuple(setting for setting in below if setting not in policy.dead_ends)
    following, more = policy_update.following(
        replace(policy, standing=standing, dead_ends=dead_ends),
        policy,
        evidence,
        arms,
        verdicts,
        gains,
        claimed,
        constitution,
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
        winner(finalists, promotion.tie_distance(constitution)),
        ladder(evidence.board, constitution.ladder_step),
        claimed,
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
        if state.name != family_states.UNPROVEN
    ]
    if evidence.external != family_states.EXTERNAL_CLEAR:
        lines.append("article 9: the board runs ahead of fresh items: it is no target any more (EXTERNAL-SUSPECT)")
    if evidence.look and not evidence.look.verdict.alarm:
        gaps = {family: Fraction(gap) for family, gap in evidence.look.power.gap_now.items()}
        family = max(gaps, key=lambda name: (gaps[name], name))
        lines.append(
            f"article 10: no alarm; a gap of {amount(gaps[family])} in {family} would have been seen with 80 %"
        )
    return lines


def winner(finalists: tuple[Finalist, ...], distance: Fraction = Fraction(1)) -> tuple[str, str] | None:
    """(round, arm). Of those within so many standard errors (`distance`: their square) of the best: fewest families of its own alarm, then the
    largest value; the earlier round and the lower arm only between equals."""
    if not finalists:
        return None
    top = finalists[0]

    def ties(each: Finalist) -> bool:
        return (Fraction(top.value) - Fraction(each.value)) ** 2 <= distance * (top.variance + each.variance)

    chosen = min(
        filter(ties, finalists), key=lambda each: (len(each.alarms), -Fraction(each.value), each.round, each.arm)
    )
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
