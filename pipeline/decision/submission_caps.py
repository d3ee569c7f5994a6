"""Apply the caps of article 4 to submissions: which number the next one gets, and on which day it counts.

A submission is reserved before anything is sent, so that no crash, requeue or second process exceeds the caps. Days are UTC and never
before the newest day in the log: a clock that is set back gains nothing, and one that is set ahead at most the campaign's cap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, Refused
from pipeline.decision.board_submissions import EVENTS, REFERENCE, Record, Submission, submissions_in

PURPOSES = ("reference", "slot", "finalist")


@dataclass(frozen=True)
class Caps:
    """The numbers of article 4. `held_back` submissions of the campaign are for finalists alone; `reference`: times it may be sent."""

    per_day: int
    per_campaign: int
    held_back: int
    reference: int


def caps_of(article: Mapping[str, Any], target: str) -> Caps:
    """Read the caps of one kind of target from article 4; a number that the article lacks is 0."""
    per_day = article.get("submissions_per_day", {}).get(target, 0)
    names = ("submissions", "submissions_held_back", "reference_submissions")
    return Caps(int(per_day), *(int(article.get(name, 0)) for name in names))


def counted_day(submissions: Iterable[Submission], today: str) -> str:
    """Return the day on which an act of today counts: today, or the newest day in the log. Raises ConfigError unless it is an ISO date."""
    try:
        valid = date.fromisoformat(today).isoformat() == today
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{today!r} is not a day", "Valid: an ISO date in UTC, such as 2026-11-24")
    return max([today, *(day for submission in submissions for day in submission.days)])


def used_on(submissions: Iterable[Submission], day: str) -> int:
    """Return how many submissions count on a day because they were reserved or sent on it."""
    return sum(day in submission.days for submission in submissions)


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
    """Return submission number `copy` of this round, arm and purpose: the one in the log, or a new one that the caller must log.

    copy: above 1 for a byte-identical repeat, which only the reference (up to caps.reference in all rounds) and finalists may have. The
    same copy gives the same number again, for example after a requeue. Raises ConfigError for a purpose that does not fit the arm, and
    Refused by article 4: daily_cap, campaign_cap, held_back, already_submitted (with another adapter, or too many repeats).
    """
    if purpose not in PURPOSES or (arm == REFERENCE) != (purpose == REFERENCE):
        raise ConfigError(
            f"purpose {purpose!r} does not fit arm {arm!r}",
            "Valid: slot or finalist for an arm, reference for the reference",
        )
    known = submissions_in(records)
    same = _same(known, round_name, arm, purpose)
    most = {"reference": caps.reference, "slot": 1, "finalist": caps.per_campaign}[purpose]
    if not 1 <= copy <= min(most, len(same) + 1):
        raise Refused(
            "4", "already_submitted", f"{round_name}/{arm} was sent {len(same)} times as {purpose}, repeat {copy} is not open",
            f"As {purpose} it may be sent {most} times; ask for repeats in order",
        )  # fmt: skip
    other = next((earlier for earlier in same if earlier.adapter_digest != adapter_digest), None)
    if other:
        raise Refused(
            "4", "already_submitted", f"{round_name}/{arm} was sent as number {other.number} with another adapter "
            f"({other.adapter_digest[:12]}, now {adapter_digest[:12]})", "Restore the adapter that was sent, from a copy",
        )  # fmt: skip
    if copy <= len(same):
        return same[copy - 1]
    day = counted_day(known, today)
    _check_caps(known, caps, purpose, day)
    return Submission(len(known) + 1, round_name, arm, purpose, adapter_digest, target, day)


def _same(known: tuple[Submission, ...], round_name: str, arm: str, purpose: str) -> list[Submission]:
    """Return the earlier submissions of this arm for this purpose; those of the reference count in every round."""
    return [
        earlier
        for earlier in known
        if (earlier.arm, earlier.purpose) == (arm, purpose) and (purpose == REFERENCE or earlier.round == round_name)
    ]


def _check_attempt(record: Record, before: list[Record], caps: Caps) -> None:
    """Raise IntegrityError where the caps did not allow a sending, or counted it on another day. before: the earlier records."""
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
    """Check every reservation and sending against the records before it; returns the number of reservations. Audits call this.

    Raises IntegrityError, which names the first submission that the caps or the newest day in the log did not allow.
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
                allowed = reservation(
                    before, caps, round_name=round_name, arm=arm, purpose=purpose, adapter_digest=record["adapter_digest"],
                    target=record["target"], today=record["day"], copy=len(same) + 1,
                )  # fmt: skip
            except (ConfigError, Refused) as error:
                raise IntegrityError(
                    f"submission {record['number']} was not allowed: {error.what}", error.cure
                ) from None
            if (allowed.number, allowed.day) != (record["number"], record["day"]):
                raise IntegrityError(
                    f"submission {record['number']} of {record['day']} should be {allowed.number} of {allowed.day}", "Compare the log with a copy"
                )  # fmt: skip
            count += 1
        if record["event"] in EVENTS:
            before.append(record)
    submissions_in(before)  # checks the records after the last reservation as well
    return count


def _check_caps(known: tuple[Submission, ...], caps: Caps, purpose: str, day: str) -> None:
    """Raise Refused where the caps leave no room for a new submission on this day."""
    others = sum(submission.purpose != "finalist" for submission in known)
    open_to_others = caps.per_campaign - caps.held_back
    if len(known) >= caps.per_campaign:
        raise Refused(
            "4",
            "campaign_cap",
            f"{len(known)} submissions are spent of {caps.per_campaign}",
            "Start a new campaign for more",
        )
    if purpose != "finalist" and others >= open_to_others:
        raise Refused(
            "4", "held_back", f"{others} submissions are spent of {open_to_others}", f"The other {caps.held_back} are for finalists"
        )  # fmt: skip
    if used_on(known, day) >= caps.per_day:
        raise _daily_cap(used_on(known, day), caps, day)


def left_of(known: tuple[Submission, ...], caps: Caps, day: str) -> dict[str, int]:
    """Return how many submissions the caps still allow: on the `day`, in the `campaign`, and further ones for `finalists` alone."""
    others = sum(submission.purpose != "finalist" for submission in known)
    in_all = max(0, caps.per_campaign - len(known))
    to_others = min(in_all, max(0, caps.per_campaign - caps.held_back - others))
    return {"day": max(0, caps.per_day - used_on(known, day)), "campaign": to_others, "finalists": in_all - to_others}


def attempt_day(known: tuple[Submission, ...], caps: Caps, number: int, today: str) -> str:
    """Return the day on which sending this number now counts. Raises Refused (daily_cap) where that day has no room for it."""
    day = counted_day(known, today)
    used = used_on((other for other in known if other.number != number), day)
    if day not in known[number - 1].days and used >= caps.per_day:
        raise _daily_cap(used, caps, day)
    return day


def _daily_cap(used: int, caps: Caps, day: str) -> Refused:
    return Refused(
        "4", "daily_cap", f"{used} submissions count on {day} UTC, {caps.per_day} are allowed",
        "Try again on the next UTC day; a submission never counts on a day before the newest in the log",
    )  # fmt: skip
