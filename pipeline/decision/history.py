"""Read the sealed log once, into a campaign's plans, outcomes, scores and decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pipeline.campaign import constitution
from pipeline.campaign.errors import OtherVersion
from pipeline.campaign.records import Outcome, Plan
from pipeline.decision import assess, board_submissions
from pipeline.stats.design import CriticalValues, Design

Record = Mapping[str, Any]
REFERENCE = board_submissions.REFERENCE
CHOSEN, FINALISTS = "submissions_chosen", "finalists_chosen"
"""Events of the log: the arms of a round that are to be submitted, and the finalists, for which the held-back submissions are."""


@dataclass(frozen=True)
class History:
    """The content of a log. Where several records are about the same thing, the newest one counts.

    plans, decisions, chosen: by round; a decision is JSON, and `chosen` has the arms to submit.
    outcomes: by round and arm.
    scores, references: the board's scores by round and arm, and those of the reference; accuracies from 0 to 1.
    reference_score: the mean of the reference's scores; None while it has none.
    finalists: pairs of round and arm.
    by_hand: the rounds that a person closed.
    """

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
    def target(self) -> assess.Target:
        """The frozen design and critical values, with the reference's score so far."""
        critical = CriticalValues.from_json(self.facts["critical"])
        return assess.Target(Design(**self.facts["design"]), critical, self.reference_score)

    @property
    def decided(self) -> str | None:
        """The newest round that has a decision; None before the first."""
        return max(self.decisions, default=None)

    @property
    def num_rounds(self) -> int:
        """The number of rounds that the campaign froze. Its error rates are spent over them."""
        return self.target.design.rounds

    @property
    def confirmation(self) -> str:
        """How the campaign confirms an improvement (`claims.assess_claims.CONFIRMATIONS`)."""
        confirmation: str = self.facts["confirmation"]
        return confirmation

    @property
    def choice(self) -> str:
        """What the campaign keeps (`promotion.CHOICES`)."""
        choice: str = self.facts["choice"]
        return choice

    @property
    def rules(self) -> constitution.Constitution:
        """The constitution that the campaign froze."""
        return constitution.Constitution(self.facts["constitution_digest"], self.facts["articles"])

    def round_outcomes(self, name: str) -> Iterator[Outcome]:
        """The outcome of every planned arm. An arm without a record gets the status "absent"."""
        for arm in self.plans[name].arms:
            yield self.outcomes.get((name, arm.name)) or Outcome(arm.name, arm.role, "absent", "never_started")

    def played(self, name: str) -> assess.RoundOutcomes:
        """A round as the tests need it. The round must have a plan."""
        repeats = frozenset(arm.name for arm in self.plans[name].arms if arm.replicate_of == "reference")
        reference = self.outcomes.get((name, REFERENCE)) or Outcome(REFERENCE, REFERENCE, "absent", "never_started")
        return assess.RoundOutcomes(
            name, reference, tuple(self.round_outcomes(name)), repeats, self.scores.get(name, {})
        )

    def rounds_until(self, name: str) -> list[assess.RoundOutcomes]:
        """The rounds from r0001 to this one, in order."""
        return [self.played(each) for each in sorted(self.plans) if "r0000" < each <= name]

    def board_until(self, name: str) -> dict[str, dict[str, str]]:
        """The scores that the board printed up to this round, by round and arm, with the reference's repeats."""
        rounds = sorted({known for known in (*self.scores, *self.references) if known <= name})
        return {
            known: {
                arm: format(score, "f")
                for arm, score in (*self.references.get(known, {}).items(), *self.scores.get(known, {}).items())
            }
            for known in rounds
        }


class Reader:
    """Reads a log's records in order, some at a time. `history` is what follows from all records so far."""

    def __init__(self) -> None:
        self.facts: Mapping[str, Any] | None = None
        self.plans: dict[str, Plan] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.decisions: dict[str, Mapping[str, Any]] = {}
        self.chosen: dict[str, tuple[str, ...]] = {}
        self.finalists: tuple[tuple[str, str], ...] = ()
        self.by_hand: set[str] = set()
        self.board: list[Record] = []  # the records about submissions, in order

    def add(self, records: Iterable[Record]) -> None:
        """Read further records. Raises OtherVersion where one does not have the form of its event."""
        try:
            for record in records:
                self._add(record)
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(error) from error

    def _add(self, record: Record) -> None:
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
        elif event in board_submissions.EVENTS:
            self.board.append(record)

    @property
    def history(self) -> History:
        """Raises OtherVersion where no record was read yet, or the records of the board contradict one another."""
        if self.facts is None:
            raise _unreadable(IndexError("it has no record"))
        try:
            scores, references = (board_submissions.known_scores(self.board, *of) for of in ((), (REFERENCE,)))
            return History(
                self.facts, dict(self.plans), dict(self.outcomes), scores, references, board_submissions.reference_score(self.board),
                dict(self.decisions), dict(self.chosen), self.finalists, frozenset(self.by_hand),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(error) from error


class Follower:
    """The history of a growing log. It reads each record once, however often it is asked. `records` reads the log, as `Log.records` does."""

    def __init__(self, records: Callable[[], Sequence[Record]]) -> None:
        self._records = records
        self._reader, self._num_read = Reader(), 0
        self._history: History | None = None

    def now(self) -> History:
        """The history of the whole log at this time. Raises OtherVersion as `Reader` does."""
        return self.after(self._records())

    def after(self, records: Sequence[Record]) -> History:
        """The same, for a caller that holds the log's lock and has read all `records` already."""
        if self._history is None or len(records) > self._num_read:
            self._reader.add(records[self._num_read :])
            self._num_read, self._history = len(records), self._reader.history
        return self._history


def _unreadable(error: Exception) -> OtherVersion:
    return OtherVersion(
        f"The log holds no campaign of this version ({error!r})",
        "Restore the log from a copy, or use the campaign's own code",
    )


def read_history(records: Sequence[Record]) -> History:
    """Read a whole log. Raises OtherVersion where it does not begin with a campaign's frozen facts or a record has a wrong form."""
    reader = Reader()
    reader.add(records)
    return reader.history


def asked_of_judges(records: Iterable[Record], round_name: str) -> frozenset[str]:
    """What the log asks a judge job for: the reference of this round, and submissions, which any round may ask for."""
    asked = [record for record in records if record["event"] == "judge_request"]
    return frozenset(
        what for record in asked for what in record["what"] if what != REFERENCE or record["round"] == round_name
    )


def is_reference_judged(records: Iterable[Record], round_name: str) -> bool:
    """Whether the newest outcome that the log has of a round's reference is a score."""
    about = ("outcome", round_name, REFERENCE)
    found = [each["outcome"] for each in records if (each["event"], each.get("round"), each.get("arm")) == about]
    return bool(found) and found[-1]["status"] == "completed"
