"""The submission ledger: what was sent to the external target, and which score was known when, read from the sealed log alone.

    submission      number 3, round r0002, arm a5, purpose slot, adapter_digest, target kaggle, day 2026-11-24     the reservation
    board_attempt   number 3, day 2026-11-25                                             about to be sent, written before the act
    board_sent      number 3                                                      the target took it: it is asked, never sent again
    board_score     number 3, score "0.84" | null with why, withdrawn true | absent      the newest of a number counts

A submission is reserved before anything is sent, so that no crash, requeue or second process spends more than the caps. A day is UTC
and never before the newest in the log: a clock set back gains nothing, one set ahead no more than the campaign's cap. What is said
here of a prefix of the log is what was known at its end: late, revised and withdrawn scores change what comes after them alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from decimal import Context, Decimal
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, Refused

PURPOSES = ("reference", "slot", "finalist")
REFERENCE = "reference"
SCORE = re.compile(r"0(\.[0-9]{1,5})?|1(\.0{1,5})?")
EVENTS = ("submission", "board_attempt", "board_sent", "board_score")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Caps:
    """Article 4's numbers: submissions a UTC day and a campaign, of these kept for finalists, and how often the reference is sent."""

    per_day: int
    per_campaign: int
    held_back: int
    reference: int


def caps_of(article: Mapping[str, Any], target: str) -> Caps:
    """Caps from the content of article 4 for a kind of target; a constitution that names none allows none."""
    a_day = article.get("submissions_per_day", {}).get(target, 0)
    names = ("submissions", "submissions_held_back", "reference_submissions")
    return Caps(int(a_day), *(int(article.get(name, 0)) for name in names))


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


def counted_day(submissions: Iterable[Submission], today: str) -> str:
    """The day that an act of today counts on. Raises ConfigError for what is no ISO date."""
    try:
        valid = date.fromisoformat(today).isoformat() == today
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{today!r} is no day", "Valid: an ISO date in UTC, such as 2026-11-24")
    return max([today, *(day for one in submissions for day in one.days)])


def used_on(submissions: Iterable[Submission], day: str) -> int:
    """Submissions that count on this day: reserved or sent on it."""
    return sum(day in one.days for one in submissions)


def reservation(
    records: Iterable[Record],
    caps: Caps,
    *,
    round_name: str,
    arm: str,
    purpose: str,
    adapter_digest: str,
    target: str,
    today: str,
    copy: int = 1,
) -> Submission:
    """The `copy`-th submission of this round, arm and purpose: the one in the log, or the next number, not yet logged.

    copy: above 1 for a byte-identical repeat, which the reference (in any round, up to caps.reference) and finalists may have; to ask
    for the same copy again, after a requeue or from a second process, gives the same number.
    Raises Refused by article 4: daily_cap, campaign_cap, held_back, already_submitted (with another adapter, or no such repeat).
    """
    if purpose not in PURPOSES or (arm == REFERENCE) != (purpose == REFERENCE):
        raise ConfigError(
            f"purpose {purpose!r} of arm {arm!r}", "Valid: slot or finalist of an arm, reference of the reference"
        )
    known = submissions_in(records)
    same = _same(known, round_name, arm, purpose)
    most = {"reference": caps.reference, "slot": 1, "finalist": caps.per_campaign}[purpose]
    if not 1 <= copy <= min(most, len(same) + 1):
        raise Refused(
            "4", "already_submitted", f"{round_name}/{arm} was sent {len(same)} times as {purpose}, repeat {copy} is not open",
            f"As {purpose} it may be sent {most} times, one after the other",
        )  # fmt: skip
    other = next((one for one in same if one.adapter_digest != adapter_digest), None)
    if other:
        raise Refused(
            "4", "already_submitted", f"{round_name}/{arm} was sent as number {other.number} with another adapter "
            f"({other.adapter_digest[:12]}, now {adapter_digest[:12]})", "What was sent under a name stays what it was",
        )  # fmt: skip
    if copy <= len(same):
        return same[copy - 1]
    day = counted_day(known, today)
    _check_caps(known, caps, purpose, day)
    return Submission(len(known) + 1, round_name, arm, purpose, adapter_digest, target, day)


