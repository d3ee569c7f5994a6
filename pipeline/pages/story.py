"""The story of a round or a campaign in three sentences (where it stands, what was decided, by which article and
why), and of a campaign round by round."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.decision import derive, promotion
from pipeline.decision.decide import CLOSING
from pipeline.decision.family_states import UNPROVEN, StateRules
from pipeline.pages.numbers import RoundNumbers
from pipeline.pages.parts import Part
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
    further = ", from which further rounds start," if number < total and not has_ended else ""
    return (
        f"This is round {number} of {total} of the campaign {campaign}{ended}, which trains the model {model}; "
        f"its standing recipe{further} is {recipe}, and {claims}{_best(at)}."
    )


def _best(at: RoundNumbers) -> str:
    """The arm that would go out, with its board score where one was printed; empty where no round has one."""
    if at.derived.decision.winner is None:
        return ""
    name, arm = at.derived.decision.winner
    printed, reference = at.history.scores.get(name, {}).get(arm), at.history.reference_score
    on_board = f" ({printed} on the board, where the reference has {reference:.2f})" if printed and reference else ""
    return f"; the best arm so far, which would go out now, is {arm} of {name}{on_board}"


def by_round(rounds: Sequence[RoundNumbers]) -> Part:
    """What happened in each round: alarms, states that changed, what article 9 led to, what was kept, and which arm
    is ahead on dev alone."""
    part = Part(
        "What happened, round by round",
        (
            "A state says whether a family's [[dev]] score still counts ([[family state]]). A [[contrast]] and a [[control]] are "
            "arms that look into a suspicion; the old objective counts dev of every family, and the new one that of those "
            "whose state allows it.",
            "The axis arm with the most dev puzzles right is named where it is ahead of the reference adapter and the round "
            "kept another one: who goes by dev alone would look at it first.",
        ),
    )
    choice = rounds[-1].history.choice
    if choice != promotion.VALUE:
        part.lines.append(f"What is kept follows policy.choice={choice}: {promotion.CHOICES[choice]}.")
    part.parts = [Part(at.name, lines=_happened(at)) for at in rounds]
    return part


def _happened(at: RoundNumbers) -> list[str]:
    decision, raised = at.derived.decision, _raised(at)
    if decision.state != "decided":
        return [_outcome(at)]
    states = at.derived.evidence.families.items()
    told_above = {f"article 9: dev of {family} is {state.name} ({state.code})" for family, state in states}
    article_9 = [each for each in decision.reasons if each.startswith("article 9: ") and each not in told_above]
    joined = [each for each in decision.reasons if each.startswith("article 8: ")]
    return [
        *([f"Alarm: {'; '.join(raised)}."] if raised else []),
        *_changed(at),
        *article_9,
        deciding_reason(decision.reasons, decision.kept),
        *joined,
        *(["An improvement is claimed (article 7)."] if decision.claimed else []),
        *_ahead_on_dev(at),
    ]


def _changed(at: RoundNumbers) -> list[str]:
    """A sentence for each family whose state is another one than after the round before."""
    before, _ = derive.states_before(at.history, at.name)
    found = []
    for family, state in sorted(at.derived.evidence.families.items()):
        was = before[family].name if family in before else UNPROVEN
        if state.name != was:
            counted, counts = _counts(at, was), _counts(at, state.name)
            effect = "" if counts else "; its dev score does not count in the choice of an arm"
            effect = "; its dev score counts again" if counts and not counted else effect
            found.append(f"{family} was {was} and is {state.name} ({state.code}){effect}.")
    return found


def _counts(at: RoundNumbers, state: str) -> bool:
    """Whether a family's dev counts in the choice of an arm. The greedy rule goes on counting every dev score."""
    return at.history.choice != promotion.VALUE or StateRules.of(at.history.rules).permit(state, "dev_in_selection")


