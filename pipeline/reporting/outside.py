"""The newest failure of each outsider that a campaign asks, its board and its proposer, with its kind and cure, for `status`.

It is taken from the sealed log: a board's from the submissions that have no score, a proposer's from the newest answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.decision import board_submissions, proposals


@dataclass(frozen=True)
class Trouble:
    """One failure. who: board, proposer, or log where the log itself cannot be read. about: a submission, or a round."""

    who: str
    about: str
    kind: str
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.who}: {self.about}: {self.kind}: {self.what}. {self.cure}"


def troubles(campaign: Campaign) -> list[Trouble]:
    """Return the newest failure of the board and of the proposer; [] where the newest that is known of both is good."""
    try:
        records = Log(campaign.log).records()
        return [trouble for trouble in (of_board(records), of_proposer(records)) if trouble]
    except IntegrityError as error:
        return [Trouble("log", campaign.log.name, error.kind, error.what, error.cure)]


def of_board(records: Sequence[Mapping[str, Any]]) -> Trouble | None:
    """Return the newest failure of a submission that has no score since; None where there is none."""
    known = board_submissions.submissions_in(records)
    failed = {each.number: each for each in known if each.state == "failed"}
    newest = next(
        (r["number"] for r in reversed(records) if r["event"] == "board_score" and r["number"] in failed), None
    )
    if newest is None:
        return None
    from pipeline.external.target_client import CURES  # imported late, because a status must be quick

    submission = failed[newest]
    kind, _, what = submission.why.partition(": ")
    about = f"number {newest} ({submission.round}/{submission.arm})"
    others = f", and {len(failed) - 1} more have none" if len(failed) > 1 else ""
    return Trouble(
        "board", f"{about} has no score{others}", kind, what, CURES.get(kind, "`board status` shows all of it")
    )


def of_proposer(records: Sequence[Mapping[str, Any]]) -> Trouble | None:
    """Return why the newest answer of a proposer was refused as a whole; None where it was not."""
    newest = next((record for record in reversed(records) if record["event"] == "proposal"), None)
    refused = [verdict for verdict in (newest["verdicts"] if newest else []) if verdict["slot"] == 0]
    if newest is None or not refused:
        return None
    from pipeline.external.chat import CURES  # imported late, because a status must be quick

    kind = refused[0]["code"]
    cures = {**CURES, **proposals.ANSWER_CODES}
    cure = cures.get(kind, "docs/proposals.md explains it; the answer is kept beside the round's plan")
    return Trouble("proposer", f"{newest['round']} got no proposals", kind, refused[0]["what"], cure)
