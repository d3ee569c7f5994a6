"""The sealed log in, the next decision out: what the meta stage writes and what an audit derives again, by the same lines. Pure.

Only records count: what a file says, when something happened and on which machine is nowhere in them. The same log up to the same
record gives the same evidence, decision and overrides anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from pipeline import constitution, decide, evidence, look, search, submissions
from pipeline.design import CriticalValues, Design
from pipeline.errors import IntegrityError, NotFound, Refused
from pipeline.records import Decision, Evidence, FamilyState, Outcome, Plan, Policy

Record = Mapping[str, Any]
REFERENCE = submissions.REFERENCE
CHOSEN, FINALISTS = "submissions_chosen", "finalists_chosen"
"""Events: the arms of a round that are to be scored, and the (round, arm) of those that the held-back submissions are for."""


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
    references: Mapping[str, Mapping[str, Decimal]]
    reference_score: Decimal | None
    decisions: Mapping[str, Mapping[str, Any]]
    chosen: Mapping[str, tuple[str, ...]]
    finalists: tuple[tuple[str, str], ...]
    by_hand: frozenset[str]

    @property
    def target(self) -> look.Target:
        critical = CriticalValues.from_json(self.facts["critical"])
        return look.Target(Design(**self.facts["design"]), critical, self.reference_score)

    @property
    def decided(self) -> str | None:
        """The newest round that has a decision."""
        return max(self.decisions, default=None)

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
        return look.Played(name, reference, tuple(self.round_outcomes(name)), repeats, self.scores.get(name, {}))

    def board_until(self, name: str) -> dict[str, dict[str, str]]:
        """What the board printed for rounds up to this one, the reference's repeats too."""
        rounds = sorted({each for each in (*self.scores, *self.references) if each <= name})
        return {
            each: {
                arm: format(score, "f")
                for arm, score in (*self.references.get(each, {}).items(), *self.scores.get(each, {}).items())
            }
            for each in rounds
        }


