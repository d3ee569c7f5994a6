"""Decide a round: which axis is kept, what is learned for the search, and the next round's policy.

The axis arm with the largest shrunk value joins the standing recipe if that value exceeds its baseline's (`promotion`). An arm whose own
dev runs ahead of its fresh is never kept. Keeping an axis claims nothing: it is kept for now. An improvement is claimed of the standing
recipe as a whole, and only by the test of `claims.claim_test`. A setting that is shown to be worse becomes a dead end; one that a single
run puts below noise is set aside. Below the quorum nothing is decided. The arithmetic is exact, and nothing reads or writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.records import Arm, Decision, Policy, with_setting
from pipeline.claims import wording
from pipeline.decision import family_states, policy_update, promotion
from pipeline.decision.evidence import Evidence, Finalist
from pipeline.stats.lifts import amount, show

EXPLORES, CONFIRMS, NONE = "explores", "confirms", "none"
NO_AXIS = "article 7: the round moves no axis, so nothing is kept; the standing recipe stays"
CLOSING = ("decided", "closed")  # the states of a decision that end a round


def decide(
    evidence: Evidence,
    arms: Mapping[str, Arm],
    policy: Policy,
    constitution: Constitution,
    following_round: str = EXPLORES,
    choice: str = promotion.VALUE,
    dev_leader: tuple[str, str] | None = None,
) -> Decision:
    """Decide a round from its evidence. `arms` are the arms of its plan by name, `policy` is the policy that it was planned with.

    `following_round` says what the next round is for: it EXPLORES, it CONFIRMS the standing recipe if there is one, or there is NONE.
    `choice`: what the campaign froze (`promotion.CHOICES`). With MAX_DEV, `dev_leader` is the (round, arm) of the campaign's largest dev
    lift, or None where no arm has one. Tests then close no value and start no experiment.

    The decision's state is "undecided" below the quorum and where the baseline has no score; its policy is then the old one.
    """
    ours = [outcome for outcome in evidence.outcomes if outcome.arm in arms]
    scored = [outcome.arm for outcome in ours if outcome.scored("fresh")]
    missing = {outcome.arm: f"{outcome.status} ({outcome.exit_class})" for outcome in ours if outcome.arm not in scored}
    baseline = "standing" if policy.standing else "reference"
    if why := _undecidable(evidence, scored, missing, len(ours), baseline, constitution):
        return Decision(evidence.round, "undecided", None, policy, (why,), evidence.families, evidence.external)

    reasons = [f"article 3: {len(scored)} of {len(ours)} arms have a score"]
    reasons += [f"{arm} has no score: {why}" for arm, why in missing.items()]
    reasons += _findings(evidence)
    is_greedy = choice == promotion.MAX_DEV
    verdicts, compared = _compare(evidence, arms, scored, baseline, constitution, closes=not is_greedy)
    values = evidence.look.values if evidence.look else {}
    has_next = following_round != NONE
    if is_greedy:
        gains = promotion.ahead_on_dev(evidence, arms)
        kept = next(iter(gains), None)
        keeping = _keeping_by_dev(kept, gains, arms, baseline)
    else:
        gains = promotion.gaining(values, arms, baseline, verdicts, constitution)
        alarmed = promotion.alarmed(evidence)
        kept = promotion.best(gains, evidence, baseline, alarmed)
        keeping = _keeping(kept, gains, alarmed, arms, promotion.baseline_in_words(values, arms, baseline), has_next)
    reasons += [*compared, *keeping, *_claims(evidence, constitution, has_next)]
    below = [name for name, verdict in verdicts.items() if verdict == promotion.BELOW]
    worse = evidence.claims.shown_worse
    changed = _with_results(policy, arms, kept, *(((), ()) if is_greedy else (below, worse)))
    is_open = following_round == EXPLORES or (following_round == CONFIRMS and not changed.standing)
    following, learned = policy_update.following(
        changed, policy, evidence, arms, verdicts, gains, constitution, is_open and not is_greedy
    )
    finalists = evidence.look.finalists if evidence.look else ()
    return Decision(
        evidence.round,
        "decided",
        kept,
        following,
        (*reasons, *learned),
        evidence.families,
        evidence.external,
        dev_leader if is_greedy else winner(finalists, promotion.tie_distance(constitution)),
        ladder(evidence.board, constitution.ladder_step),
        evidence.claims.is_claimed,
    )


def _compare(
    evidence: Evidence, arms: Mapping[str, Arm], scored: Sequence[str], baseline: str, constitution: Constitution,
    *, closes: bool,
) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """Each scored axis arm's noise verdict, and the reasons that state them. An arm that an agent edited has none (article 16).

    closes: whether a setting below noise is set aside.
    """
    verdicts: dict[str, str] = {}
    reasons = []
    edited = {outcome.arm for outcome in evidence.outcomes if outcome.edited}
    for name in scored:
        lift = evidence.lift(name, baseline, "fresh")
        if name in edited and lift is not None:
            reasons.append(
                f"article 16: {name} trained edited code, {show(lift.mean)} against the {baseline} recipe on fresh items; no setting says "
                "what it did, so it is not kept as policy"
            )
        elif arms[name].role == "axis" and lift is not None:
            verdicts[name] = promotion.compare(lift, evidence.seed_variance, constitution)
            limit = promotion.limit_of(lift, evidence.seed_variance, constitution)
            key, value = arms[name].overrides[-1]
            worse, z = evidence.claims.worse_arms.get(name), str(constitution.z)
            if worse and worse.is_shown:
                result = wording.of_worse_arm(worse, baseline, constitution.crash_allowance)
            elif verdicts[name] == promotion.BELOW and closes:
                result = wording.of_set_aside(lift.mean, limit, baseline, z)
            else:
                result = wording.of_lift(lift.mean, limit, baseline, z, verdicts[name])
            reasons.append(f"article 7: {name} ({key}={value}) {result}")
    return verdicts, reasons


def _claims(evidence: Evidence, constitution: Constitution, has_next: bool) -> list[str]:
    """The reasons that say whether an improvement is claimed, and whether the standing recipe is shown to be worse."""
    claims = evidence.claims
    lines = [
        wording.of_improvement(claims, is_last=not has_next),
        wording.of_worse_standing(claims, constitution.crash_allowance),
    ]
    return [f"article 7: {line}" for line in lines if line]


def _keeping(
    kept: str | None,
    gains: Mapping[str, Fraction],
    alarmed: Mapping[str, str],
    arms: Mapping[str, Arm],
    against: str,
    has_next: bool,
) -> list[str]:
    """The reasons why an arm is kept, or none, and why others with a gain are not. `against` names the runs of the baseline."""
    reasons = [
        f"article 9: {arm} is not kept: its dev runs ahead of its fresh in {alarmed[arm]}"
        for arm in gains
        if arm in alarmed
    ]
    if not _moves_axes(arms):
        return [NO_AXIS]
    if kept is None:
        return [
            *reasons,
            f"article 7: no axis is worth more than {against}: nothing is kept; the standing recipe stays",
        ]
    key, value = arms[kept].overrides[-1]
    then = "it is kept for now" if has_next else "no round follows that could test it"
    return [
        *reasons,
        f"article 7: {kept} is worth most, {amount(gains[kept])} more than {against}; {then}, and nothing is claimed of it",
        f"article 8: {kept}'s {key}={value} joins the standing recipe{'' if has_next else ', untested'}",
    ]


def _moves_axes(arms: Mapping[str, Arm]) -> bool:
    return any(arm.role == "axis" for arm in arms.values())


def _keeping_by_dev(
    kept: str | None, gains: Mapping[str, Fraction], arms: Mapping[str, Arm], baseline: str
) -> list[str]:
    """The reasons why an arm is kept, or none, where the campaign froze policy.choice=max_dev."""
    if not _moves_axes(arms):
        return [NO_AXIS]
    if kept is None:
        return [f"article 7: no axis is ahead of the {baseline} recipe on dev: nothing is kept (policy.choice=max_dev)"]
    key, value = arms[kept].overrides[-1]
    return [
        f"article 7: {kept} is ahead of the {baseline} recipe on dev by {amount(gains[kept])}, the most; it is kept, whatever the tests say "
        f"(policy.choice=max_dev), and nothing is claimed of it",
        f"article 8: {kept}'s {key}={value} joins the standing recipe",
    ]


def _with_results(
    policy: Policy, arms: Mapping[str, Arm], kept: str | None, below: Sequence[str], worse: Sequence[str]
) -> Policy:
    """The policy with the kept setting in the standing recipe, the settings that are shown to be `worse` among the dead ends, and the
    others `below` noise set aside."""
    standing = policy.standing if kept is None else with_setting(policy.standing, arms[kept].overrides[-1])
    dead_ends = [*policy.dead_ends, *(arms[name].overrides[-1] for name in worse)]
    set_aside = [*policy.set_aside, *(arms[name].overrides[-1] for name in below)]
    return replace(
        policy,
        standing=standing,
        dead_ends=tuple(dict.fromkeys(dead_ends)),
        set_aside=tuple(setting for setting in dict.fromkeys(set_aside) if setting not in dead_ends),
    )


def _undecidable(
    evidence: Evidence,
    scored: list[str],
    missing: Mapping[str, str],
    num: int,
    baseline: str,
    constitution: Constitution,
) -> str:
    """The reason why nothing can be decided yet; an empty string where a decision is possible."""
    if len(scored) < constitution.quorum:
        what = ", ".join(f"{arm} {why}" for arm, why in missing.items())
        return f"article 3: {len(scored)} of {num} arms have a score, {constitution.quorum} are needed; missing: {what}"
    if not any(lift.baseline == baseline and lift.item_set == "fresh" for lift in evidence.lifts):
        return f"article 7: the {baseline} recipe has no score on this round's fresh items"
    return ""


def _findings(evidence: Evidence) -> list[str]:
    """The reasons that the tests give: each family that is not UNPROVEN, a suspect board, and the power where there was no alarm."""
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
            if gaps[family] <= 1
            else f"article 10: no alarm; with these items no gap in {family} would have been seen with 80 %"
        )
    return lines


def winner(finalists: tuple[Finalist, ...], distance: Fraction = Fraction(1)) -> tuple[str, str] | None:
    """The winner as (round, arm), or None without finalists. `finalists` has the best first.

    Candidates are the finalists within sqrt(`distance`) standard errors of the best. Of these, the winner has the fewest families with an
    alarm of its own, then the largest value, then the earlier round and the lower arm.
    """
    if not finalists:
        return None
    top = finalists[0]

    def ties(finalist: Finalist) -> bool:
        difference = Fraction(top.value) - Fraction(finalist.value)
        return difference**2 <= distance * (top.variance + finalist.variance)

    chosen = min(
        filter(ties, finalists), key=lambda tied: (len(tied.alarms), -Fraction(tied.value), tied.round, tied.arm)
    )
    return chosen.round, chosen.arm


def ladder(board: Mapping[str, Mapping[str, str]], step: Decimal) -> str:
    """The board score that workers and proposers may know, as decimal text; empty before the first score.

    `board` maps a round to its printed scores by arm. A new best score replaces the known one only if it is better by `step`, so that
    nobody learns the board through its answers (Blum and Hardt 1502.04585).
    """
    known = Decimal(-1)
    for _, scores in sorted(board.items()):
        best = max(map(Decimal, scores.values()), default=known)
        known = best if known < 0 or best >= known + step else known
    return "" if known < 0 else format(known, "f")


def by_hand(decision: Decision, policy: Policy) -> Decision:
    """The decision of an undecided round that a person closes. The policy stays the same, and the next round may be planned.

    policy: the round's own, in which the settings of its arms count as tried.
    """
    reasons = (*decision.reasons, "closed by hand: nothing was decided, the policy stays as it was")
    return replace(decision, state="closed", policy=policy, reasons=reasons)
