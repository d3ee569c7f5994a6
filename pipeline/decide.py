"""Evidence + articles -> Decision, and the policy that follows from it. Exact arithmetic, no I/O.

The rule of article 7: an axis is kept when lift > z * sqrt(item variance + 2 * seed variance) on fresh items, that is when lift > 0
and lift^2 > z^2 * variance, which needs no square root. The lift is over the recipe that the axis moved from: the reference, or this
round's run of the standing recipe once there is one. Of several the largest lift wins, ties go to the lower arm. An axis that
is as far below becomes a dead end. Below the quorum nothing is decided at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pipeline.constitution import Constitution
from pipeline.records import Arm, Decision, Evidence, Lift, Policy, with_setting

CLOSING = ("decided", "closed")  # states of a decision after which a round is over


def decide(evidence: Evidence, arms: Mapping[str, Arm], policy: Policy, constitution: Constitution) -> Decision:
    """One decision for one state of a round. `arms` are the plan's, by name."""
    ours = [outcome for outcome in evidence.outcomes if outcome.arm in arms]
    scored = [outcome.arm for outcome in ours if outcome.scored("fresh")]
    missing = {outcome.arm: f"{outcome.status} ({outcome.exit_class})" for outcome in ours if outcome.arm not in scored}
    if len(scored) < constitution.quorum:
        what = ", ".join(f"{arm} {why}" for arm, why in missing.items())
        reason = f"article 3: {len(scored)} of {len(ours)} arms have a score, {constitution.quorum} are needed; missing: {what}"
        return Decision(evidence.round, "undecided", None, policy.standing, policy.dead_ends, (reason,))
    baseline = "standing" if policy.standing else "reference"
    if not any(lift.baseline == baseline and lift.item_set == "fresh" for lift in evidence.lifts):
        reason = f"article 7: the {baseline} recipe has no score on this round's fresh items"
        return Decision(evidence.round, "undecided", None, policy.standing, policy.dead_ends, (reason,))

    reasons = [f"article 3: {len(scored)} of {len(ours)} arms have a score"]
    reasons += [f"{arm} has no score: {why}" for arm, why in missing.items()]
    kept: Lift | None = None
    dead_ends = list(policy.dead_ends)
    for name in scored:
        lift = evidence.lift(name, baseline, "fresh")
        if arms[name].role != "axis" or lift is None:
            continue
        verdict = compare(lift, evidence.seed_variance, constitution)
        setting = arms[name].overrides[-1]
        reasons.append(
            f"article 7: {name} ({setting[0]}={setting[1]}) fresh lift {show(lift.mean)} over the {baseline} is {verdict}"
        )
        if verdict == "above noise" and (kept is None or lift.mean > kept.mean):
            kept = lift
        if verdict == "below noise" and setting not in dead_ends:
            dead_ends.append(setting)
    standing = policy.standing
    if kept is None:
        reasons.append("article 7: no axis is above noise; the standing recipe stays")
    else:
        moved = arms[kept.arm].overrides[-1]
        standing = with_setting(standing, moved)
        reasons.append(f"article 8: {kept.arm}'s {moved[0]}={moved[1]} joins the standing recipe")
    return Decision(evidence.round, "decided", kept.arm if kept else None, standing, tuple(dead_ends), tuple(reasons))


def by_hand(decision: Decision, policy: Policy) -> Decision:
    """What a person's closing makes of an undecided round: the policy as it was, and the next round may come."""
    reasons = (*decision.reasons, "closed by hand: nothing was decided, the policy stays as it was")
    return Decision(decision.round, "closed", None, policy.standing, policy.dead_ends, reasons)


def compare(lift: Lift, seed_variance: Fraction, constitution: Constitution) -> str:
    """'above noise', 'below noise' or 'within noise', by lift^2 against z^2 times its variance."""
    variance = lift.variance + 2 * seed_variance
    if lift.mean**2 <= Fraction(constitution.z) ** 2 * variance:
        return "within noise"
    return "above noise" if lift.mean > 0 else "below noise"


def next_overrides(decision: Decision, next_round: str, constitution: Constitution) -> dict[str, Any]:
    """The content of the next round's Hydra file. Raises Refused when a setting is not on the allow-list (article 2)."""
    constitution.check_settings(decision.standing)
    return {
        "round": next_round,
        "policy": {
            "standing": [{"key": key, "value": value} for key, value in decision.standing],
            "dead_ends": [{"key": key, "value": value} for key, value in decision.dead_ends],
        },
    }


def show(value: Fraction) -> str:
    """A ratio in hundredths of a percent, rounded half to even, as text: exact input, the same text anywhere."""
    basis_points = round(value * 10000)
    sign = "-" if basis_points < 0 else "+"
    return f"{sign}{abs(basis_points) // 100}.{abs(basis_points) % 100:02d} %"
