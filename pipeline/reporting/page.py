"""One page a decision: what was seen, which article decided, what was refused and why, what would have changed it.

The sections are data; `pipeline.sheet` lays them out. Nothing is computed here that the decision rests on: floats
are for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Round
from pipeline.campaign.log import Log
from pipeline.campaign.records import Arm, Outcome, Plan
from pipeline.config import settings
from pipeline.decision import board_submissions, derive
from pipeline.decision.derive import Derived
from pipeline.decision.evidence import Evidence
from pipeline.decision.history import History, read_history
from pipeline.reporting import counterfactual, document, figures
from pipeline.reporting.document import Section, Table
from pipeline.stats.lifts import accuracy, show, signed

WORDS = 60  # letters of a client's own words that a page has room for


def of_log(records: Sequence[Mapping[str, Any]], round_name: str, model: str) -> list[Section]:
    """The page of a round, from the log alone: as things were known when it was last decided, and what became of its submissions since.

    Raises as `referee.derive`.
    """
    decided = [n for n, each in enumerate(records) if (each["event"], each.get("round")) == ("decision", round_name)]
    before = records[: decided[-1]] if decided else records
    derived = derive.derive(before, round_name)
    history = read_history(records)
    states = [
        (name, {family: state["name"] for family, state in history.decisions[name]["families"].items()})
        for name in sorted(history.decisions)
        if name <= round_name
    ]
    mine = [each for each in records if each.get("round") == round_name]
    refusals = [each for each in mine if each["event"] in ("refusal", "submission_refused")]
    proposals = [each for each in mine if each["event"] == "proposal"]
    page = sections(history.plans[round_name], derived, states, refusals, history.rules, model)
    if any(one["event"] == "plan" and one["round"] > round_name for one in before):
        page[-1].lines.insert(
            0, "The next round was planned before this, by an earlier decision of this round, and stays as it is."
        )
    page.insert(1, Section("What it was planned with", _planned(history, round_name, proposals)))
    sent = _sent(board_submissions.submissions_in(records), history, round_name)
    page.insert(
        4, Section("What the external target said", _target(history, round_name), sent if len(sent) > 1 else [])
    )
    return page


def sections(
    plan: Plan, derived: Derived, states: Sequence[tuple[str, Mapping[str, str]]], refusals: Sequence[Mapping[str, Any]],
    rules: Constitution, model: str,
) -> list[Section]:  # fmt: skip
    """What follows from one decision. states: (round, family -> state) of all rounds so far; refusals: the log's records of this round."""
    seen, decision = derived.evidence, derived.decision
    arms = {arm.name: arm for arm in plan.arms}
    fence = (
        [
            f"Article 13: no human baseline exists at the scale of {model}: this is evidence about the machinery, not of capability."
        ]
        if rules.is_fenced(model)
        else []
    )
    head = [
        f"{plan.round} is {decision.state}; " + (f"{decision.kept} is kept" if decision.kept else "nothing is kept"),
        *fence,
    ]
    if decision.winner:
        head.append(f"Best so far: {decision.winner[1]} of {decision.winner[0]}")
    if decision.ladder:
        head.append(f"Board score that may be told: {decision.ladder}")
    return [
        Section(f"Decision of {plan.round}", head),
        Section(
            "What was seen",
            table=_arms_table(seen, arms),
            svg=[figures.strip(_points(seen)), figures.gaps(_gaps(seen))],
        ),
        Section("What the tests said", _tests(seen), _families_table(seen), [figures.timeline(states)]),
        Section("Which article decided", list(decision.reasons)),
        Section("What was refused", _refused(seen, refusals) or ["nothing"]),
        Section(
            "What would have changed the decision",
            counterfactual.of_choice(derived, arms, rules)
            + counterfactual.of_arms_and_families(seen, arms, plan, rules),
        ),
        Section("What the next round gets", _next(derived)),
    ]


