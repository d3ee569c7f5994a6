"""The text page of a decision: the scores, what the tests say, which article decided, what was refused, and what would have changed the decision.

It is a list of sections, which `document` lays out as text and `pages` as HTML. Nothing that a decision rests on is computed here: the
floats are for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.layout import Round
from pipeline.campaign.records import Plan, Policy
from pipeline.claims import wording
from pipeline.claims.assess_claims import CONFIRMATIONS, FINAL_ROUND
from pipeline.config import decoding, settings
from pipeline.config.settings import Settings
from pipeline.decision import board_submissions, derive, promotion
from pipeline.decision.derive import Derived
from pipeline.decision.evidence import Evidence
from pipeline.decision.history import History, read_history
from pipeline.reporting import agents, counterfactual, forecast_check, said, tables
from pipeline.reporting.document import Section
from pipeline.stats.lifts import show


def of_log(
    records: Sequence[Mapping[str, Any]], round_name: str, model: str, targets: Sequence[Sequence[str]] = (),
    folder: Round | None = None, chosen: Settings | None = None,
) -> list[Section]:  # fmt: skip
    """The page of a round, from the log alone: the last decision as things were known then, and its submissions as they are now.

    `model` is the model's name, for article 13. `targets` is the table of the LoRA targets, which the log does not have
    (`tables.of_targets`). folder, chosen: the round's, for why its agents ended and what they might use.
    Raises NotFound and IntegrityError as `derive.derive` does.
    """
    before = said.known_at_decision(records, round_name)
    derived = derive.derive(before, round_name)
    history = read_history(records)
    of_round = [record for record in records if record.get("round") == round_name]
    refusals = [record for record in of_round if record["event"] in ("refusal", "submission_refused")]
    proposals = [record for record in of_round if record["event"] == "proposal"]
    page = sections(
        history.plans[round_name], derived, refusals, history.rules, model, history.num_rounds, history.choice
    )
    page[0].lines += _earlier_claims(history, round_name)
    if any(record["event"] == "plan" and record["round"] > round_name for record in before):
        page[-1].lines.insert(
            0,
            "The next round was planned before this decision, from an earlier decision of this round, and its plan stays the same.",
        )
    page.insert(
        1, Section("Plan of the round", _planned(history, round_name, proposals), [list(row) for row in targets])
    )
    is_decided, open_keys = derived.decision.state == "decided", history.rules.open_keys
    if of_agents := agents.section(records, round_name, folder, chosen, is_decided, open_keys):
        page.insert(3, of_agents)
    sent = tables.of_submissions(board_submissions.submissions_in(records), history, round_name)
    at = next(number for number, section in enumerate(page) if section.title == "Reasons by article")
    page.insert(
        at, Section("Scores of the external target", _target(history, round_name), sent if len(sent) > 1 else [])
    )
    return page


def sections(
    plan: Plan, derived: Derived, refusals: Sequence[Mapping[str, Any]], rules: Constitution, model: str, num_rounds: int,
    choice: str = promotion.VALUE,
) -> list[Section]:  # fmt: skip
    """The sections that follow from the decision alone. `num_rounds` and `choice` are what the campaign froze.

    `refusals` has the refusals of this round in the log.
    """
    evidence, decision = derived.evidence, derived.decision
    arms = {arm.name: arm for arm in plan.arms}
    fence = (
        [
            f"Article 13: no human baseline exists at the scale of {model}, so this is evidence about the machinery, not about capability."
        ]
        if rules.is_fenced(model)
        else []
    )
    is_last = plan.round == f"r{num_rounds:04d}"
    head = [
        f"{plan.round} is {decision.state}; " + _kept(decision.kept, choice, is_last),
        *fence,
        *_said(evidence, rules, is_last, said.why_nothing(decision)),
    ]
    if decision.winner:
        head.append(f"The best arm so far is {decision.winner[1]} of {decision.winner[0]}.")
    if decision.ladder:
        head.append(f"The board score that proposers may know is {decision.ladder} (accuracy from 0 to 1).")
    return [
        Section(f"Decision of {plan.round}", head),
        Section(
            "Scores of the arms",
            [tables.VALUE] if evidence.look else [],
            table=tables.of_arms(evidence, arms),
        ),
        Section("Results of the tests", _tests(evidence), tables.of_families(evidence)),
        Section("Reasons by article", list(decision.reasons)),
        Section("Refusals and arms without a score", _refused(evidence, refusals) or ["There are none."]),
        Section(
            "What would have changed the decision",
            counterfactual.of_choice(derived, arms, rules, choice)
            + counterfactual.of_arms_and_families(derived, arms, plan, rules, choice),
        ),
        Section("Policy of the next round", _next(derived)),
    ]


def _planned(history: History, round_name: str, proposals: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the round before decided for this round, and how many proposals passed."""
    plan = history.plans[round_name]
    earlier = [name for name in sorted(history.decisions) if name < round_name]
    policy = plan.policy
    origin = f"decided by {earlier[-1]}" if earlier else "with which the campaign began"
    lines = [f"The standing recipe, {origin}: {_settings(policy.standing) or 'the reference'}."]
    if history.choice != promotion.VALUE:
        lines.append(f"What is kept follows policy.choice={history.choice}: {promotion.CHOICES[history.choice]}.")
    axes = [arm.axis or "" for arm in plan.arms if arm.role == "axis"]
    number, num_rounds = int(round_name[1:]), history.num_rounds
    lines.append(
        f"An improvement is confirmed by {history.confirmation}: {CONFIRMATIONS[history.confirmation]}. Error rates are for a campaign of "
        f"{num_rounds} round{'' if num_rounds == 1 else 's'}; this is round {number}."
    )
    if history.confirmation == FINAL_ROUND and number == num_rounds and not policy.standing:
        lines.append(
            "No earlier round kept anything, so there is no standing recipe to confirm, and this last round moves axes as any other."
        )
    lines.append(f"Axes that this round moves: {', '.join(axes)}." if axes else "This round moves no axis.")
    others = {
        "Retired axes": ", ".join(policy.retired),
        "Dead ends, shown to be worse and never tried again": _settings(policy.dead_ends),
        "Set aside after one run, which only a proposal may try again": _settings(policy.set_aside),
        "Replicates bought": str(policy.replicates or ""),
        "Contrasts": _contrasts(policy),
        "Control": "" if policy.control is None else _settings(policy.control) or "the reference",
    }
    lines += [f"{name}: {value}." for name, value in others.items() if value]
    for record in proposals:
        accepted = [verdict for verdict in record["verdicts"] if verdict["accepted"]]
        lines.append(
            f"The proposer {record['policy']} was asked (mode {record['mode']}). The gate accepted {len(accepted)} of {len(record['verdicts'])} "
            f"proposals."
        )
    return lines


