"""Write reservations and scores of submissions into the sealed log."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.campaign.errors import ConfigError, NotFound
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.decision import board_submissions, submission_caps
from pipeline.decision.board_submissions import Submission
from pipeline.decision.submission_caps import Caps
from pipeline.external import outbox


def utc_day() -> str:
    """Return today's UTC date as the log writes it, such as "2026-11-24"."""
    return datetime.now(UTC).date().isoformat()


def reserve(
    campaign: Campaign,
    round_name: str,
    arm: str,
    purpose: str,
    adapter_digest: str,
    today: str,
    *,
    caps: Caps,
    target: str,
    copy: int = 1,
) -> int:
    """Reserve a submission in the log and return its number. The same (round, arm, purpose, copy) always gets the same number.

    purpose: slot, reference or finalist. today: ISO date in UTC. target: external.kind. copy: 2 and more for repeats of the reference
    and of finalists. Raises Refused by article 4 (daily_cap, campaign_cap, held_back, already_submitted), ConfigError for a purpose
    that does not fit the arm, a bad date, or a campaign without external target.
    """
    if target == "none":
        raise ConfigError(
            "there is no external target to submit to",
            "Start a new campaign with external=local, kaggle, command or manual",
        )
    reserved: list[Submission] = []

    def make(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
        submission = submission_caps.reservation(
            records, caps, round_name=round_name, arm=arm, purpose=purpose, adapter_digest=adapter_digest, target=target,
            today=today, copy=copy,
        )  # fmt: skip
        reserved.append(submission)
        if submission.number <= len(board_submissions.submissions_in(records)):
            return None
        names = ("number", "round", "arm", "purpose", "adapter_digest", "target", "day")
        return "submission", {name: getattr(submission, name) for name in names}

    Log(campaign.log).append_from(make)
    return reserved[0].number


def set_score(campaign: Campaign, number: int, score: str | None) -> None:
    """Log a score that a person typed, or None to withdraw the submission.

    Raises ConfigError for text that is not a score, NotFound for a number that is not reserved.
    """
    payload = {
        "number": number,
        "by": "person",
        "score": None if score is None else board_submissions.parse_score(score),
    }
    if score is None:
        payload["withdrawn"] = True
    record(Log(campaign.log), payload)
    outbox.remove(campaign, number)


def record(log: Log, payload: Mapping[str, Any]) -> bool:
    """Append a `board_score` unless it repeats the newest record of its number; returns whether it was appended.

    A record without `by` comes from the target. It cannot undo a person's withdrawal, and it is ignored where it repeats the target's
    score from before a person's entry. Raises NotFound for a number that is not reserved.
    """
    appended: list[bool] = []

    def make(records: list[dict[str, Any]]) -> tuple[str, Mapping[str, Any]] | None:
        check_reserved(records, payload["number"])
        earlier = [r for r in records if r["event"].startswith("board_") and r["number"] == payload["number"]]
        scores = [record for record in earlier if record["event"] == "board_score"]
        if scores and "by" not in payload and "by" in scores[-1]:
            from_target = [record for record in scores if "by" not in record]
            # Ignore a score that a manual entry has replaced.
            if scores[-1].get("withdrawn") or (from_target and from_target[-1]["score"] == payload["score"]):
                return None
        if (
            earlier
            and {key: value for key, value in earlier[-1].items() if key not in ("seq", "previous", "event")} == payload
        ):
            return None
        appended.append(True)
        return "board_score", payload

    log.append_from(make)
    return bool(appended)


def check_reserved(records: list[dict[str, Any]], number: int) -> None:
    """Raise NotFound for a number that is not reserved."""
    num_reserved = len(board_submissions.submissions_in(records))
    if not 1 <= number <= num_reserved:
        valid = (
            f"Valid: 1 to {num_reserved}, the submissions in the log"
            if num_reserved
            else "The log has no submission yet"
        )
        raise NotFound(f"number {number} is not reserved", valid)
