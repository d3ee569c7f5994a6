"""Kaggle as the external target: send submissions and read scores through its command-line client."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.campaign.errors import TargetFailed
from pipeline.external.target_client import Answer, Ticket, clean, run_client, score_in

LIST_SECONDS = 10.0  # for which a list of submissions is used again
PAGE = 20  # submissions that the client lists at most


@dataclass
class Kaggle:
    """One competition. `score`: public, or private, which Kaggle shows only after the deadline."""

    competition: str
    score: str
    timeout_seconds: int
    _listed: tuple[float, list[dict[str, str]]] | None = None  # when the client gave the list, and its rows

    def submit(self, ticket: Ticket) -> Answer:
        """Upload the archive. Raises TargetFailed (no_archive, rejected, or what the client reports)."""
        if not ticket.archive.is_file():
            raise TargetFailed(
                "no_archive", f"{ticket.archive.name} of number {ticket.number} is not in the outbox", "Run meta"
            )
        self._listed = None
        output = self.client("submit", "-c", self.competition, "-f", str(ticket.archive), "-m", ticket.message)
        if answer := self.poll(ticket):
            return answer
        if "successfully submitted" not in output.lower():
            raise TargetFailed("rejected", f"the client ended well, but nothing was submitted: {clean(output)}")
        return Answer()

    def poll(self, ticket: Ticket) -> Answer | None:
        """Find the submission by its message. Raises TargetFailed (unclear) where a full list lacks it, because it may be an older one."""
        rows = self.rows()
        mine = [row for row in rows if row.get("description", "").strip() == ticket.message]
        if mine:
            return self.answer_of_row(mine[0])
        if ticket.since and len(rows) >= PAGE:  # dates do not help: the log's days may be ahead of Kaggle's
            raise TargetFailed(
                "unclear", f"number {ticket.number} is not among the newest {len(rows)} submissions, and may be older",
                f"Look for {ticket.message!r} on the competition's page, then type its score with `board score`",
            )  # fmt: skip
        return None

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of our submissions, at most LIST_SECONDS old."""
        if self._listed is None or time.monotonic() - self._listed[0] > LIST_SECONDS:
            rows = parse_submissions(self.client("submissions", "-c", self.competition, "--csv"))
            self._listed = (time.monotonic(), rows)
        return self._listed[1]

    def answer_of_row(self, row: Mapping[str, str]) -> Answer:
        """Return the answer in a row of the list. Raises TargetFailed (rejected) where Kaggle could not score the submission.

        Kaggle shows private scores only after the deadline, and at once for later submissions.
        """
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
        """Run `kaggle competitions` and return its output. Raises TargetFailed."""
        return run_client(["kaggle", "competitions", *arguments], self.timeout_seconds, FAILURE_KINDS)


FAILURE_KINDS = {
    r"\b401\b|unauthori[sz]ed|kaggle\.json|authenticat": "credentials",
    r"limit|too many|\b429\b|submissions (per|a) day": "limit",
    r"\b403\b|forbidden|rules": "rules",
    r"\b400\b|\b404\b|not found|could not find": "rejected",
}
"""Pattern in the client's output -> kind of failure; the first match counts."""


def parse_submissions(text: str) -> list[dict[str, str]]:
    """Parse the client's CSV, the newest submission first; warnings may come before the header. Raises TargetFailed (unclear)."""
    lines = text.splitlines()
    if any(line.strip().lower().startswith("no submissions") for line in lines):
        return []
    header = next((at for at, line in enumerate(lines) if "description" in line.split(",")), None)
    if header is None:
        raise TargetFailed(
            "unclear", f"kaggle printed no list of submissions: {clean(text)}", "Install another version of the client"
        )
    return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(lines[header:])]
