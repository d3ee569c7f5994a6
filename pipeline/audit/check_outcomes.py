"""Check what ran and what was decided.

Attempts are compared with what was frozen, and outcomes with attempts. Every evidence, decision and override is derived again from the
records before it, by the same code that the meta stage runs (decision/derive.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.audit.findings import ERRORS_ON_BAD_RECORDS, Report
from pipeline.campaign import canonical
from pipeline.decision import board_submissions, decide, derive, history, submission_caps
from pipeline.decision.derive import Derived

Record = Mapping[str, Any]
DECIDING_EVENTS = (
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
"""Events of the records that a decision follows from. Other records do not change it."""
MARKS = frozenset("01T")


class Deriver:
    """Derives rounds from the records before a position, once for each newest record of DECIDING_EVENTS.

    known: (hash of that record, round) -> what was derived before; it is extended in place.
    """

    def __init__(
        self, records: Sequence[Record], hashes: Sequence[str], known: dict[tuple[str, str], Derived] | None
    ) -> None:
        self.records, self.hashes = records, hashes
        self.known = {} if known is None else known
        self.reader, self.taken = history.Reader(), 0
        self.newest: list[int] = []  # position -> the last record before it that a decision follows from
        last = 0
        for position, record in enumerate(records):
            self.newest.append(last)
            last = position if record["event"] in DECIDING_EVENTS else last

    def at(self, position: int, round_name: str) -> Derived:
        """Derive a round from the records before this position. In a hash chain, one record's hash stands for all before it."""
        last = self.newest[position]
        key = self.hashes[last], round_name
        if key not in self.known:
            self.known[key] = derive.derive_round(self.history_at(last + 1), round_name)
        return self.known[key]

    def history_at(self, end: int) -> history.History:
        """The history of the records before `end`. If `end` grew since the last call, only the new records are read."""
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
    """Check attempts, outcomes, decisions and submissions of a log whose chain holds and whose records have the right form.

    hashes: the sha256 of each record's line. known: as of `Deriver`.
    """
    check_attempts(records, report)
    check_outcomes(records, report)
    check_decisions(records, Deriver(records, hashes, known), report)
    check_submissions(records, report)


def check_attempts(records: Sequence[Record], report: Report) -> None:
    """Check that every attempt ran with the image, runtime, constitution, configuration and plan that were frozen."""
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
    """Check that every scored outcome belongs to a logged attempt and has a mark for each item of the campaign's sets."""
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
    scored = set()  # arms with an earlier outcome
    late = set()  # arms that were trained after the seed of the round's fresh items was public
    for record in records:
        if record["event"] == "attempt" and record["status"] == "completed":
            of = record["round"], record["arm"]
            digests = {digest for path, digest in record["files"].items() if path.endswith(".h5")}
            results.setdefault(of, set()).update((record["adapter_digest"], digest) for digest in digests)
            has_fresh = any(path.endswith("/fresh.jsonl") for path in record["files"])
            if record["round"] in revealed and of not in completed and not has_fresh:
                late.add(of)
            completed[of] = record["seq"]
        elif record["event"] == "reveal":
            revealed.add(record["round"])
        elif record["event"] == "outcome":
            count += 1
            of = record["round"], record["arm"]
            role = roles.get(of, history.REFERENCE if record["arm"] == history.REFERENCE else None)
            is_late = of in late and of not in scored and record["arm"] != history.REFERENCE
            why = _outcome_wrong(record, role, results, bases[record["round"]]["tasks"], is_late=is_late)
            if record["outcome"].get("status") == "completed":
                scored.add(of)
            if is_late:
                report.unknown(
                    f"record {record['seq']}: {record['arm']} of {record['round']} was scored on dev alone, because its attempt was logged "
                    "after the fresh seed was public; only the operator can say whether it was held back"
                )
            if why:
                report.record(record["seq"], why)
            if record["outcome"].get("status") != "completed" and of in completed:
                report.unknown(
                    f"record {record['seq']}: {record['arm']} of {record['round']} has no score ({record['outcome'].get('exit_class')}) though "
                    f"its attempt of record {completed[of]} was completed; only the operator can say why"
                )
            if record["round"] in revealed and record["outcome"].get("outcomes", {}).get("fresh"):
                report.unknown(
                    f"record {record['seq']}: {record['arm']} of {record['round']} has fresh outcomes that were logged after the seed was "
                    "revealed; only the operator can say whether the adapter was sealed before"
                )
    if count:
        report.checked(f"{count} outcomes belong to a logged attempt and have a mark for each item", since)


