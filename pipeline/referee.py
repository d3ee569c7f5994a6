"""The sealed log in, the next decision out: what the meta stage writes and what an audit derives again, by the same lines. Pure.

Only records count: what a file says, when something happened and on which machine is nowhere in them. The same log up to the same
record gives the same evidence, decision and overrides anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from pipeline import constitution, decide, evidence, look, search
from pipeline.design import CriticalValues, Design
from pipeline.errors import IntegrityError, NotFound, Refused
from pipeline.gaussian import exactly
from pipeline.records import Decision, Evidence, FamilyState, Outcome, Plan, Policy

Record = Mapping[str, Any]
REFERENCE = "reference"


@dataclass(frozen=True)
class Derived:
    """What follows from a log for one round. `overrides` is None below the quorum, and after the last budgeted round."""

    evidence: Evidence
    decision: Decision
    overrides: dict[str, Any] | None


@dataclass(frozen=True)
class Ledger:
    """A log's records by what they are about: the newest of each wins."""

    facts: Mapping[str, Any]
    plans: Mapping[str, Plan]
    outcomes: Mapping[tuple[str, str], Outcome]
    scores: Mapping[str, Mapping[str, Decimal]]
    decisions: Mapping[str, Mapping[str, Any]]

    @property
    def target(self) -> look.Target:
        printed = [score for arms in self.scores.values() for arm, score in arms.items() if arm.startswith(REFERENCE)]
        with exactly():
            mean = sum(printed, Decimal(0)) / len(printed) if printed else None
        return look.Target(Design(**self.facts["design"]), CriticalValues.from_json(self.facts["critical"]), mean)

    @property
    def rules(self) -> constitution.Constitution:
        return constitution.Constitution(self.facts["constitution_digest"], self.facts["articles"])

    def round_outcomes(self, name: str) -> Iterator[Outcome]:
        """Of every planned arm; one without a record is absent."""
        for arm in self.plans[name].arms:
            yield self.outcomes.get((name, arm.name)) or Outcome(arm.name, arm.role, "absent", "never_started")

    def played(self, name: str) -> look.Played:
        repeats = frozenset(arm.name for arm in self.plans[name].arms if arm.replicate_of == "reference")
        reference = self.outcomes.get((name, REFERENCE)) or Outcome(REFERENCE, REFERENCE, "absent", "never_started")
        scores = {arm: score for arm, score in self.scores.get(name, {}).items() if not arm.startswith(REFERENCE)}
        return look.Played(name, reference, tuple(self.round_outcomes(name)), repeats, scores)


def read(records: Sequence[Record]) -> Ledger:
    """Raises IntegrityError for a log that does not begin with what a campaign froze, or whose records are not of their form."""
    plans: dict[str, Plan] = {}
    outcomes: dict[tuple[str, str], Outcome] = {}
    decisions: dict[str, Mapping[str, Any]] = {}
    try:
        facts = records[0]["facts"]
        for record in records:
            if record["event"] == "plan":
                plans[record["round"]] = Plan.from_json(record["plan"])
            elif record["event"] == "outcome":
                outcomes[record["round"], record["arm"]] = Outcome(**record["outcome"])
            elif record["event"] == "decision":
                decisions[record["round"]] = record["decision"]
        return Ledger(facts, plans, outcomes, board_scores(records), decisions)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"the log holds no campaign of this version ({error!r})", "Restore it from a copy"
        ) from error


def board_scores(records: Sequence[Record]) -> dict[str, dict[str, Decimal]]:
    """Printed scores by round and arm; the newest of a submission counts, what was withdrawn or failed is not there."""
    submitted = {r["number"]: r for r in records if r["event"] == "submission"}
    printed = {r["number"]: r for r in records if r["event"] == "board_score"}
    found: dict[str, dict[str, Decimal]] = {}
    for number, record in sorted(printed.items()):
        if record.get("score") is None or record.get("withdrawn") or submitted[number]["purpose"] == "finalist":
            continue
        of = submitted[number]
        name = of["arm"] if of["arm"] != REFERENCE else f"{REFERENCE}-{number}"
        found.setdefault(of["round"], {})[name] = Decimal(record["score"])
    return found


def derive(records: Sequence[Record], round_name: str) -> Derived:
    """Evidence, decision and overrides of a round from the log so far. Raises NotFound for a round that was not planned, IntegrityError."""
    ledger = read(records)
    if round_name not in ledger.plans:
        raise NotFound(f"round {round_name} has no plan in the log", f"Planned: {', '.join(sorted(ledger.plans))}")
    plan, rules = ledger.plans[round_name], ledger.rules
    seen = gather(ledger, round_name)
    decision = decide.decide(seen, {arm.name: arm for arm in plan.arms}, plan.policy, rules)
    if decision.state == "undecided" and any(r["event"] == "by_hand" and r["round"] == round_name for r in records):
        decision = decide.by_hand(decision, plan.policy)
    return Derived(seen, decision, next_overrides(decision, rules))


def next_overrides(decision: Decision, rules: constitution.Constitution) -> dict[str, Any] | None:
    number = int(decision.round[1:])
    if decision.state not in decide.CLOSING or number >= rules.num_rounds:
        return None
    return search.overrides(decision, f"r{number + 1:04d}", rules)


def gather(ledger: Ledger, round_name: str) -> Evidence:
    """Evidence of a round: lifts, noise, the tests' look at all rounds so far, and the states that it leaves."""
    plan, target = ledger.plans[round_name], ledger.target
    rounds = [ledger.played(name) for name in sorted(ledger.plans) if "r0000" < name <= round_name]
    played = rounds[-1]
    found = evidence.gather(round_name, played.reference, played.outcomes, plan.arms)
    before, external = states_before(ledger, round_name)
    seen = look.look(rounds, before, external, dict(plan.policy.repaired), target)
    board = {name: scores for name, scores in ledger.scores.items() if name <= round_name}
    printed = {name: {arm: format(score, "f") for arm, score in arms.items()} for name, arms in board.items()}
    return replace(found, board=printed, look=seen.look, families=seen.families, external=seen.external)


def states_before(ledger: Ledger, round_name: str) -> tuple[dict[str, FamilyState], str]:
    """As the newest decision of the last decided round left them; nothing at the start."""
    earlier = [name for name in sorted(ledger.decisions) if name < round_name]
    if not earlier:
        return {}, "EXTERNAL-CLEAR"
    decision = ledger.decisions[earlier[-1]]
    return {family: FamilyState(**state) for family, state in decision["families"].items()}, decision["external"]


def choose_submissions(records: Sequence[Record], round_name: str) -> tuple[str, ...]:
    """Arms of a round to give to the external target, in order of need; none without one, or once it is suspect itself."""
    ledger = read(records)
    rounds = [ledger.played(name) for name in sorted(ledger.plans) if "r0000" < name <= round_name]
    before, external = states_before(ledger, round_name)
    if external != "EXTERNAL-CLEAR":
        return ()
    contrasts = [arm.name for arm in ledger.plans[round_name].arms if arm.role == "contrast"]
    return look.submissions(rounds, before, ledger.target, contrasts)


def check_policy(records: Sequence[Record], round_name: str, policy: Policy) -> None:
    """Refuse, by article 8, to plan a round with another policy than the last decision wrote; its axes are a person's choice."""
    ledger = read(records)
    earlier = [name for name in sorted(ledger.decisions) if name < round_name]
    if not earlier:
        return  # what a campaign begins with is its own choice
    written = Policy.from_json(ledger.decisions[earlier[-1]]["policy"])
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
