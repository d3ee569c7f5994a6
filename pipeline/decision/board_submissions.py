"""The submission ledger: what was sent to the external target, and which score was known when, read from the sealed log alone.

    submission      number 3, round r0002, arm a5, purpose slot, adapter_digest, target kaggle, day 2026-11-24     the reservation
    board_attempt   number 3, day 2026-11-25                                             about to be sent, written before the act
    board_sent      number 3                                                      the target took it: it is asked, never sent again
    board_score     number 3, score "0.84" | null with why, withdrawn true | absent      the newest of a number counts

What is said here of a prefix of the log is what was known at its end: late, revised and withdrawn scores change what comes after them
alone. submission_caps.py says which reservation the caps leave.
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
    """One number of the ledger as the log has it so far.

    `attempts` are the days on which it was about to be sent. `state`: reserved (nothing was sent), attempted (cut short while sending,
    or sent), sent (the target took it), scored, failed (`why` says how; it is tried again) or withdrawn. `printed` is the score as
    the target wrote it.
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
        return None if self.printed is None else Decimal(self.printed)

    @property
    def days(self) -> set[str]:
        """Days on whose cap it counts."""
        return {self.day, *self.attempts}


def parse_score(text: str) -> str:
    """A score as a target may print it: a decimal from 0 to 1 with at most five places. Raises ConfigError."""
    if not SCORE.fullmatch(text):
        raise ConfigError(
            f"{text[:40]!r} is no score", "Valid: a decimal from 0 to 1 with at most five places, such as 0.84"
        )
    return text


def submissions_in(records: Iterable[Record]) -> tuple[Submission, ...]:
    """Every submission in the order of its number. Raises IntegrityError where the records contradict one another."""
    found: list[Submission] = []
    for record in records:
        if record["event"] not in EVENTS:
            continue
        number = record["number"]
        if record["event"] == "submission":
            if number != len(found) + 1:
                raise IntegrityError(f"submission {number} follows number {len(found)}", "Compare the log with a copy")
            found.append(
                Submission(
                    number, record["round"], record["arm"], record["purpose"], record["adapter_digest"], record["target"],
                    record["day"],
                )
            )  # fmt: skip
            continue
        if type(number) is not int or not 1 <= number <= len(found):
            raise IntegrityError(
                f"{record['event']} of number {number!r}, which nobody reserved", "Compare with a copy"
            )
        known = found[number - 1]
        if record["event"] == "board_attempt":
            found[number - 1] = replace(_moved(known, "attempted"), attempts=(*known.attempts, record["day"]))
        elif record["event"] == "board_sent":
            found[number - 1] = replace(_moved(known, "sent"), is_sent=True)
        else:
            found[number - 1] = _scored(known, record)
    return tuple(found)


def _moved(known: Submission, state: str) -> Submission:
    """On its way; a score or a withdrawal that a person wrote meanwhile stays."""
    return known if known.state in ("scored", "withdrawn") else replace(known, state=state, why="")


def _scored(known: Submission, record: Record) -> Submission:
    """The newest word on a number. Raises IntegrityError for a score that no target may print."""
    if record.get("withdrawn"):
        return replace(known, state="withdrawn", printed=None, why=record.get("why", ""))
    printed = record["score"]
    if printed is None:
        return replace(known, state="failed", printed=None, why=record.get("why", ""))
    try:
        return replace(known, state="scored", printed=parse_score(printed), why="")
    except (ConfigError, TypeError):
        raise IntegrityError(f"board_score of number {known.number} is {printed!r}", "Compare with a copy") from None


def known_scores(records: Iterable[Record], purpose: str = "slot") -> dict[str, dict[str, Decimal]]:
    """Round -> arm -> score of what was sent for this purpose; without a score nothing stands there. Repeats of the reference are
    `reference-1`, `reference-2`, by number."""
    found: dict[str, dict[str, Decimal]] = {}
    for one in submissions_in(records):
        if one.purpose == purpose and one.score is not None:
            name = f"{REFERENCE}-{one.number}" if one.arm == REFERENCE else one.arm
            found.setdefault(one.round, {})[name] = one.score
    return found


def reference_score(records: Iterable[Record]) -> Decimal | None:
    """Mean of the reference's scores that are known and not withdrawn (34 digits); None without any."""
    scores = [score for found in known_scores(records, REFERENCE).values() for score in found.values()]
    exact = Context(prec=34)
    total = Decimal(0)
    for score in scores:
        total = exact.add(total, score)
    return exact.divide(total, Decimal(len(scores))) if scores else None
