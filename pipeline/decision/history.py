"""The sealed log read once: a campaign's plans, outcomes, scores and decisions, by what they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pipeline.campaign import constitution
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.records import Outcome, Plan
from pipeline.decision import assess, board_submissions
from pipeline.stats.design import CriticalValues, Design

Record = Mapping[str, Any]
REFERENCE = board_submissions.REFERENCE
CHOSEN, FINALISTS = "submissions_chosen", "finalists_chosen"
"""Events: the arms of a round that are to be scored, and the (round, arm) of those that the held-back submissions are for."""


@dataclass(frozen=True)
class History:
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
    def target(self) -> assess.Target:
        critical = CriticalValues.from_json(self.facts["critical"])
        return assess.Target(Design(**self.facts["design"]), critical, self.reference_score)

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

    def played(self, name: str) -> assess.RoundOutcomes:
        repeats = frozenset(arm.name for arm in self.plans[name].arms if arm.replicate_of == "reference")
        reference = self.outcomes.get((name, REFERENCE)) or Outcome(REFERENCE, REFERENCE, "absent", "never_started")
        return assess.RoundOutcomes(
            name, reference, tuple(self.round_outcomes(name)), repeats, self.scores.get(name, {})
        )

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
    """Takes a log's records in order, some at a time; `history` is what all of them say."""

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
        elif event in board_submissions.EVENTS:
            self.board.append(record)

    @property
    def history(self) -> History:
        """Raises IntegrityError where there is no record yet, or those of the board contradict one another."""
        if self.facts is None:
            raise _unreadable(IndexError("no record"))
        try:
            scores, references = (board_submissions.known_scores(self.board, *of) for of in ((), (REFERENCE,)))
            return History(
                self.facts, dict(self.plans), dict(self.outcomes), scores, references, board_submissions.reference_score(self.board),
                dict(self.decisions), dict(self.chosen), self.finalists, frozenset(self.by_hand),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(error) from error


class Follower:
    """The history of a log that grows while it is followed: each record is read once, however many stages ask.

    records: reads the log, as `Log.records` does.
    """

    def __init__(self, records: Callable[[], Sequence[Record]]) -> None:
        self._records = records
        self._reader, self._taken = Reader(), 0
        self._history: History | None = None

    def now(self) -> History:
        """What the log says now. Raises IntegrityError as `Reader`."""
        return self.after(self._records())

    def after(self, records: Sequence[Record]) -> History:
        """The same of records that were read already, by whoever holds the log's lock."""
        if self._history is None or len(records) > self._taken:
            self._reader.take(records[self._taken :])
            self._taken, self._history = len(records), self._reader.history
        return self._history


def _unreadable(error: Exception) -> IntegrityError:
    return IntegrityError(f"the log holds no campaign of this version ({error!r})", "Restore it from a copy")


def read_history(records: Sequence[Record]) -> History:
    """Raises IntegrityError for a log that does not begin with what a campaign froze, or whose records are not of their form."""
    reader = Reader()
    reader.take(records)
    return reader.history
