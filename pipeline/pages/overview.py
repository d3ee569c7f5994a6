"""The parts of a page that look at all rounds so far: scores, families, states, evidence, the board, the
recipe's lineage, the power card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.decision import family_states, promotion
from pipeline.pages import figures
from pipeline.pages.numbers import Finding, RoundNumbers, Score
from pipeline.pages.parts import Part, Rows
from pipeline.reporting.document import Table

SIGNS: Mapping[str, str] = {
    family_states.UNPROVEN: "○", family_states.TRUSTED: "✓", family_states.SUSPECT: "?", family_states.OVERFIT: "✗",
    family_states.SHIFT: "✗", family_states.RESTORED: "↺", family_states.EXTERNAL_CLEAR: "○", family_states.EXTERNAL_SUSPECT: "✗",
}  # fmt: skip
"""A sign beside the word of each state, so that a change is seen without a colour."""
QUIET_CAUSES = ("unchanged", "start", "")


def with_sign(state: str) -> str:
    """A state with its sign; both stay on one line."""
    return f"{SIGNS[state]}\N{NO-BREAK SPACE}{state}"


def scores(rounds: Sequence[RoundNumbers]) -> Part:
    """The leading arm of each round and the reference, on dev, fresh and board, with intervals."""
    part = Part(
        "Scores by round",
        (
            "Each round has a mark for its [[leading arm]], which is the arm that the round [[kept]], else the one with the largest "
            "[[value]], and a square for the [[reference adapter]]. A bar is the 95 % interval for the choice of puzzles: where two "
            "bars overlap widely, chance may explain the difference.",
            "Look whether a gain on [[dev]] also shows on [[fresh]] and on the [[board]]. One that shows on dev alone does not carry "
            "over: dev puzzles were learned, or they are not like the others.",
        ),
        figures.by_round(rounds),
    )
    table: Table = [["round and arm", "dev %", "fresh %", "board %"]]
    for at in rounds:
        for arm in filter(None, (at.leader, "reference")):
            table.append([f"{at.name} {arm}", *(_words(at.score_so_far(arm, item_set)) for item_set in figures.SETS)])
    part.rows.append(
        Rows(
            "Scores of each round's leading arm and of the reference",
            table,
            "In brackets are the ends of 95 % intervals.",
        )
    )
    for at in rounds:
        part.lines += [
            f"Dev items of {family} are new from {first} on, because its dev was reversed (article 12): dev scores before "
            "and after it are of different items, the reference adapter's too."
            for family, first in at.plan.policy.repaired
            if first == at.name
        ]
    if not part.charts:
        part.missing.append("There is no chart of scores, because no arm has a score yet.")
    elif not any(at.score_so_far(at.leader, "board") for at in rounds if at.leader):
        has_target = rounds[-1].history.target.exists
        why = "the board has scored no leading arm" if has_target else "the campaign has no external target"
        part.missing.append(f"There is no chart of scores on the board, because {why}.")
    return part


def _words(score: Score | None) -> str:
    return score.words if score else "-"


def families(at: RoundNumbers, slices: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Part:
    """The mean lifts of a round's arms by family, dev against fresh. slices: family -> feature -> its ends, as the
    round's basis record has them."""
    chart = figures.families(at.gaps, at.name)
    part = Part(
        "Families on dev and on fresh",
        (
            "Each dot is a [[family]]. To the right is what the round's arms gained on [[dev]] on average, upward what they gained "
            "on [[fresh]]. On the dashed line both gains are equal. A dot below the line gained more on dev than on fresh, which is "
            "what a learned dev set looks like; a distance of a few [[points]] is chance.",
        ),
        [chart] if chart else [],
    )
    for family, limits in sorted(slices.items()):
        which = ", ".join(f"{name} from {ends['low']} to {ends['high']}" for name, ends in sorted(limits.items()))
        part.lines.append(
            f"Dev of {family} was declared as a slice of its puzzles ({which}), while fresh puzzles and the board have all of "
            "them (tasks.dev_slices, article 12)."
        )
    if not chart:
        part.missing.append(
            "There is no chart of families, because the reference or all arms lack a score on dev or fresh."
        )
    return part


