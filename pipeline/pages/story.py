"""The story of a round or a campaign in three sentences: where it stands, what was decided, and by which article
and why."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.decision import promotion
from pipeline.decision.decide import CLOSING
from pipeline.decision.family_states import StateRules
from pipeline.pages.numbers import RoundNumbers
from pipeline.reporting import said


def of_round(at: RoundNumbers, campaign: str, model: str, *, has_ended: bool = False) -> list[str]:
    """Three sentences about a round, the newest of its campaign where the campaign is told of."""
    return [_stands(at, campaign, model, has_ended), _decided(at), _why(at)]


def _stands(at: RoundNumbers, campaign: str, model: str, has_ended: bool) -> str:
    decision, total = at.derived.decision, at.history.num_rounds
    standing = ", ".join("=".join(each) for each in decision.policy.standing)
    recipe = f"the reference recipe with {standing}" if standing else "the reference recipe as it was"
    claimed = sorted(name for name, each in at.history.decisions.items() if each["claimed"])
    if decision.claimed and at.name not in claimed:
        claimed.append(at.name)
    claims = f"an improvement is claimed in {_listed(claimed)}" if claimed else "no improvement is claimed so far"
    ended = ", which has ended" if has_ended else ""
    number = int(at.name[1:])
    return (
        f"This is round {number} of {total} of the campaign {campaign}{ended}, which trains the model {model}; "
        "its standing recipe, from which "
        f"further rounds start, is {recipe}, and {claims}."
    )


def _decided(at: RoundNumbers) -> str:
    decision = at.derived.decision
    scored = sum(run.scored("fresh") for run in at.derived.evidence.outcomes if run.arm != "reference")
    alarms = _alarms(at)
    if decision.state not in CLOSING:
        return f"Nothing is decided yet: {scored} of {len(at.plan.arms)} arms have a score, and the round stays open."
    if decision.state == "closed":
        return (
            f"A person closed the round with {scored} of {len(at.plan.arms)} arms scored, nothing was decided, and "
            "the policy stays as it was."
        )
    if decision.kept:
        arm = next(each for each in at.plan.arms if each.name == decision.kept)
        is_last = int(at.name[1:]) >= at.history.num_rounds
        how = said.how_kept(at.history.choice, is_last=is_last)
        return f"Of {scored} arms with a score, {decision.kept} ({'='.join(arm.overrides[-1])}) {how}{_reached(at, decision.kept)}{alarms}."
    return f"Of {scored} arms with a score, none is kept{alarms}."


def _reached(at: RoundNumbers, arm: str) -> str:
    """What an arm has on fresh items beside the reference; empty where either has no score."""
    own, reference = at.score(arm, "fresh"), at.score("reference", "fresh")
    if own is None or reference is None:
        return ""
    return f", with {100 * own.value:.1f} % of the fresh puzzles right where the reference adapter has {100 * reference.value:.1f} %"


def _alarms(at: RoundNumbers) -> str:
    look = at.derived.evidence.look
    if look is None:
        return ", and the tests of the proxy could not run"
    verdict = look.verdict
    found = [f"dev of {family} runs ahead of fresh" for family in sorted({test.family for test in verdict.gap_alarms})]
    found += [f"{test.arm} learned dev items of {test.family}" for test in verdict.arm_alarms]
    if verdict.board_alarm:
        found.append(
            f"gains of {verdict.named} do not arrive on the board"
            if verdict.named
            else "gains do not arrive on the board"
        )
    if verdict.leak_alarm:
        found.append("the board runs ahead of fresh items and is no target any more")
    words = f", and the tests raise the alarm: {_listed(found)}" if found else ", and no test raises an alarm"
    rules = StateRules.of(at.history.rules)
    states = at.derived.evidence.families
    closed = sorted(family for family, state in states.items() if not rules.permit(state.name, "dev_in_selection"))
    if not closed or at.history.choice != promotion.VALUE:  # the greedy rule goes on counting every dev score
        return words
    return f"{words}; dev scores of {_listed([f'{family} ({states[family].name})' for family in closed])} do not count any more"


def _why(at: RoundNumbers) -> str:
    """The sealed reason that decided, in its own words."""
    decision = at.derived.decision
    reason = deciding_reason(decision.reasons, decision.kept)
    article, _, text = reason.partition(": ")
    how = "decided it" if decision.state == "decided" else "is the reason"
    return f"{article[0].upper()}{article[1:]} {how}: {text}."


def deciding_reason(reasons: Sequence[str], kept: str | None) -> str:
    """The reason that says why an arm is kept, or why nothing is. An undecided round has one reason alone, or
    that and a person's."""
    starts = [f"article 7: {kept} is worth most", f"article 7: {kept} is ahead"]
    if kept is None:
        starts = ["article 7: no axis is", "article 7: the round moves no axis"]
    return next((reason for reason in reasons if reason.startswith(tuple(starts))), reasons[0])


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
