"""Kaggle as the external target: send submissions and read scores through its command-line client."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.campaign.errors import TargetFailed
from pipeline.external.target_client import (
    Answer,
    Ticket,
    clean,
    failure,
    kind_of_words,
    one_line,
    run_client,
    score_in,
)

LIST_SECONDS = 10.0  # for which a list of submissions is used again
PAGE = 20  # submissions that the client lists at most
HEADER = {"description", "status", "publicscore"}  # columns that every list has
READ = HEADER | {"privatescore"}
NO_TEXT = ("", "none", "null", "nan", "n/a", "-", "false", "0")  # in a cell for errors
NO_SCORE = ("", "none", "null", "nan", "n/a", "-", "pending")  # in a cell for scores


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
            raise failure("no_archive", f"{ticket.archive.name} of number {ticket.number} is not in the outbox")
        self._listed = None
        output = self.client("submit", "-c", self.competition, "-f", str(ticket.archive), "-m", ticket.message)
        if answer := self.poll(ticket):
            return answer
        if "successfully submitted" not in output.lower():
            kind = kind_of_words(one_line(output))
            raise failure(kind, f"the client ended well, but nothing was submitted: {clean(output)}")
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

        A submission that is complete and has no score is waited for, because Kaggle shows some scores later than the status. It shows
        private scores only after the deadline, and at once for later submissions.
        """
        status = row.get("status", "complete").rpartition(".")[2].strip().lower()
        public, private = row.get("publicscore", "").strip(), row.get("privatescore", "").strip()
        wanted = public if self.score == "public" else private
        has_score = status in ("complete", "completed") and wanted.lower() not in NO_SCORE
        said = [value for name, value in row.items() if "error" in name and value.strip().lower() not in NO_TEXT]
        error = clean("; ".join(said))
        if re.search("error|fail|invalid|reject|cancel", status) or (
            error and status.startswith("complete") and not has_score
        ):
            raise failure("rejected", f"Kaggle could not score it: {error or 'its page says why'}")
        if not has_score:
            return Answer(None, error)
        late = (
            f"late: after the deadline (public {public}, private {private})" if private.lower() not in NO_SCORE else ""
        )
        return Answer(score_in(wanted, "Kaggle"), "; ".join(filter(None, (late, error))))

    def client(self, *arguments: str) -> str:
        """Run `kaggle competitions` and return its output. Raises TargetFailed."""
        return run_client(["kaggle", "competitions", *arguments], self.timeout_seconds)


def parse_submissions(text: str) -> list[dict[str, str]]:
    """Parse the client's CSV, the newest submission first; warnings may come before the header.

    Column names lose their capitals and whatever is no letter or digit, so that `publicScore` and `public_score` are one. Raises
    TargetFailed: unclear for text that is no list, or has a column twice that we read, or the kind of failure that the text tells of.
    """
    lines = text.removeprefix("\ufeff").splitlines(keepends=True)
    header = next((at for at, line in enumerate(lines) if _is_header(line)), None)
    if header is None and any(line.strip().lower().startswith("no submissions") for line in lines):
        return []
    if header is None:
        raise failure(kind_of_words(one_line(text), "unclear"), f"kaggle printed no list of submissions: {clean(text)}")
    names = _names(lines[header])
    if twice := [name for name in names if names.count(name) > 1 and (name in READ or "error" in name)]:
        raise failure("unclear", f"kaggle printed a list of submissions that has the column {twice[0]} more than once")
    try:
        rows = csv.DictReader(io.StringIO("".join(lines[header + 1 :]), newline=""), names)
        return [{key: value or "" for key, value in row.items() if key} for row in rows]
    except csv.Error as error:
        raise failure("unclear", f"kaggle printed a list of submissions that is no CSV ({error})") from None


def _names(line: str) -> list[str]:
    """Return the column names that a line would have as a header."""
    return [re.sub("[^a-z0-9]", "", name.lower()) for name in line.split(",")]


def _is_header(line: str) -> bool:
    """Whether a line is the list's header: it has the columns that every list has, and no cell that is no name, as a warning has."""
    return HEADER <= set(_names(line)) and all(re.fullmatch(r'\s*"?[\w ]*"?\s*', cell) for cell in line.split(","))