class Reader:
    """Takes a log's records in order, some at a time; `ledger` is what all of them say."""

    def __init__(self) -> None:
        self.facts: Mapping[str, Any] | None = None
        self.plans: dict[str, Plan] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.decisions: dict[str, Mapping[str, Any]] = {}
        self.chosen: dict[str, tuple[str, ...]] = {}
        self.finalists: tuple[tuple[str, str], ...] = ()
        self.by_hand: set[str] = set()
        self.board: list[Record] = []  # what submissions are read from

    def take(self, records: Iterable[Record]) -> None:
        """Raises IntegrityError for records that are not of their form."""
        try:
            for record in records:
                self._take(record)
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(error) from error

    def _take(self, record: Record) -> None:
        event = record["event"]
        if self.facts is None:
            self.facts = record["facts"]
        elif event == "plan":
            self.plans[record["round"]] = Plan.from_json(record["plan"])
        elif event == "outcome":
            self.outcomes[record["round"], record["arm"]] = Outcome(**record["outcome"])
        elif event == "decision":
            self.decisions[record["round"]] = record["decision"]
        elif event == CHOSEN:
            self.chosen[record["round"]] = tuple(record["arms"])
        elif event == FINALISTS:
            self.finalists = tuple((name, arm) for name, arm in record["finalists"])
        elif event == "by_hand":
            self.by_hand.add(record["round"])
        elif event in submissions.EVENTS:
            self.board.append(record)

    @property
    def ledger(self) -> Ledger:
        """Raises IntegrityError where there is no record yet, or those of the board contradict one another."""
        if self.facts is None:
            raise _unreadable(IndexError("no record"))
        try:
            scores, references = (submissions.known_scores(self.board, *of) for of in ((), (REFERENCE,)))
            return Ledger(
                self.facts, dict(self.plans), dict(self.outcomes), scores, references, submissions.reference_score(self.board),
                dict(self.decisions), dict(self.chosen), self.finalists, frozenset(self.by_hand),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(error) from error


def _unreadable(error: Exception) -> IntegrityError:
    return IntegrityError(f"the log holds no campaign of this version ({error!r})", "Restore it from a copy")


def read(records: Sequence[Record]) -> Ledger:
    """Raises IntegrityError for a log that does not begin with what a campaign froze, or whose records are not of their form."""
    reader = Reader()
    reader.take(records)
    return reader.ledger


def derive(records: Sequence[Record], round_name: str) -> Derived:
    """Evidence, decision and overrides of a round from the log so far. Raises NotFound for a round that was not planned, IntegrityError."""
    return derived(read(records), round_name)


def derived(ledger: Ledger, round_name: str) -> Derived:
    """`derive`, of a log that was read."""
    if round_name not in ledger.plans:
        raise NotFound(f"round {round_name} has no plan in the log", f"Planned: {', '.join(sorted(ledger.plans))}")
    plan, rules = ledger.plans[round_name], ledger.rules
    seen = gather(ledger, round_name)
    decision = decide.decide(seen, {arm.name: arm for arm in plan.arms}, plan.policy, rules)
    if decision.state == "undecided" and round_name in ledger.by_hand:
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
    board = ledger.board_until(round_name)
    return replace(found, board=board, look=seen.look, families=seen.families, external=seen.external)


def states_before(ledger: Ledger, round_name: str) -> tuple[dict[str, FamilyState], str]:
    """As the newest decision of the last decided round left them; nothing at the start."""
    earlier = [name for name in sorted(ledger.decisions) if name < round_name]
    if not earlier:
        return {}, "EXTERNAL-CLEAR"
    decision = ledger.decisions[earlier[-1]]
    return {family: FamilyState(**state) for family, state in decision["families"].items()}, decision["external"]


def choose_submissions(ledger: Ledger, round_name: str) -> tuple[str, ...]:
    """Arms of a round to give to the external target, in order of need; none without one, or once it is suspect itself."""
    rounds = [ledger.played(name) for name in sorted(ledger.plans) if "r0000" < name <= round_name]
    before, external = states_before(ledger, round_name)
    if external != "EXTERNAL-CLEAR":
        return ()
    contrasts = [arm.name for arm in ledger.plans[round_name].arms if arm.role == "contrast"]
    return look.submissions(rounds, before, ledger.target, contrasts)


def choose_finalists(ledger: Ledger) -> tuple[tuple[str, str], ...]:
    """(round, arm) of those that the held-back submissions are for: the winner, then who comes next; none without a target or a decision."""
    if ledger.decided is None or not ledger.target.exists:
        return ()
    found = derived(ledger, ledger.decided)
    if found.decision.winner is None or found.evidence.look is None:
        return ()
    ranked = [found.decision.winner, *((each.round, each.arm) for each in found.evidence.look.finalists)]
    return tuple(dict.fromkeys(ranked))[: int(ledger.rules.articles["4"]["submissions_held_back"])]


def digest_of(ledger: Ledger, round_name: str, arm: str) -> str:
    """Digest of the adapter that an arm of a round was scored with (of the reference: in any round); empty without one."""
    outcome = ledger.outcomes.get((round_name, arm))
    return outcome.adapter_digest if outcome and outcome.status == "completed" else ""


def check_submissions(records: Sequence[Record]) -> int:
    """Replay what was chosen to be submitted on the records before it; returns how many submissions there are. For an audit.

    Raises IntegrityError naming the first choice that does not follow from the log, and the first submission that nobody chose or that
    is of another adapter than the arm's outcome.
    """
    reader, count = Reader(), 0
    for record in records:
        if record["event"] == CHOSEN:
            _check_choice(record, choose_submissions(reader.ledger, record["round"]))
        elif record["event"] == FINALISTS:
            expected = [list(each) for each in choose_finalists(reader.ledger)]
            if record["finalists"] != expected:
                raise IntegrityError(f"the finalists do not follow from the log: {record['finalists']}, not {expected}")
        elif record["event"] == "submission":
            _check_reserved(record, reader.ledger)
            count += 1
        reader.take([record])
    return count


def _check_choice(record: Record, expected: tuple[str, ...]) -> None:
    if tuple(record["arms"]) != expected:
        raise IntegrityError(f"the arms to submit of {record['round']} do not follow from the log: {record['arms']}")


def _check_reserved(record: Record, ledger: Ledger) -> None:
    name, arm = record["round"], record["arm"]
    chosen = {
        "reference": arm == REFERENCE,
        "slot": arm in ledger.chosen.get(name, ()),
        "finalist": (name, arm) in ledger.finalists,
    }
    digest = digest_of(ledger, name, arm)
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
