"""What the log says was run and what followed: attempts against what was frozen, outcomes against attempts, and every evidence, decision and
override derived again from the records before it, by the very lines that the meta stage runs (referee.derive)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.audit.findings import Report
from pipeline.campaign import canonical
from pipeline.campaign.errors import PipelineError
from pipeline.decision import board_submissions, decide, derive, history, submission_caps
from pipeline.decision.derive import Derived

Record = Mapping[str, Any]
STUMBLES = (PipelineError, AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError)
TELLING = (
    "init",
    "plan",
    "outcome",
    "decision",
    "by_hand",
    "submission",
    "board_score",
    "submissions_chosen",
    "finalists_chosen",
)
"""Records that a decision follows from; others between it and them do not change it."""
MARKS = frozenset("01T")


class Deriver:
    """Derives each round once for each state of the records that tell. `known`: what was derived before, by (hash of a record, round)."""

    def __init__(
        self, records: Sequence[Record], hashes: Sequence[str], known: dict[tuple[str, str], Derived] | None
    ) -> None:
        self.records, self.hashes = records, hashes
        self.known = {} if known is None else known
        self.reader, self.taken = history.Reader(), 0
        self.newest: list[int] = []  # of each position the last record before it that tells
        last = 0
        for position, record in enumerate(records):
            self.newest.append(last)
            last = position if record["event"] in TELLING else last

    def at(self, position: int, round_name: str) -> Derived:
        """From the records before this position. The chain makes the hash of one record stand for all before it."""
        last = self.newest[position]
        key = self.hashes[last], round_name
        if key not in self.known:
            self.known[key] = derive.derive_round(self.history_at(last + 1), round_name)
        return self.known[key]

    def history_at(self, end: int) -> history.History:
        """Of the records before `end`; those that were taken are not read again where it only grows, as in a log it does."""
        if end < self.taken:
            return history.read_history(self.records[:end])
        self.reader.add(self.records[self.taken : end])
        self.taken = end
        return self.reader.history


def check_log(
    records: Sequence[Record],
    hashes: Sequence[str],
    report: Report,
    known: dict[tuple[str, str], Derived] | None = None,
) -> None:
    """Of a log whose chain holds and whose records have their form."""
    check_attempts(records, report)
    check_outcomes(records, report)
    check_decisions(records, Deriver(records, hashes, known), report)
    check_submissions(records, report)


def check_attempts(records: Sequence[Record], report: Report) -> None:
    """Every attempt ran the image, runtime, constitution, configuration and plan that were frozen."""
    since, facts = len(report.findings), records[0]["facts"]
    plans = {record["round"]: record for record in records if record["event"] == "plan"}
    count = 0
    for record in records:
        if record["event"] != "attempt":
            continue
        count += 1
        planned = plans[record["round"]]
        is_reference = record["arm"] == history.REFERENCE
        arms = {f"a{arm['index']}": arm for arm in planned["plan"]["arms"]}
        expected = {
            "image_digest": facts["image"]["tree_digest"], "runtime_digest": facts["runtime_digest"],
            "constitution_digest": facts["constitution_digest"], "config_digest": planned["plan"]["config_digest"],
            "plan_digest": "" if is_reference else planned["plan_digest"],
        }  # fmt: skip
        if not is_reference:
            arm = arms.get(record["arm"], {})
            expected |= {"role": arm.get("role"), "seed": arm.get("seed")}
        wrong = [name for name, value in expected.items() if record[name] != value]
        if wrong:
            report.record(record["seq"], f"the attempt had another {', '.join(wrong)} than was frozen")
    if count:
        report.checked(f"image, runtime, constitution, configuration and plan of {count} attempts", since)


def check_outcomes(records: Sequence[Record], report: Report) -> None:
    """A scored outcome is that of a logged attempt, and has a mark for each item of the campaign's sets."""
    since = len(report.findings)
    bases = {record["round"]: record for record in records if record["event"] == "basis"}
    results: dict[tuple[str, str], set[tuple[str, str]]] = {}
    roles = {
        (record["round"], f"a{arm['index']}"): arm["role"]
        for record in records
        if record["event"] == "plan"
        for arm in record["plan"]["arms"]
    }
    completed: dict[tuple[str, str], int] = {}
    revealed, count = set(), 0
    for record in records:
        if record["event"] == "attempt":
            of = record["round"], record["arm"]
            if record["status"] == "completed":
                completed[of] = record["seq"]
            digests = {digest for path, digest in record["files"].items() if path.endswith(".h5")}
            results.setdefault(of, set()).update((record["adapter_digest"], digest) for digest in digests)
        elif record["event"] == "reveal":
            revealed.add(record["round"])
        elif record["event"] == "outcome":
            count += 1
            of = record["round"], record["arm"]
            role = roles.get(of, history.REFERENCE if record["arm"] == history.REFERENCE else None)
            why = _outcome_wrong(record, role, results, bases[record["round"]]["tasks"])
            if why:
                report.record(record["seq"], why)
            if record["outcome"].get("status") != "completed" and of in completed:
                report.unknown(
                    f"record {record['seq']}: {record['arm']} of {record['round']} has no score ({record['outcome'].get('exit_class')}) though "
                    f"its attempt of record {completed[of]} was completed; why rests on the operator"
                )
            if record["round"] in revealed and record["outcome"].get("outcomes", {}).get("fresh"):
                report.unknown(
                    f"record {record['seq']}: {record['arm']} of {record['round']} has fresh outcomes that were logged after the seed was "
                    "revealed; whether it was sealed before rests on the operator"
                )
    if count:
        report.checked(f"{count} outcomes belong to a logged attempt and have a mark for each item", since)


