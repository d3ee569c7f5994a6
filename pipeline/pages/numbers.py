"""The numbers of a page that no section of the text page has: scores of each round with intervals, evidence beside its thresholds, and the
board scores that dev and fresh predicted. All follow from the sealed log; floats are for people, and nothing is decided from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

from pipeline.campaign.records import FamilyState, Outcome, Plan
from pipeline.decision import assess, board_submissions, derive
from pipeline.decision.derive import Derived
from pipeline.decision.family_states import StateRules
from pipeline.decision.history import History, read_history
from pipeline.exports.compare import Z, share
from pipeline.reporting import said, tables
from pipeline.stats import overfit_test, shift_test
from pipeline.stats.alarms import Terms, board_rounds, gap_tests
from pipeline.stats.decimal_math import upper_quantile

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Score:
    """A share of right answers with the ends of its 95 % interval (Wilson's), all from 0 to 1."""

    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Finding:
    """One test of a round. size: its statistic as a share of what raises an alarm; suspect: the share that raises a suspicion, if any does.

    what: the test's kind, `gap`, `arm`, `board` or `leak`. about: the family, or what the test is of.
    """

    what: str
    about: str
    size: float
    suspect: float | None
    statistic: str
    alarm_at: str
    suspect_at: str
    result: str

    @property
    def words(self) -> str:
        """What the test is of, such as `gap in roman`, `gap of a4 in roman`, `board test (E)`."""
        return {"gap": f"gap in {self.about}", "arm": f"gap of {self.about}"}.get(self.what, self.about)


@dataclass(frozen=True)
class Predicted:
    """A submitted arm: the board score that its dev and fresh gains predict where nothing is wrong, its standard
    deviation, what was printed, and as which text."""

    round: str
    arm: str
    predicted: float
    spread: float
    printed: float
    words: str


@dataclass(frozen=True)
class RoundNumbers:
    """A round as it was known when it was decided. finals: board scores of its arms that were submitted again as
    finalists, accuracies from 0 to 1; they enter no test."""

    name: str
    plan: Plan
    derived: Derived
    history: History
    finals: Mapping[str, Decimal] = field(default_factory=dict)

    @cached_property
    def leader(self) -> str | None:
        """The arm that the round kept, else the axis arm of the largest value, else the arm of the largest
        value; None without a value."""
        look = self.derived.evidence.look
        if self.derived.decision.kept or look is None:
            return self.derived.decision.kept
        axes = [arm.name for arm in self.plan.arms if arm.role == "axis" and arm.name in look.values]
        return max(axes or sorted(look.values), key=lambda arm: look.values[arm], default=None)

    def outcome(self, arm: str) -> Outcome | None:
        return next((run for run in self.derived.evidence.outcomes if run.arm == arm), None)

    def score(self, arm: str, item_set: str) -> Score | None:
        """The score of an arm, or of the `reference`, on dev, fresh or the board; None where it has none."""
        if item_set == "board":
            return self._board(arm)
        outcome = self.outcome(arm)
        if outcome is None or not outcome.scored(item_set):
            return None
        right, number = outcome.right(item_set)
        return _score(share(right.bit_count(), number))

    def score_so_far(self, arm: str, item_set: str) -> Score | None:
        """As `score`; an arm that was sent to the board as a finalist alone has that score."""
        return self.score(arm, item_set) or (self._of_board(self.finals.get(arm)) if item_set == "board" else None)

    def _board(self, arm: str) -> Score | None:
        if arm == "reference":
            found = self.history.reference_score
        else:
            found = self.history.scores.get(self.name, {}).get(arm)
        return self._of_board(found)

    def _of_board(self, found: Decimal | None) -> Score | None:
        rows = self.history.target.design.board_rows
        return None if found is None or not rows else _score(share(float(found) * rows, rows))

    @cached_property
    def _compared(self) -> list[assess.RoundOutcomes]:
        return [at for at in self.history.rounds_until(self.name) if at.is_comparable]

    @cached_property
    def _counted(self) -> list[Any]:
        return [assess.counts_of(at, self.history.target) for at in self._compared]

    @property
    def gaps(self) -> dict[str, tuple[float, float]]:
        """For each family, the arms' mean lift over the reference on dev and on fresh, as differences of
        accuracies."""
        return tables.gaps(self.derived.evidence)

    def findings(self) -> list[Finding]:
        """Every test of the round's look; none where the tests did not run."""
        evidence = self.derived.evidence
        if evidence.look is None:
            return []
        return [*self._gap_findings(), *self._arm_findings(), *self._board_findings()]

    @cached_property
    def _terms(self) -> Mapping[str, Terms]:
        before, _ = derive.states_before(self.history, self.name)
        states = {family: before.get(family, FamilyState()) for family in self._counted[-1].dev}
        repaired, rules = dict(self.plan.policy.repaired), StateRules.of(self.history.rules)
        return assess.terms(self._compared, states, repaired, rules)

    def _gap_findings(self) -> list[Finding]:
        counted, critical = self._counted, self.history.target.critical
        families, verdict = sorted(counted[-1].dev), self.derived.evidence.look.verdict  # type: ignore[union-attr]
        looks = {
            family: [overfit_test.FamilyCounts(each.dev[family], each.fresh[family]) for each in counted]
            for family in families
        }
        tests = gap_tests(looks, self._terms)
        alarms, suspects = ({test.family for test in found} for found in (verdict.gap_alarms, verdict.gap_suspects))
        found = []
        for family in dict.fromkeys(test.family for test in tests):
            largest = max(test.score for test in tests if test.family == family)
            factor = self._terms[family].level_factor if family in self._terms else 1
            level = overfit_test.portion(family, self._portions) * factor
            limits = [_limit(level * each) for each in (critical.gap_level, critical.gap_suspect_level)]
            result = "alarm" if family in alarms else "suspicion" if family in suspects else "no alarm"
            found.append(_finding("gap", family, _root(largest), limits[0], limits[1], result))
        return found

    @cached_property
    def _portions(self) -> dict[str, Fraction]:
        return assess.portions_of(self._counted[0])

    def _arm_findings(self) -> list[Finding]:
        newest, critical = self._counted[-1], self.history.target.critical
        alarms = {(test.family, test.arm) for test in self.derived.evidence.look.verdict.arm_alarms}  # type: ignore[union-attr]
        found = []
        for family in sorted(newest.dev):
            tests = overfit_test.arm_tests(family, overfit_test.FamilyCounts(newest.dev[family], newest.fresh[family]))
            if not tests:
                continue
            largest = max(tests, key=lambda test: test.score)
            arm = newest.names[largest.arm or 0]
            result = "alarm" if (family, arm) in alarms else "no alarm"
            limit = _limit(critical.arm_level * self._portions[family] * self._terms[family].level_factor)
            found.append(_finding("arm", f"{arm} in {family}", _root(largest.score), limit, None, result))
        return found

    def _board_findings(self) -> list[Finding]:
        evidence, critical = self.derived.evidence, self.history.target.critical
        verdict = evidence.look.verdict  # type: ignore[union-attr]
        if not any(evidence.board.values()):
            return []
        e, alarm, suspect = float(verdict.e_value), float(critical.board_alarm), float(critical.board_suspect)
        result = "alarm" if verdict.board_alarm else "suspicion" if verdict.board_suspect else "no alarm"
        size = max(0.0, math.log(e) / math.log(alarm)) if alarm > 1 and e > 0 else 0.0
        part = math.log(suspect) / math.log(alarm) if alarm > 1 else None
        found = [Finding("board", "board test (E)", size, part, f"{e:.2f}", f"{alarm:.2f}", f"{suspect:.2f}", result)]
        if verdict.leak_scores:
            result = "alarm" if verdict.leak_alarm else "no alarm"
            largest, limit = float(max(verdict.leak_scores)), float(upper_quantile(critical.leak_level))
            found.append(_finding("leak", "leak test", largest, limit, None, result))
        return found

    def predicted(self) -> list[Predicted]:
        """Every submitted arm so far that the board test knows, in order of rounds."""
        reference = self.history.reference_score
        boards = board_rounds(self._counted) if self._counted else []
        if reference is None or not any(each.scores for each in boards):
            return []
        model = shift_test.healthy_model(boards, len(boards[0].dev), self.history.target.design)
        arms = [(number, arm) for number, data in enumerate(boards) for arm in sorted(data.scores)]
        return [
            Predicted(
                self._compared[number].name, self._counted[number].names[arm], float(reference + sum(effects)),
                math.sqrt(sum(float(value) ** 2 for value in row)), float(reference + boards[number].scores[arm]),
                format(self.history.scores[self._compared[number].name][self._counted[number].names[arm]], "f"),
            )
            for (number, arm), effects, row in zip(arms, model.effects, model.lower, strict=True)
        ]  # fmt: skip


def rounds_of(records: Records, upto: str | None = None) -> list[RoundNumbers]:
    """Every round whose outcomes a meta stage has gathered, in order, each as things were known at its last decision, where it has one.

    upto: the last round that is wanted; without it the finalists of the whole campaign have their board scores.
    Raises IntegrityError and OtherVersion as `derive.derive`.
    """
    gathered = {record["round"] for record in records if record["event"] == "outcome"}
    finals = board_submissions.known_scores(() if upto else records, "finalist")
    return [_round(records, name, finals.get(name, {})) for name in sorted(gathered) if upto is None or name <= upto]


def _round(records: Records, name: str, finals: Mapping[str, Decimal]) -> RoundNumbers:
    history = read_history(said.known_at_decision(records, name))
    return RoundNumbers(name, history.plans[name], derive.derive_round(history, name), history, finals)


def _score(found: Mapping[str, float]) -> Score:
    return Score(found["accuracy"], found["low"], found["high"])


def _root(score: Fraction) -> float:
    """T from its square with its sign."""
    return math.copysign(math.sqrt(abs(float(score))), float(score))


def _limit(level: Fraction) -> float:
    return float(upper_quantile(min(level, Fraction(1, 2))))


def _finding(what: str, about: str, size: float, alarm: float, suspect: float | None, result: str) -> Finding:
    """A test that compares a standardised statistic with a quantile."""
    return Finding(
        what, about, max(0.0, size) / alarm if alarm else 0.0, suspect / alarm if suspect is not None and alarm else None,
        f"{size:.2f}", f"{alarm:.2f}", "" if suspect is None else f"{suspect:.2f}", result,
    )  # fmt: skip


INTERVAL = Z
"""The number of standard errors on either side of an interval of 95 %."""
