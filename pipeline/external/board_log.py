"""What is written into the sealed log about submissions before they are sent, and of what came back: reservations and scores."""

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
    """Today, as the log has it."""
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
    """The number of a submission, reserved in the log; the same (round, arm, purpose, copy) has the same number whoever asks.

    today: UTC, ISO. target: external.kind. copy: 2 and more for repeats of the reference and of finalists.
    Raises Refused by article 4 (daily_cap, campaign_cap, held_back, already_submitted), ConfigError for what is no such thing.
    """
    if target == "none":
        raise ConfigError(
            "there is no external target to submit to", "external=local, kaggle, command or manual names one"
        )
    given: list[Submission] = []

    def make(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
        one = submission_caps.reservation(
            records, caps, round_name=round_name, arm=arm, purpose=purpose, adapter_digest=adapter_digest, target=target,
            today=today, copy=copy,
        )  # fmt: skip
        given.append(one)
        if one.number <= len(board_submissions.submissions_in(records)):
            return None
        names = ("number", "round", "arm", "purpose", "adapter_digest", "target", "day")
        return "submission", {name: getattr(one, name) for name in names}

    Log(campaign.log).append_from(make)
    return given[0].number


def set_score(campaign: Campaign, number: int, score: str | None) -> None:
    """What a person says of a submission: its score, or None for withdrawn. Raises ConfigError, NotFound."""
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
    """Append a `board_score` unless it is the newest record of its number already; a withdrawal is taken back by persons alone.

    Returns whether it was appended. Raises NotFound for a number that is not reserved.
    """
    done: list[bool] = []

    def make(records: list[dict[str, Any]]) -> tuple[str, Mapping[str, Any]] | None:
        check_reserved(records, payload["number"])
        mine = [one for one in records if one["event"].startswith("board_") and one["number"] == payload["number"]]
        scores = [one for one in mine if one["event"] == "board_score"]
        if scores and "by" not in payload and "by" in scores[-1]:
            before = [one for one in scores if "by" not in one]
            # What the target said before a person knew better is no news.
            if scores[-1].get("withdrawn") or (before and before[-1]["score"] == payload["score"]):
                return None
        if (
            mine
            and {key: value for key, value in mine[-1].items() if key not in ("seq", "previous", "event")} == payload
        ):
            return None
        done.append(True)
        return "board_score", payload

    log.append_from(make)
    return bool(done)


def check_reserved(records: list[dict[str, Any]], number: int) -> None:
    """Raises NotFound for a number that is not reserved."""
    num_reserved = len(board_submissions.submissions_in(records))
    if not 1 <= number <= num_reserved:
        raise NotFound(f"number {number} is not reserved", f"The log has {num_reserved} submissions")