def states(rounds: Sequence[RoundNumbers]) -> Part:
    """The timeline: the state of each family, and of the board, after each round."""
    names = sorted({family for at in rounds for family in at.derived.evidence.families})
    table: Table = [["family", *(at.name for at in rounds)]]
    for family in names:
        cells = []
        for at in rounds:
            state = at.derived.evidence.families.get(family)
            cause = f" ({state.code})" if state and state.code not in QUIET_CAUSES else ""
            cells.append(f"{with_sign(state.name)}{cause}" if state else "-")
        table.append([family, *cells])
    external = [at.derived.evidence.external for at in rounds]
    if rounds and rounds[-1].history.target.exists:
        table.append(["the board", *map(with_sign, external)])
    effect = "While a family is SUSPECT or REVERSED, its dev score does not count in the choice of an arm."
    if rounds and (choice := rounds[-1].history.choice) != promotion.VALUE:
        effect = f"In this campaign nothing follows from a state, because it was frozen with policy.choice={choice}."
    part = Part(
        "States of the families",
        (
            "This is what may be done with each family's dev score after each round ([[family state]]). A sign stands before each "
            f"state: ○ at the start, ✓ trusted, ? suspect, ✗ reversed, ↺ restored. In brackets is what moved it. {effect}",
        ),
    )
    if names:
        part.rows.append(Rows("States by round", table, "A row is a family, and a column the state after that round."))
    else:
        part.missing.append("There is no table of states, because no round could be tested yet.")
    return part


def evidence(rounds: Sequence[RoundNumbers]) -> Part:
    """The tests of the newest round beside their thresholds, and the strongest of each kind by round."""
    found: dict[str, Sequence[Finding]] = {at.name: at.findings() for at in rounds}
    newest = rounds[-1]
    charts = [figures.tests(found[newest.name], newest.name), figures.evidence_by_round(found)]
    part = Part(
        "Evidence against thresholds",
        (
            "Every test is shown as a share of what raises an [[alarm]]: 0 is no evidence, 1 (the red line) raises the alarm. A "
            "short upright mark on a bar is where a [[suspicion]] begins; `!` stands for an alarm and `?` for a suspicion. The "
            "share of the board test is one of logarithms, because its evidence multiplies ([[e-value]]).",
            "All thresholds were frozen before the first round, so that in at most 5 % of the campaigns in which nothing is wrong a "
            "gap or board test raises any alarm (article 10).",
        ),
        [chart for chart in charts if chart],
    )
    table: Table = [["test", "statistic", "suspicion above", "alarm above", "share", "result"]]
    table += [
        [each.words, each.statistic, each.suspect_at or "-", each.alarm_at, f"{each.size:.2f}", each.result]
        for each in found[newest.name]
    ]
    if len(table) > 1:
        how = (
            "A gap also has to be large enough to matter (2 points in a family, 1 over all) before it counts. Of the arms, each "
            "family's most striking one is shown."
        )
        part.rows.append(Rows(f"Tests of {newest.name}", table, how))
    else:
        part.missing.append("There is no chart of evidence, because the tests did not run in this round.")
    return part