def _kept(arm: str | None, choice: str, is_last: bool) -> str:
    return "nothing is kept" if arm is None else f"{arm} {said.how_kept(choice, is_last=is_last)}"


def _said(evidence: Evidence, rules: Constitution, is_last: bool, why_nothing: str) -> list[str]:
    """What is claimed of the recipes that the search stood on, and which arms are shown to be worse, each with its error rate.

    why_nothing: `said.why_nothing`; then nothing is said of any recipe.
    """
    if why_nothing:
        return [f"No improvement is claimed, and nothing is set aside or shown to be worse, because {why_nothing}."]
    claims = evidence.claims
    lines = [wording.of_improvement(claims, is_last), wording.of_worse_standing(claims, rules.crash_allowance)]
    if claims.shown_worse:
        lines.append(
            f"shown to be worse: {', '.join(claims.shown_worse)} ({wording.false_worse(rules.crash_allowance)})"
        )
    return [f"{line[0].upper()}{line[1:]}." for line in lines if line]


def _earlier_claims(history: History, round_name: str) -> list[str]:
    """Which earlier rounds claimed an improvement. A later round that does not claim one takes nothing back."""
    names = [name for name, each in sorted(history.decisions.items()) if name < round_name and each["claimed"]]
    if not names:
        return []
    return [f"An improvement was claimed in {', '.join(names)}; that stands, whatever later rounds claim."]


