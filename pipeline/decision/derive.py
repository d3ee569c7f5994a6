"""The sealed log in, the next decision out: what the meta stage writes and what an audit derives again, by the same lines. Pure.

Only records count: what a file says, when something happened and on which machine is nowhere in them. The same log up to the same
record gives the same evidence, decision and overrides anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.campaign import constitution
from pipeline.campaign.errors import IntegrityError, NotFound, Refused
from pipeline.campaign.records import Decision, FamilyState, Policy
from pipeline.decision import assess, decide, policy_update
from pipeline.decision.evidence import Evidence, of_one_round
from pipeline.decision.family_states import EXTERNAL_CLEAR, StateRules
from pipeline.decision.history import CHOSEN, FINALISTS, REFERENCE, History, Reader, Record, read_history


@dataclass(frozen=True)
class Derived:
    """What follows from a log for one round. `overrides` is None below the quorum, and after the last budgeted round."""

    evidence: Evidence
    decision: Decision
    overrides: dict[str, Any] | None


def derive(records: Sequence[Record], round_name: str) -> Derived:
    """Evidence, decision and overrides of a round from the log so far. Raises NotFound for a round that was not planned, IntegrityError."""
    return derive_round(read_history(records), round_name)


def derive_round(history: History, round_name: str) -> Derived:
    """`derive`, of a log that was read."""
    if round_name not in history.plans:
        raise NotFound(f"round {round_name} has no plan in the log", f"Planned: {', '.join(sorted(history.plans))}")
    plan, rules = history.plans[round_name], history.rules
    seen = evidence_of(history, round_name)
    decision = decide.decide(seen, {arm.name: arm for arm in plan.arms}, plan.policy, rules)
    if decision.state == "undecided" and round_name in history.by_hand:
        decision = decide.by_hand(decision, plan.policy)
    return Derived(seen, decision, next_overrides(decision, rules))


def next_overrides(decision: Decision, rules: constitution.Constitution) -> dict[str, Any] | None:
    number = int(decision.round[1:])
    if decision.state not in decide.CLOSING or number >= rules.num_rounds:
        return None
    return policy_update.overrides(decision, f"r{number + 1:04d}", rules)


def evidence_of(history: History, round_name: str) -> Evidence:
    """Evidence of a round: lifts, noise, the tests' look at all rounds so far, and the states that it leaves."""
    plan, target = history.plans[round_name], history.target
    rounds = [history.played(name) for name in sorted(history.plans) if "r0000" < name <= round_name]
    played = rounds[-1]
    found = of_one_round(round_name, played.reference, played.outcomes, plan.arms)
    before, external = states_before(history, round_name)
    seen = assess.assess(rounds, before, external, dict(plan.policy.repaired), target, StateRules.of(history.rules))
    board = history.board_until(round_name)
    return replace(found, board=board, look=seen.look, families=seen.families, external=seen.external)


def states_before(history: History, round_name: str) -> tuple[dict[str, FamilyState], str]:
    """As the newest decision of the last decided round left them; nothing at the start."""
    earlier = [name for name in sorted(history.decisions) if name < round_name]
    if not earlier:
        return {}, EXTERNAL_CLEAR
    decision = history.decisions[earlier[-1]]
    return {family: FamilyState(**state) for family, state in decision["families"].items()}, decision["external"]


def choose_submissions(history: History, round_name: str) -> tuple[str, ...]:
    """Arms of a round to give to the external target, in order of need; none without one, or once it is suspect itself."""
    rounds = [history.played(name) for name in sorted(history.plans) if "r0000" < name <= round_name]
    _, external = states_before(history, round_name)
    if external != EXTERNAL_CLEAR:
        return ()
    contrasts = [arm.name for arm in history.plans[round_name].arms if arm.role == "contrast"]
    return assess.submissions(rounds, history.target, contrasts)


def choose_finalists(history: History) -> tuple[tuple[str, str], ...]:
    """(round, arm) of those that the held-back submissions are for: the winner, then who comes next; none without a target or a decision."""
    if history.decided is None or not history.target.exists:
        return ()
    found = derive_round(history, history.decided)
    if found.decision.winner is None or found.evidence.look is None:
        return ()
    ranked = [found.decision.winner, *((each.round, each.arm) for each in found.evidence.look.finalists)]
    return tuple(dict.fromkeys(ranked))[: int(history.rules.articles["4"]["submissions_held_back"])]


def digest_of(history: History, round_name: str, arm: str) -> str:
    """Digest of the adapter that an arm of a round was scored with (of the reference: in any round); empty without one."""
    outcome = history.outcomes.get((round_name, arm))
    return outcome.adapter_digest if outcome and outcome.status == "completed" else ""


def check_submissions(records: Sequence[Record]) -> int:
    """Replay what was chosen to be submitted on the records before it; returns how many submissions there are. For an audit.

    Raises IntegrityError naming the first choice that does not follow from the log, and the first submission that nobody chose or that
    is of another adapter than the arm's outcome.
    """
    reader, count = Reader(), 0
    for record in records:
        if record["event"] == CHOSEN:
            _check_choice(record, choose_submissions(reader.history, record["round"]))
        elif record["event"] == FINALISTS:
            expected = [list(each) for each in choose_finalists(reader.history)]
            if record["finalists"] != expected:
                raise IntegrityError(f"the finalists do not follow from the log: {record['finalists']}, not {expected}")
        elif record["event"] == "submission":
            _check_reserved(record, reader.history)
            count += 1
        reader.take([record])
    return count


def _check_choice(record: Record, expected: tuple[str, ...]) -> None:
    if tuple(record["arms"]) != expected:
        raise IntegrityError(f"the arms to submit of {record['round']} do not follow from the log: {record['arms']}")


def _check_reserved(record: Record, history: History) -> None:
    name, arm = record["round"], record["arm"]
    chosen = {
        "reference": arm == REFERENCE,
        "slot": arm in history.chosen.get(name, ()),
        "finalist": (name, arm) in history.finalists,
    }
    digest = digest_of(history, name, arm)
    if not (chosen.get(record["purpose"]) and digest and record["adapter_digest"] == digest):
        raise IntegrityError(f"submission {record['number']} ({name}/{arm}, {record['purpose']}) was not chosen")


def check_policy(records: Sequence[Record], round_name: str, policy: Policy) -> None:
    """Refuse, by article 8, to plan a round with another policy than the last decision wrote; its axes are a person's choice."""
    decisions = {r["round"]: r["decision"] for r in records if r["event"] == "decision" and r["round"] < round_name}
    earlier = sorted(decisions)
    if not earlier:
        return  # what a campaign begins with is its own choice
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
