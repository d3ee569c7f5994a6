"""Read the submissions to the external target from the sealed log: what was sent, and which score was known when.

    submission      number 3, round r0002, arm a5, purpose slot, adapter_digest, target kaggle, day 2026-11-24     the reservation
    board_attempt   number 3, day 2026-11-25                                             about to be sent, written before the sending
    board_sent      number 3                                                      the target has it: it is asked, never sent again
    board_score     number 3, score "0.84" | null with why, withdrawn true | absent      the newest of a number counts

For a prefix of the log, the functions return what was known at its end. A late, revised or withdrawn score therefore changes only the
decisions after it. submission_caps.py says which submissions the caps allow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError

REFERENCE = "reference"
SCORE = re.compile(r"0(\.[0-9]{1,5})?|1(\.0{1,5})?")
EVENTS = ("submission", "board_attempt", "board_sent", "board_score")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Submission:
    """One submission, as the log has it so far.

    `attempts` are the UTC days on which a sending began. `state` is reserved (nothing was sent), attempted (a sending began and may have
    succeeded), sent (the target has it), scored, failed (`why` says how; it is tried again) or withdrawn. `printed` is the score as the
    target wrote it.
    """

    number: int
    round: str
    arm: str
    purpose: str
    adapter_digest: str
    target: str
    day: str
    attempts: tuple[str, ...] = ()
    is_sent: bool = False
    state: str = "reserved"
    printed: str | None = None
    why: str = ""

    @property
    def score(self) -> Decimal | None:
        """The score as an exact number, None while there is none."""
        return None if self.printed is None else Decimal(self.printed)

    @property
    def days(self) -> set[str]:
        """The UTC days on whose cap it counts."""
        return {self.day, *self.attempts}


def parse_score(text: str) -> str:
    """Return `text` if it is a score: a decimal from 0 to 1 with at most five places. Raises ConfigError for anything else."""
    if not SCORE.fullmatch(text):
        raise ConfigError(
            f"{text[:40]!r} is no score", "Valid: a decimal from 0 to 1 with at most five places, such as 0.84"
        )
    return text


def submissions_in(records: Iterable[Record]) -> tuple[Submission, ...]:
    """Return every submission by number. Raises IntegrityError where the records contradict one another.

    records: of the sealed log; events that do not concern submissions are skipped.
    """
    submissions: list[Submission] = []
    for record in records:
        if record["event"] not in EVENTS:
            continue
        number = record["number"]
        if record["event"] == "submission":
            if number != len(submissions) + 1:
                raise IntegrityError(
                    f"submission {number} follows number {len(submissions)}", "Compare the log with a copy"
                )
            submissions.append(
                Submission(
                    number, record["round"], record["arm"], record["purpose"], record["adapter_digest"], record["target"],
                    record["day"],
                )
            )  # fmt: skip
            continue
        if type(number) is not int or not 1 <= number <= len(submissions):
            raise IntegrityError(
                f"a {record['event']} is for number {number!r}, which nobody reserved", "Compare the log with a copy"
            )
        known = submissions[number - 1]
        if record["event"] == "board_attempt":
            submissions[number - 1] = replace(
                _with_state(known, "attempted"), attempts=(*known.attempts, record["day"])
            )
        elif record["event"] == "board_sent":
            submissions[number - 1] = replace(_with_state(known, "sent"), is_sent=True)
        else:
            submissions[number - 1] = _with_score(known, record)
    return tuple(submissions)


def _with_state(known: Submission, state: str) -> Submission:
    """Return the submission in a new state, unless a person has meanwhile logged its score or withdrawal."""
    return known if known.state in ("scored", "withdrawn") else replace(known, state=state, why="")


def _with_score(known: Submission, record: Record) -> Submission:
    """Return the submission after a `board_score` record. Raises IntegrityError for an invalid score."""
    if record.get("withdrawn"):
        return replace(known, state="withdrawn", printed=None, why=record.get("why", ""))
    printed = record["score"]
    if printed is None:
        return replace(known, state="failed", printed=None, why=record.get("why", ""))
    try:
        return replace(known, state="scored", printed=parse_score(printed), why="")
    except (ConfigError, TypeError):
        raise IntegrityError(
            f"the board_score of number {known.number} is {printed!r}, which is not a score",
            "Compare the log with a copy",
        ) from None


def known_scores(records: Iterable[Record], purpose: str = "slot") -> dict[str, dict[str, Decimal]]:
    """Return round -> arm -> score of the submissions for one purpose that have a score.

    Repeats of the reference are named by their numbers, as in `reference-1`.
    """
    scores: dict[str, dict[str, Decimal]] = {}
    for submission in submissions_in(records):
        if submission.purpose == purpose and submission.score is not None:
            name = f"{REFERENCE}-{submission.number}" if submission.arm == REFERENCE else submission.arm
            scores.setdefault(submission.round, {})[name] = submission.score
    return scores


def reference_score(records: Iterable[Record]) -> Decimal | None:
    """Return the mean of the reference's known scores, to 34 digits; None without any."""
    scores = [score for by_name in known_scores(records, REFERENCE).values() for score in by_name.values()]
    exact = Context(prec=34)
    total = Decimal(0)
    for score in scores:
        total = exact.add(total, score)
    return exact.divide(total, Decimal(len(scores))) if scores else None