def board(at: RoundNumbers) -> Part:
    """What dev and fresh predict for the submitted arms so far, and what the board printed."""
    found = at.predicted()
    chart = figures.predicted(found)
    part = Part(
        "Board scores, predicted and printed",
        (
            "Each triangle is a [[submission]]. To the right is the board score that the arm's gains on dev and fresh predict if "
            "nothing is wrong, with a 95 % interval; upward is what the board printed. Triangles that fall below the dashed line by "
            "more than their bars, round after round, are gains that do not arrive ([[shift]]); above it the board itself may have "
            "been learned ([[leak]]).",
        ),
        [chart] if chart else [],
    )
    table: Table = [["round", "arm", "predicted", "95 % interval", "printed"]]
    for each in found:
        reach = figures.INTERVAL * each.spread
        table.append(
            [
                each.round,
                each.arm,
                f"{each.predicted:.3f}",
                f"{each.predicted - reach:.3f} to {each.predicted + reach:.3f}",
                each.words,
            ]
        )
    if found:
        part.rows.append(
            Rows(
                "Submitted arms",
                table,
                "Scores are accuracies from 0 to 1. The tests use all of them together, not one by one.",
            )
        )
    elif at.history.target.exists:
        part.missing.append(
            "There is no chart of board scores, because the board has scored no arm or not the reference."
        )
    else:
        part.how = ()  # what a reader would look for in a chart that this campaign never has
        part.missing.append("There is no chart of board scores, because the campaign has no external target.")
    return part


def lineage(rounds: Sequence[RoundNumbers]) -> Part:
    """What each round kept, the standing recipe after it, and what was closed."""
    table: Table = [["round", "decision", "kept", "standing recipe after it", "claimed", "newly closed"]]
    for at in rounds:
        decision, before = at.derived.decision, at.plan.policy
        kept = next(
            (f"{arm.name}: {'='.join(arm.overrides[-1])}" for arm in at.plan.arms if arm.name == decision.kept),
            "nothing",
        )
        closed = [f"{_one(each)} is set aside" for each in decision.policy.set_aside if each not in before.set_aside]
        closed += [f"{_one(each)} is a dead end" for each in decision.policy.dead_ends if each not in before.dead_ends]
        closed += [f"axis {each} retires" for each in decision.policy.retired if each not in before.retired]
        standing = ", ".join(map(_one, decision.policy.standing)) or "the reference"
        table.append(
            [at.name, decision.state, kept, standing, "yes" if decision.claimed else "no", "; ".join(closed) or "-"]
        )
    policy = rounds[-1].derived.decision.policy
    now = {
        "Set aside after one run": ", ".join(map(_one, policy.set_aside)),
        "Dead ends, shown to be worse": ", ".join(map(_one, policy.dead_ends)),
        "Retired axes": ", ".join(policy.retired),
    }
    return Part(
        "Lineage of the recipe",
        (
            "Each round may add one setting to the [[standing recipe]], from which the next one starts. What is [[set aside]] may "
            "be tried again by a proposal; a [[dead end]] never is, and a [[retired|retired axis]] gets no further arm.",
        ),
        rows=[
            Rows(
                "What each round changed",
                table,
                "Read from top to bottom: the recipe of a row is what the next row started from.",
            )
        ],
        lines=[f"{name}: {value or 'none'}." for name, value in now.items()],
    )


def _one(setting: Sequence[str]) -> str:
    return "=".join(setting)


def power(at: RoundNumbers) -> Part:
    """The gaps that the tests would have found, and the smallest gain that a board can show."""
    part = Part(
        "What this design could have seen",
        (
            "No alarm does not mean that nothing is wrong. A gap of the size in this table would have been found with 80 % "
            "probability; a smaller one may have been missed ([[power card]], article 10).",
        ),
    )
    look = at.derived.evidence.look
    if look is None:
        part.missing.append("There is no power card, because the tests did not run in this round.")
        return part
    card = look.power
    table: Table = [["family", "gap that began in this round, points", "gap since the first round, points"]]
    table += [[family, _points(card.gap_now[family]), _points(card.gap_since_first[family])] for family in card.gap_now]
    part.rows.append(Rows("Gaps that would have been found with 80 % probability", table))
    if card.threshold_total is not None and card.threshold_family is not None:
        part.lines = [
            f"A gain on dev of {_points(card.threshold_total)} points in all families, or of "
            f"{_points(card.threshold_family)} in one of them, is the "
            "smallest that predicts a higher board score at all; board scores cannot show less."
        ]
    return part


def _points(value: object) -> str:
    size = 100 * float(value)  # type: ignore[arg-type]
    return f"{size:.1f}" if size <= 100 else "more than 100"
