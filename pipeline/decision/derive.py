"""Derive a round's evidence, decision and overrides from the sealed log. The meta stage writes them; an audit derives them again by this code.

Only the records of the log count. They hold no time, no host and no content of other files, so the same log up to the same record gives
the same results on any machine. The functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.campaign import constitution
from pipeline.campaign.errors import IntegrityError, NotFound, Refused
from pipeline.campaign.records import Decision, FamilyState, Policy
from pipeline.claims import assess_claims, runs
from pipeline.decision import assess, decide, policy_update, promotion
from pipeline.decision.evidence import Evidence, of_one_round
from pipeline.decision.family_states import EXTERNAL_CLEAR, StateRules
from pipeline.decision.history import CHOSEN, FINALISTS, REFERENCE, History, Reader, Record, read_history
from pipeline.decision.plan import with_tried
from pipeline.stats.lifts import paired_lift


@dataclass(frozen=True)
class Derived:
    """What follows from the log for one round. `overrides` is the content of the next round's file; None where no round follows yet."""

    evidence: Evidence
    decision: Decision
    overrides: dict[str, Any] | None


def derive(records: Sequence[Record], round_name: str) -> Derived:
    """Derive a round from the records of the log so far, in order.

    Raises NotFound where the round has no plan, and IntegrityError where the records are damaged or contradict one another.
    """
    return derive_round(read_history(records), round_name)


def derive_round(history: History, round_name: str) -> Derived:
    """The same as `derive`, for a log that was already read. Raises NotFound where the round has no plan."""
    if round_name not in history.plans:
        raise NotFound(
            f"Round {round_name} has no plan in the log",
            f"Planned rounds: {', '.join(sorted(history.plans)) or 'none'}",
        )
    plan, rules = history.plans[round_name], history.rules
    evidence = evidence_of(history, round_name)
    arms = {arm.name: arm for arm in plan.arms}
    policy = with_tried(with_dead_ends(history, round_name), plan.arms)
    leader = dev_leader(history, round_name)
    decision = decide.decide(
        evidence, arms, policy, rules, following_round(history, round_name), history.choice, leader
    )
    if decision.state == "undecided" and round_name in history.by_hand:
        decision = decide.by_hand(decision, policy)
    return Derived(evidence, decision, next_overrides(decision, rules, history.num_rounds))


def with_dead_ends(history: History, round_name: str) -> Policy:
    """The policy of a round's plan, with the dead ends that earlier rounds decided since: a late arm may show one after the next plan."""
    policy = history.plans[round_name].policy
    found = [
        tuple(setting)
        for name, decision in sorted(history.decisions.items())
        if name < round_name
        for setting in decision["policy"]["dead_ends"]
    ]
    return replace(policy, dead_ends=tuple(dict.fromkeys([*policy.dead_ends, *found])))


def following_round(history: History, round_name: str) -> str:
    """What the round after this one is for: `decide.EXPLORES`, CONFIRMS or NONE."""
    left = history.num_rounds - int(round_name[1:])
    if left <= 0:
        return decide.NONE
    return decide.CONFIRMS if left == 1 and history.confirmation == assess_claims.FINAL_ROUND else decide.EXPLORES


def dev_leader(history: History, round_name: str) -> tuple[str, str] | None:
    """The (round, arm) of largest dev lift over the reference so far, where the campaign froze policy.choice=max_dev; else None.

    Ties go to the earlier round and the first arm.
    """
    if history.choice != promotion.MAX_DEV:
        return None
    lifts = {
        (at.name, run.arm): paired_lift(run, at.reference, "dev").mean
        for at in history.rounds_until(round_name)
        for run in at.outcomes
        if run.scored("dev") and at.reference.scored("dev")
    }
    return max(lifts, key=lambda arm: lifts[arm], default=None)


def next_overrides(decision: Decision, rules: constitution.Constitution, num_rounds: int) -> dict[str, Any] | None:
    """The content of the next round's override file; None while the round is undecided and after the last of the frozen rounds."""
    number = int(decision.round[1:])
    if decision.state not in decide.CLOSING or number >= num_rounds:
        return None
    return policy_update.overrides(decision, f"r{number + 1:04d}", rules)


def evidence_of(history: History, round_name: str) -> Evidence:
    """The evidence of a round: lifts, noise, the tests over all rounds so far, and the states that follow."""
    plan, target = history.plans[round_name], history.target
    rounds = history.rounds_until(round_name)
    played = rounds[-1]
    evidence = of_one_round(round_name, played.reference, played.outcomes, plan.arms)
    before, external = states_before(history, round_name)
    assessed = assess.assess(rounds, before, external, dict(plan.policy.repaired), target, StateRules.of(history.rules))
    board = history.board_until(round_name)
    unpaired = [
        int(at.name[1:])
        for at in rounds
        if not at.reference.scored("fresh") and any(run.scored("fresh") for run in at.outcomes)
    ]
    claims = assess_claims.claims_after(
        runs_of(history, rounds),
        int(round_name[1:]),
        history.num_rounds,
        history.confirmation,
        history.rules,
        unpaired,
    )
    return replace(
        evidence, board=board, look=assessed.look, families=assessed.families, external=assessed.external, claims=claims
    )