def _ahead_on_dev(at: RoundNumbers) -> list[str]:
    """The axis arm with the most dev items right, where the round kept another arm or none."""
    outcomes = {arm.name: at.outcome(arm.name) for arm in at.plan.arms if arm.role == "axis"}
    right = {arm: run.right("dev")[0].bit_count() for arm, run in outcomes.items() if run and run.scored("dev")}
    if not right:
        return []
    ahead = max(sorted(right), key=right.__getitem__)
    own, reference = ([at.score(arm, item_set) for item_set in ("dev", "fresh")] for arm in (ahead, "reference"))
    if ahead == at.derived.decision.kept or not own[0] or not reference[0] or own[0].value <= reference[0].value:
        return []
    words = [" and ".join(f"{100 * each.value:.1f} %" for each in of if each) for of in (own, reference)]
    return [
        f"Ahead on dev is {_named(at, ahead)}, with {words[0]} right on dev and fresh, where the reference adapter has {words[1]}."
    ]


def _named(at: RoundNumbers, arm: str) -> str:
    """An arm with the setting that it moves, or with its role where it moves none."""
    found = next(each for each in at.plan.arms if each.name == arm)
    moves = found.role in ("axis", "contrast")
    return f"{arm} ({'='.join(found.overrides[-1]) if moves else found.role})"


def _decided(at: RoundNumbers) -> str:
    if at.derived.decision.state not in CLOSING or at.derived.decision.state == "closed":
        return _outcome(at)
    return f"{_outcome(at)[:-1]}{_alarms(at)}."


def _outcome(at: RoundNumbers) -> str:
    """What the round kept, or why it decided nothing, as a sentence."""
    decision = at.derived.decision
    scored = sum(run.scored("fresh") for run in at.derived.evidence.outcomes if run.arm != "reference")
    if decision.state not in CLOSING:
        return f"Nothing is decided yet: {scored} of {len(at.plan.arms)} arms have a score, and the round stays open."
    if decision.state == "closed":
        return (
            f"A person closed the round with {scored} of {len(at.plan.arms)} arms scored, nothing was decided, and "
            "the policy stays as it was."
        )
    if decision.kept:
        how = said.how_kept(at.history.choice, is_last=int(at.name[1:]) >= at.history.num_rounds)
        return f"Of {scored} arms with a score, {_named(at, decision.kept)} {how}{_reached(at, decision.kept)}."
    return f"Of {scored} arms with a score, none is kept."


def _reached(at: RoundNumbers, arm: str) -> str:
    """What an arm has on fresh items beside the reference; empty where either has no score."""
    own, reference = at.score(arm, "fresh"), at.score("reference", "fresh")
    if own is None or reference is None:
        return ""
    return f", with {100 * own.value:.1f} % of the fresh puzzles right where the reference adapter has {100 * reference.value:.1f} %"


def _raised(at: RoundNumbers) -> list[str]:
    """A clause for each alarm of the round's tests."""
    look = at.derived.evidence.look
    if look is None:
        return []
    verdict = look.verdict
    found = [f"dev of {family} runs ahead of fresh" for family in sorted({test.family for test in verdict.gap_alarms})]
    found += [
        f"{_named(at, test.arm)} runs further ahead on dev of {test.family} than the other arms do"
        for test in verdict.arm_alarms
        if test.arm
    ]
    if verdict.board_alarm:
        found.append(
            f"gains of {verdict.named} do not arrive on the board"
            if verdict.named
            else "gains do not arrive on the board"
        )
    if verdict.leak_alarm:
        found.append("the board runs ahead of fresh items and is no target any more")
    return found


def _alarms(at: RoundNumbers) -> str:
    if at.derived.evidence.look is None:
        return ", and the tests of the proxy could not run"
    found = _raised(at)
    words = f", and the tests raise the alarm: {_listed(found)}" if found else ", and no test raises an alarm"
    states = at.derived.evidence.families
    closed = [f"{family} ({_since(at, family)})" for family in sorted(states) if not _counts(at, states[family].name)]
    return f"{words}; dev scores of {_listed(closed)} do not count any more" if closed else words


def _since(at: RoundNumbers, family: str) -> str:
    """A family's state, and since which round it has it where that is an earlier one."""
    state, since = at.derived.evidence.families[family].name, at.name
    for name in sorted(at.history.decisions, reverse=True):
        known = at.history.decisions[name]["families"].get(family)
        if name >= at.name:
            continue
        if known is None or known["name"] != state:
            break
        since = name
    return state if since == at.name else f"{state} since {since}"


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