def _outcome_wrong(
    record: Record,
    role: str | None,
    results: Mapping[tuple[str, str], set[tuple[str, str]]],
    tasks: Mapping[str, Any],
    *,
    is_late: bool,
) -> str:
    """What is wrong with an outcome; empty if nothing is.

    role: the role that the plan gave the arm. is_late: the arm was scored after the fresh seed was public, so it has dev marks alone and
    counts in no comparison.
    """
    outcome, is_reference = record["outcome"], record["arm"] == history.REFERENCE
    if outcome.get("arm") != record["arm"]:
        return "the outcome is another arm's"
    if outcome.get("role") != role:
        return f"the outcome has the role {outcome.get('role')!r}, but the arm was planned as {role!r}"
    marks = outcome.get("outcomes")
    if not isinstance(marks, dict):
        return "the outcome has no sets"
    if outcome.get("status") != "completed":
        return "an arm without a score has outcomes" if marks else ""
    of = ("r0000", "a0") if is_reference else (record["round"], record["arm"])
    if (outcome.get("adapter_digest"), outcome.get("result_digest")) not in results.get(of, set()):
        return "no attempt with this adapter and result file was logged before it"
    needed = {"dev"} if is_late else {"dev", "fresh"}
    if missing := sorted(needed - set(marks)):  # an arm could hide a bad score by leaving a set out
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
    """Derive each evidence, decision and override from the records before it, and compare to the byte."""
    since, count = len(report.findings), 0
    for position, record in enumerate(records):
        if record["event"] not in ("evidence", "decision", "overrides"):
            continue
        count += record["event"] == "decision"
        try:
            why = _not_derived(record, deriver, position)
        except ERRORS_ON_BAD_RECORDS as error:
            why = f"cannot be derived from the records before it ({error})"
        if why:
            report.record(record["seq"], why)
    if count:
        report.checked(
            f"{count} decision{'' if count == 1 else 's'} with evidence, claims and overrides, derived again to the byte",
            since,
        )


def _not_derived(record: Record, deriver: Deriver, position: int) -> str:
    """Why a record does not follow from those before it; empty if it does."""
    event, name = record["event"], record["round"]
    if event == "overrides":
        before = f"r{int(name[1:]) - 1:04d}"
        decided = [r["seq"] for r in deriver.records[:position] if (r["event"], r.get("round")) == ("decision", before)]
        derived = deriver.at(decided[-1], before)  # the same position as for the decision, so nothing is derived twice
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
    """Check that submissions were chosen as the log requires, and replay every reservation against the caps of article 4."""
    events = (*board_submissions.EVENTS, "submissions_chosen", "finalists_chosen")
    sent = [record for record in records if record["event"] in events]
    if not sent:
        return
    since = len(report.findings)
    why = _refused(records)
    if why:
        # Find the first record whose replay fails by bisection: every longer replay fails too.
        seq = bisect_left(range(len(records)), True, key=lambda last: bool(_refused(records[: last + 1])))
        report.record(seq, f"the caps of article 4 are exceeded, or nobody chose this ({why})")
    other = next(
        (r for r in sent if r["event"] == "submission" and r["target"] != records[0]["facts"].get("external")), None
    )
    if other:
        report.record(other["seq"], f"the submission is for {other['target']}, which is not the campaign's target")
    scores = [record for record in sent if record["event"] == "board_score"]
    if scores:
        again = len(scores) - len({record["number"] for record in scores})
        by_people = sum("by" in record for record in scores)
        report.unknown(
            f"{len(scores)} scores of the external target are its word, or that of the person who typed them ({by_people} typed, {again} "
            "replace an earlier score): compare them with the target"
        )
    count = sum(record["event"] == "submission" for record in sent)
    report.checked(f"{count} submissions, chosen by the log and within the caps of article 4", since)


def _refused(records: Sequence[Record]) -> str:
    """Why a replay of the submissions fails; empty if it does not."""
    facts = records[0]["facts"]
    try:
        submission_caps.verify(records, submission_caps.caps_of(facts["articles"]["4"], facts.get("external", "none")))
        derive.check_submissions(records)
    except ERRORS_ON_BAD_RECORDS as error:
        return str(error) or repr(error)
    return ""