def runs_of(history: History, rounds: Sequence[assess.RoundOutcomes]) -> list[runs.Run]:
    """The runs of these rounds, in order (`claims.runs`)."""
    found = []
    for at in rounds:
        plan = history.plans[at.name]
        found += runs.of_round(int(at.name[1:]), at.reference, at.outcomes, plan.arms, plan.policy.standing)
    return found


def states_before(history: History, round_name: str) -> tuple[dict[str, FamilyState], str]:
    """The family states and the external state that the newest earlier decision left. At the start there are no family states."""
    earlier = [name for name in sorted(history.decisions) if name < round_name]
    if not earlier:
        return {}, EXTERNAL_CLEAR
    decision = history.decisions[earlier[-1]]
    return {family: FamilyState(**state) for family, state in decision["families"].items()}, decision["external"]


def choose_submissions(history: History, round_name: str) -> tuple[str, ...]:
    """The arms of a round to submit to the external target, the most important first; none without a target or once it is suspect."""
    rounds = history.rounds_until(round_name)
    _, external = states_before(history, round_name)
    if external != EXTERNAL_CLEAR:
        return ()
    contrasts = [arm.name for arm in history.plans[round_name].arms if arm.role == "contrast"]
    return assess.submissions(rounds, history.target, contrasts)


def choose_finalists(history: History) -> tuple[tuple[str, str], ...]:
    """The finalists as (round, arm), the winner first: the arms that the held-back submissions are for. None without a target or a decision."""
    if history.decided is None or not history.target.exists:
        return ()
    derived = derive_round(history, history.decided)
    if derived.decision.winner is None or derived.evidence.look is None:
        return ()
    ranked = [derived.decision.winner, *((arm.round, arm.arm) for arm in derived.evidence.look.finalists)]
    return tuple(dict.fromkeys(ranked))[: int(history.rules.articles["4"]["submissions_held_back"])]


def digest_of(history: History, round_name: str, arm: str) -> str:
    """The digest of the adapter that an arm was scored with; an empty string where the arm has no score."""
    outcome = history.outcomes.get((round_name, arm))
    return outcome.adapter_digest if outcome and outcome.status == "completed" else ""


def check_submissions(records: Sequence[Record]) -> int:
    """Derive each choice of arms to submit again from the records before it. For an audit. Returns the number of submissions.

    Raises IntegrityError, which names the first choice that does not follow from the log, or the first submission that was not chosen or
    whose adapter is not the one of the arm's outcome.
    """
    reader, count = Reader(), 0
    for record in records:
        if record["event"] == CHOSEN:
            _check_choice(record, choose_submissions(reader.history, record["round"]))
        elif record["event"] == FINALISTS:
            expected = [list(finalist) for finalist in choose_finalists(reader.history)]
            if record["finalists"] != expected:
                raise IntegrityError(
                    f"The finalists {record['finalists']} do not follow from the log, which gives {expected}"
                )
        elif record["event"] == "submission":
            _check_reserved(record, reader.history)
            count += 1
        reader.add([record])
    return count


def _check_choice(record: Record, expected: tuple[str, ...]) -> None:
    if tuple(record["arms"]) != expected:
        raise IntegrityError(
            f"The arms to submit of {record['round']}, {record['arms']}, do not follow from the log, which gives {[*expected]}"
        )


def _check_reserved(record: Record, history: History) -> None:
    name, arm = record["round"], record["arm"]
    chosen = {
        "reference": arm == REFERENCE,
        "slot": arm in history.chosen.get(name, ()),
        "finalist": (name, arm) in history.finalists,
    }
    digest = digest_of(history, name, arm)
    if not (chosen.get(record["purpose"]) and digest and record["adapter_digest"] == digest):
        raise IntegrityError(
            f"Submission {record['number']} ({name}/{arm}, {record['purpose']}) was not chosen, or its adapter is not the arm's"
        )


def check_policy(records: Sequence[Record], round_name: str, policy: Policy) -> None:
    """Check, by article 8, that a round is planned with the policy that the last decision wrote. Its axes may differ: a person chooses them.

    Raises Refused where anything else differs.
    """
    decisions = {r["round"]: r["decision"] for r in records if r["event"] == "decision" and r["round"] < round_name}
    earlier = sorted(decisions)
    if not earlier:
        return  # a campaign may begin with any policy
    written = Policy.from_json(decisions[earlier[-1]]["policy"])
    if replace(policy, axes=()) == replace(written, axes=()):
        return
    lost = [setting for setting in written.dead_ends if setting not in policy.dead_ends]
    changed = sorted(
        name
        for name, value in asdict(replace(policy, axes=())).items()
        if value != asdict(replace(written, axes=()))[name]
    )
    code, what = (
        ("dead_end_removed", f"{lost} left out") if lost else ("policy_changed", f"{', '.join(changed)} differ")
    )
    raise Refused(
        "8", code, f"{round_name} would be planned with another policy than {earlier[-1]} wrote: {what}",
        f"Restore hydra/round/{round_name}.yaml; what a person wants to change needs a new campaign",
    )  # fmt: skip
