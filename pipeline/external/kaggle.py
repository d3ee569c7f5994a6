"""Kaggle as the external target, through its command-line client."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.campaign.errors import TargetFailed
from pipeline.external.target_client import Answer, Ticket, clean, run_client, score_in

LIST_SECONDS = 10.0  # that a list is good for
PAGE = 20  # submissions that the client lists at once


@dataclass
class Kaggle:
    """A competition, through the official client. `score`: public, or private, which is shown after the deadline."""

    competition: str
    score: str
    timeout_seconds: int
    _seen: tuple[float, list[dict[str, str]]] | None = None  # the list, and when it was asked for

    def submit(self, ticket: Ticket) -> Answer:
        if not ticket.archive.is_file():
            raise TargetFailed(
                "no_archive", f"{ticket.archive.name} of number {ticket.number} is not in the outbox", "Run meta"
            )
        self._seen = None
        said = self.client("submit", "-c", self.competition, "-f", str(ticket.archive), "-m", ticket.message)
        if found := self.poll(ticket):
            return found
        if "successfully submitted" not in said.lower():
            raise TargetFailed("rejected", f"the client ended well, but nothing was submitted: {clean(said)}")
        return Answer()

    def poll(self, ticket: Ticket) -> Answer | None:
        """Raises TargetFailed (unclear) where the list is full and has no such row: it may have been sent before those."""
        rows = self.rows()
        mine = [row for row in rows if row.get("description", "").strip() == ticket.message]
        if mine:
            return self.read(mine[0])
        if ticket.since and len(rows) >= PAGE:  # the log's days may be ahead of Kaggle's: they prove nothing
            raise TargetFailed(
                "unclear", f"number {ticket.number} is not among the newest {len(rows)} submissions, and may be older",
                f"Look for {ticket.message!r} on the competition's page, then `board score`",
            )  # fmt: skip
        return None

    def rows(self) -> list[dict[str, str]]:
        """The competition's list of our submissions; several that are asked for at once look into the same."""
        if self._seen is None or time.monotonic() - self._seen[0] > LIST_SECONDS:
            rows = listed(self.client("submissions", "-c", self.competition, "--csv"))
            self._seen = (time.monotonic(), rows)
        return self._seen[1]

    def read(self, row: Mapping[str, str]) -> Answer:
        """A row of the list. Kaggle shows a private score only after the deadline, and at once for what is sent then."""
        status = row.get("status", "").rpartition(".")[2].lower()
        public, private = row.get("publicScore", "").strip(), row.get("privateScore", "").strip()
        if status == "error":
            raise TargetFailed("rejected", "Kaggle could not score it (its page says why)")
        wanted = public if self.score == "public" else private
        if status != "complete" or (self.score == "private" and not private):
            return Answer()
        note = f"late: after the deadline (public {public}, private {private})" if private else ""
        return Answer(score_in(wanted, "Kaggle"), note)

    def client(self, *arguments: str) -> str:
        return run_client(["kaggle", "competitions", *arguments], self.timeout_seconds, kaggle_kind)


kaggle_kind = {
    r"\b401\b|unauthori[sz]ed|kaggle\.json|authenticat": "credentials",
    r"limit|too many|\b429\b|submissions (per|a) day": "limit",
    r"\b403\b|forbidden|rules": "rules",
    r"\b400\b|\b404\b|not found|could not find": "rejected",
}
"""The client's own words -> what kind of failure it is; the first that fits."""


def listed(text: str) -> list[dict[str, str]]:
    """Rows of the client's CSV, the newest first; warnings may stand before the header. Raises TargetFailed (unclear)."""
    lines = text.splitlines()
    if any(line.strip().lower().startswith("no submissions") for line in lines):
        return []
    header = next((at for at, line in enumerate(lines) if "description" in line.split(",")), None)
    if header is None:
        raise TargetFailed(
            "unclear", f"kaggle printed no list of submissions: {clean(text)}", "Try another version of the client"
        )
    return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(lines[header:])]