def _same(known: tuple[Submission, ...], round_name: str, arm: str, purpose: str) -> list[Submission]:
    """Earlier submissions of the same; the reference is the campaign's, whichever round sends it."""
    return [
        one
        for one in known
        if (one.arm, one.purpose) == (arm, purpose) and (purpose == REFERENCE or one.round == round_name)
    ]


def _check_attempt(record: Record, before: list[Record], caps: Caps) -> None:
    """That an act of sending counts on the day that the caps leave it."""
    try:
        day = attempt_day(submissions_in(before), caps, record["number"], record["day"])
    except Refused as error:
        raise IntegrityError(
            f"sending submission {record['number']} was not allowed: {error.what}", error.cure
        ) from None
    if day != record["day"]:
        raise IntegrityError(
            f"sending submission {record['number']} counts on {day}, not {record['day']}", "Compare the log with a copy"
        )


def verify(records: Iterable[Record], caps: Caps) -> int:
    """Replay every reservation on the records before it; returns how many there are. For an audit, which trusts no writer.

    Raises IntegrityError naming the first number that the caps, or the newest day in the log, would not have given.
    """
    before: list[Record] = []
    count = 0
    for record in records:
        if record["event"] == "board_attempt":
            _check_attempt(record, before, caps)
        if record["event"] == "submission":
            arm, purpose, round_name = record["arm"], record["purpose"], record["round"]
            same = _same(submissions_in(before), round_name, arm, purpose)
            try:
                given = reservation(
                    before, caps, round_name=round_name, arm=arm, purpose=purpose, adapter_digest=record["adapter_digest"],
                    target=record["target"], today=record["day"], copy=len(same) + 1,
                )  # fmt: skip
            except (ConfigError, Refused) as error:
                raise IntegrityError(
                    f"submission {record['number']} was not allowed: {error.what}", error.cure
                ) from None
            if (given.number, given.day) != (record["number"], record["day"]):
                raise IntegrityError(
                    f"submission {record['number']} of {record['day']} should be {given.number} of {given.day}", "Compare the log with a copy"
                )  # fmt: skip
            count += 1
        before.append(record)
    submissions_in(before)  # what came after the last reservation, too
    return count


def _check_caps(known: tuple[Submission, ...], caps: Caps, purpose: str, day: str) -> None:
    others = sum(one.purpose != "finalist" for one in known)
    open_to_others = caps.per_campaign - caps.held_back
    if len(known) >= caps.per_campaign:
        raise Refused(
            "4", "campaign_cap", f"{len(known)} submissions are spent of {caps.per_campaign}", "A new campaign"
        )
    if purpose != "finalist" and others >= open_to_others:
        raise Refused(
            "4", "held_back", f"{others} submissions are spent of {open_to_others}", f"{caps.held_back} more are kept for finalists"
        )  # fmt: skip
    if used_on(known, day) >= caps.per_day:
        raise _daily_cap(used_on(known, day), caps, day)


def left_of(known: tuple[Submission, ...], caps: Caps, day: str) -> dict[str, int]:
    """Submissions that the caps still allow: on the day, in the campaign, and those of it that are kept for finalists alone."""
    others = sum(one.purpose != "finalist" for one in known)
    in_all = max(0, caps.per_campaign - len(known))
    to_others = min(in_all, max(0, caps.per_campaign - caps.held_back - others))
    return {"day": max(0, caps.per_day - used_on(known, day)), "campaign": to_others, "finalists": in_all - to_others}


def attempt_day(known: tuple[Submission, ...], caps: Caps, number: int, today: str) -> str:
    """The day that sending this number now counts on. Raises Refused (daily_cap) where what was reserved on another day has no room."""
    day = counted_day(known, today)
    used = used_on((one for one in known if one.number != number), day)
    if day not in known[number - 1].days and used >= caps.per_day:
        raise _daily_cap(used, caps, day)
    return day


def _daily_cap(used: int, caps: Caps, day: str) -> Refused:
    return Refused(
        "4", "daily_cap", f"{used} submissions count on {day} UTC, {caps.per_day} are allowed",
        "The next day has room; a day is never before the newest in the log",
    )  # fmt: skip