def _planned(history: History, round_name: str, proposals: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of this round followed from the round before."""
    plan = history.plans[round_name]
    earlier = [name for name in sorted(history.decisions) if name < round_name]
    policy = plan.policy
    told = f"as {earlier[-1]} decided" if earlier else "as the campaign began"
    lines = [f"Standing recipe, {told}: {_settings(policy.standing) or 'the reference'}."]
    axes = [arm.axis or "" for arm in plan.arms if arm.role == "axis"]
    lines.append(f"Axes that moved from it: {', '.join(axes)}." if axes else "No axis moved.")
    out = {
        "Retired": ", ".join(policy.retired),
        "Dead ends, not tried again": _settings(policy.dead_ends),
        "Replicates bought": str(policy.replicates or ""),
        "Contrasts": ", ".join(f"half of {each.key}" for each in policy.contrasts),
        "Control": "" if policy.control is None else _settings(policy.control) or "the reference",
    }
    lines += [f"{name}: {value}." for name, value in out.items() if value]
    for each in proposals:
        accepted = [verdict for verdict in each["verdicts"] if verdict["accepted"]]
        lines.append(
            f"{each['policy']} ({each['mode']}) was asked: {len(accepted)} of {len(each['verdicts'])} proposals pass."
        )
    return lines


def _settings(settings: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings)


def _target(history: History, round_name: str) -> list[str]:
    if not history.target.exists:
        return ["There is none: whether fresh items still mean what a target means cannot be known."]
    chosen = history.chosen.get(round_name)
    if chosen is None:
        return ["Nothing was chosen to be scored: the round was not decided by its arms."]
    lines = [
        f"Chosen to be scored: {', '.join(chosen)}; first who is ahead on dev, then contrasts, then who tells most about the families' slopes."
        if chosen
        else "Nothing is sent any more: the board is suspect itself (article 9)."
    ]
    if history.finalists and history.decided == round_name:
        lines.append(
            "Finalists, scored once more: " + ", ".join(f"{arm} of {name}" for name, arm in history.finalists) + "."
        )
    return lines


def _sent(sent: Sequence[board_submissions.Submission], history: History, round_name: str) -> Table:
    """Submissions of this round, and the finalists' at the last."""
    is_last = history.decided == round_name
    rows = [["number", "arm", "as", "day", "state", "printed"]]
    for one in sent:
        if (one.purpose == "finalist" and is_last) or (one.purpose != "finalist" and one.round == round_name):
            arm = one.arm if one.round == round_name else f"{one.arm} of {one.round}"
            rows.append([str(one.number), arm, one.purpose, one.day, one.state, one.printed or _short(one.why)])
    return rows


def _short(why: str) -> str:
    """Of a client's words the first; `board status` has them all."""
    return why if len(why) <= WORDS else f"{why[:WORDS].rstrip()} ..."


def _arms_table(seen: Evidence, arms: Mapping[str, Arm]) -> Table:
    board, values = seen.board.get(seen.round, {}), seen.look.values if seen.look else {}
    rows = [["arm", "role", "moved", "dev %", "fresh %", "fresh lift in points (95 %)", "board", "value"]]
    for run in seen.outcomes:
        arm = arms.get(run.arm)
        lift = seen.lift(run.arm, "reference", "fresh")
        moved = ", ".join(f"{key}={value}" for key, value in arm.overrides[-1:]) if arm and not arm.replicate_of else ""
        rows.append([
            run.arm, run.role, moved or (arm.replicate_of or "" if arm else ""), _percent(run, "dev"), _percent(run, "fresh"),
            interval(lift.mean, lift.variance + 2 * seen.seed_variance) if lift else run.exit_class if run.status != "completed" else "",
            board.get(run.arm, ""), f"{float(values[run.arm]):+.4f}" if run.arm in values else "",
        ])  # fmt: skip
    return rows


def _families_table(seen: Evidence) -> Table:
    if seen.look is None:
        return []
    gaps, bounds, power = _gaps(seen), seen.look.verdict.upper_bounds, seen.look.power.gap_now
    rows = [["family", "state", "by", "dev - fresh, points", "at most (95 %)", "seen with 80 % from", "canaries"]]
    for family, state in sorted(seen.families.items()):
        dev, fresh = gaps[family]
        rows.append([
            family, state.name, state.code, f"{100 * (dev - fresh):+.1f}", f"{100 * float(bounds[family]):+.1f}",
            f"{100 * float(power[family]):.1f}", ", ".join(seen.look.canaries[family]) or "-",
        ])  # fmt: skip
    return rows


def _tests(seen: Evidence) -> list[str]:
    if seen.look is None:
        return ["Too few arms, or no reference: nothing was looked at."]
    verdict = seen.look.verdict
    said = "alarm" if verdict.board_alarm else "suspicion" if verdict.board_suspect else "no alarm"
    lines = [f"Rounds looked at together: {', '.join(seen.look.rounds)}."]
    lines += [f"Gap alarm: {test.family} since {test.since}, {show(test.gap)}" for test in verdict.gap_alarms]
    lines += [f"Arm alarm: {test.arm} in {test.family}, {show(test.gap)}" for test in verdict.arm_alarms]
    if any(seen.board.values()):
        lines.append(
            f"Board test: E = {float(verdict.e_value):.2f}, {said}; leak test: {'alarm' if verdict.leak_alarm else 'no alarm'}."
        )
        if verdict.board_near:
            lines.append("E is within a millionth of its critical value: counted as no alarm.")
    else:
        lines.append("No board scores: whether fresh items still mean what the target means cannot be known.")
    return lines


def _refused(seen: Evidence, refusals: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"article {each['article']} ({each['code']}): {each['what']}" for each in refusals]
    lines += [
        f"{run.arm} has no score: {run.status}, {run.exit_class}" for run in seen.outcomes if not run.scored("fresh")
    ]
    return lines


def _next(derived: Derived) -> list[str]:
    policy = derived.decision.policy
    if derived.overrides is None:
        return ["No round follows: the budget is spent, or nothing is decided."]
    shown = {
        "standing recipe": ", ".join(f"{key}={value}" for key, value in policy.standing) or "the reference",
        "dead ends": ", ".join(f"{key}={value}" for key, value in policy.dead_ends),
        "retired axes": ", ".join(policy.retired),
        "replicates bought": str(policy.replicates or ""),
        "contrasts": ", ".join(f"half of {each.key}" for each in policy.contrasts),
        "control": ""
        if policy.control is None
        else ", ".join(f"{k}={v}" for k, v in policy.control) or "the reference",
        "new dev items": ", ".join(f"{family} since {name}" for family, name in policy.repaired),
    }
    return [f"{name}: {value}" for name, value in shown.items() if value]


def _points(seen: Evidence) -> list[figures.Point]:
    board = {arm: float(score) for arm, score in seen.board.get(seen.round, {}).items()}
    points = []
    for run in seen.outcomes:
        dev, fresh = accuracy(run, "dev"), accuracy(run, "fresh")
        if dev is not None and fresh is not None:
            items = sum(map(len, run.outcomes["fresh"].values()))
            half = 1.96 * float(fresh * (1 - fresh) / items) ** 0.5
            points.append(figures.Point(run.arm, float(dev), float(fresh), half, board.get(run.arm)))
    return points


def _gaps(seen: Evidence) -> dict[str, tuple[float, float]]:
    """Of each family the arms' mean lift over the reference, on dev and on fresh."""
    reference, *runs = seen.outcomes
    runs = [run for run in runs if run.scored("dev") and run.scored("fresh")]
    if not runs or not (reference.scored("dev") and reference.scored("fresh")):
        return {}

    def mean(item_set: str, family: str) -> float:
        base = reference.outcomes[item_set][family]
        lifts = [run.outcomes[item_set][family].count("1") - base.count("1") for run in runs]
        return sum(lifts) / len(lifts) / len(base)

    return {family: (mean("dev", family), mean("fresh", family)) for family in sorted(reference.outcomes["dev"])}


def interval(mean: Fraction, variance: Fraction) -> str:
    half = Fraction(Decimal("1.96") * Decimal(float(variance)).sqrt())
    return f"{signed(mean)} ({signed(mean - half)} to {signed(mean + half)})"


def _percent(run: Outcome, item_set: str) -> str:
    value = accuracy(run, item_set)
    return "" if value is None else f"{100 * float(value):.1f}"


def write_page(folder: Round) -> list[str]:
    """Write `report.html` of a decided round. Nothing rests on this file, so an error of any kind costs a round no more than the line returned."""
    try:
        model = settings.load(folder.config).model.name
        write_file(folder.report, document.as_html(of_log(Log(folder.campaign.log).records(), folder.name, model)))
    except Exception as error:
        return [f"{folder.report.name} could not be written: {error!r}"]
    return []