def _settings(settings: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings)


def _contrasts(policy: Policy) -> str:
    return ", ".join(f"half of {contrast.key}" for contrast in policy.contrasts)


def _target(history: History, round_name: str) -> list[str]:
    """Which arms were chosen to be submitted, and why."""
    if not history.target.exists:
        return [
            "The campaign has no external target, so nobody can know whether fresh items still mean what a target means."
        ]
    chosen = history.chosen.get(round_name)
    if chosen is None:
        return ["The log has no record that arms of this round were chosen for submission."]
    lines = [
        f"Arms chosen for submission: {', '.join(chosen)}. First comes the arm ahead on dev, then contrasts, then the arms whose scores "
        "reveal most about the families."
        if chosen
        else "Nothing is submitted any more, because the board itself is suspect (article 9)."
    ]
    if history.finalists and history.decided == round_name:
        lines.append(
            "Finalists, which are submitted once more: "
            + ", ".join(f"{arm} of {name}" for name, arm in history.finalists)
            + "."
        )
    return lines


def _tests(evidence: Evidence) -> list[str]:
    if evidence.look is None:
        return ["The tests did not run, because the reference has no score or too few arms have one."]
    verdict = evidence.look.verdict
    board = "an alarm" if verdict.board_alarm else "a suspicion" if verdict.board_suspect else "no alarm"
    leak = "an alarm" if verdict.leak_alarm else "no alarm"
    lines = [f"The tests use the rounds {', '.join(evidence.look.rounds)}."]
    lines += [
        f"Gap alarm: in {test.family}, dev runs ahead of fresh by {show(test.gap)} since {test.since}."
        for test in verdict.gap_alarms
    ]
    lines += [
        f"Arm alarm: in {test.family}, {test.arm} runs {show(test.gap)} further ahead on dev than on fresh than the other arms do."
        for test in verdict.arm_alarms
    ]
    if any(evidence.board.values()):
        lines.append(f"The board test raises {board} (E = {float(verdict.e_value):.2f}). The leak test raises {leak}.")
        if verdict.board_near:
            lines.append("E is within a millionth of its critical value, which counts as no alarm.")
    else:
        lines.append(
            "There are no board scores, so nobody can know whether fresh items still mean what the target means."
        )
    return lines


def _refused(evidence: Evidence, refusals: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"article {record['article']} ({record['code']}): {record['what']}" for record in refusals]
    lines += [
        f"{run.arm} has no score: {run.status}, {run.exit_class}"
        for run in evidence.outcomes
        if not run.scored("fresh")
    ]
    return lines


def _next(derived: Derived) -> list[str]:
    policy = derived.decision.policy
    if derived.overrides is None:
        return ["No round follows, because this round is undecided or was the last of the campaign."]
    parts = {
        "standing recipe": _settings(policy.standing) or "the reference",
        "dead ends, shown to be worse": _settings(policy.dead_ends),
        "set aside after one run": _settings(policy.set_aside),
        "retired axes": ", ".join(policy.retired),
        "replicates bought": str(policy.replicates or ""),
        "contrasts": _contrasts(policy),
        "control": "" if policy.control is None else _settings(policy.control) or "the reference",
        "new dev items": ", ".join(f"{family} from {name} on" for family, name in policy.repaired),
    }
    return [f"{name}: {value}" for name, value in parts.items() if value]


def of_round(records: Sequence[Mapping[str, Any]], folder: Round) -> list[Section]:
    """The page of a frozen round: `of_log` with what its configuration adds. Raises as `of_log`."""
    chosen, facts = settings.load(folder.config), records[0]["facts"]
    page = of_log(records, folder.name, chosen.model.name, tables.of_targets(chosen), folder, chosen)
    took = forecast_check.section(folder, chosen)
    took.lines[:0] = [f"{line[0].upper()}{line[1:]}." for line in decoding.in_words(chosen, facts["settled"])]
    return [*page, took]