def _outcome_wrong(
    record: Record, role: str | None, results: Mapping[tuple[str, str], set[tuple[str, str]]], tasks: Mapping[str, Any]
) -> str:
    """Empty where nothing is. role: that the plan gave the arm."""
    outcome, is_reference = record["outcome"], record["arm"] == history.REFERENCE
    if outcome.get("arm") != record["arm"]:
        return "the outcome is another arm's"
    if outcome.get("role") != role:
        return f"the outcome is that of {outcome.get('role')!r}, the arm was planned as {role!r}"
    marks = outcome.get("outcomes")
    if not isinstance(marks, dict):
        return "the outcome has no sets"
    if outcome.get("status") != "completed":
        return "an arm without a score has outcomes" if marks else ""
    of = ("r0000", "a0") if is_reference else (record["round"], record["arm"])
    if (outcome.get("adapter_digest"), outcome.get("result_digest")) not in results.get(of, set()):
        return "no attempt with this adapter and result file was logged before it"
    if missing := sorted({"dev", "fresh"} - set(marks)):  # what is left out cannot speak against an arm
        return f"a completed arm has no marks on {' and '.join(missing)}"
    for item_set, families in marks.items():
        if (
            item_set not in ("dev", "fresh")
            or not isinstance(families, dict)
            or sorted(families) != sorted(tasks["families"])
        ):
            return f"{item_set} has other families than the campaign"
        for family, text in families.items():
            if (
                not isinstance(text, str)
                or len(text) != tasks[f"num_{item_set}_per_family"]
                or not MARKS.issuperset(text)
            ):
                return f"{item_set} of {family} is not a mark for each of {tasks[f'num_{item_set}_per_family']} items"
    return ""


def check_decisions(records: Sequence[Record], deriver: Deriver, report: Report) -> None:
    """Evidence, decision and overrides, each from the records before it, to the byte."""
    since, count = len(report.findings), 0
    for position, record in enumerate(records):
        if record["event"] not in ("evidence", "decision", "overrides"):
            continue
        count += record["event"] == "decision"
        try:
            why = _not_derived(record, deriver, position)
        except STUMBLES as error:
            why = f"cannot be derived from the records before it ({error})"
        if why:
            report.record(record["seq"], why)
    if count:
        report.checked(f"{count} decisions with evidence and overrides, derived again to the byte", since)


def _not_derived(record: Record, deriver: Deriver, position: int) -> str:
    """What a record says that does not follow; empty where it does."""
    event, name = record["event"], record["round"]
    if event == "overrides":
        before = f"r{int(name[1:]) - 1:04d}"
        decided = [r["seq"] for r in deriver.records[:position] if (r["event"], r.get("round")) == ("decision", before)]
        derived = deriver.at(decided[-1], before)  # where the decision was derived already
        same = derived.overrides is not None and canonical.encoded(derived.overrides) == canonical.encoded(
            record["overrides"]
        )
        return "" if same else f"the overrides of {name} do not follow from the decision before them"
    derived = deriver.at(position, name)
    if event == "evidence":
        same = canonical.sha256(canonical.encoded(derived.evidence.to_json())) == record["sha256"]
        return "" if same else f"the evidence of {name} does not follow from the outcomes before it"
    if derived.decision.state not in decide.CLOSING:
        return f"{name} could not be decided by the records before it"
    same = canonical.encoded(asdict(derived.decision)) == canonical.encoded(record["decision"])
    return "" if same else f"the decision of {name} does not follow from its evidence"


def check_submissions(records: Sequence[Record], report: Report) -> None:
    """What was chosen to be submitted follows from the log, and every reservation from article 4's caps, replayed."""
    events = (*board_submissions.EVENTS, "submissions_chosen", "finalists_chosen")
    sent = [record for record in records if record["event"] in events]
    if not sent:
        return
    since = len(report.findings)
    why = _refused(records)
    if why:
        # The first record at which a replay stops; one that stops it stops every longer one.
        seq = bisect_left(range(len(records)), True, key=lambda last: bool(_refused(records[: last + 1])))
        report.record(seq, f"the caps of article 4 are exceeded, or nobody chose this ({why})")
    other = next(
        (r for r in sent if r["event"] == "submission" and r["target"] != records[0]["facts"].get("external")), None
    )
    if other:
        report.record(other["seq"], f"the submission is for {other['target']}, whose caps are not the campaign's")
    scores = [record for record in sent if record["event"] == "board_score"]
    if scores:
        again = len(scores) - len({record["number"] for record in scores})
        by_people = sum("by" in record for record in scores)
        report.unknown(
            f"{len(scores)} records of scores of the external target are its word, or that of who typed it ({by_people} typed, {again} "
            "said something else before): compare them with the target"
        )
    count = sum(record["event"] == "submission" for record in sent)
    report.checked(f"{count} submissions, chosen by the log and within the caps of article 4", since)


def _refused(records: Sequence[Record]) -> str:
    """Why a replay of the submissions stops; empty where it does not."""
    facts = records[0]["facts"]
    try:
        submission_caps.verify(records, submission_caps.caps_of(facts["articles"]["4"], facts.get("external", "none")))
        derive.check_submissions(records)
    except STUMBLES as error:
        return str(error) or repr(error)
    return ""
