"""External targets behind one protocol: send a submission, ask what became of one. What is down says so and may be asked again.

    local     a process of this machine, `python -m pipeline board local` (local_board.py)
    kaggle    the official client, `kaggle competitions submit|submissions`; its list is searched for our message before anything is sent
    command   a site's own scorer
    manual    a person, who types the score (`board score`)

No credential passes through here: a client finds its own, and what it says is cleaned of them before anybody keeps it.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import ConfigError, TargetFailed
from pipeline.schema import External
from pipeline.submissions import parse_score

HERE = Path(__file__).resolve().parent.parent
WORDS = 300  # of a client's own that are kept
LIST_SECONDS = 10.0  # that a list is good for
PAGE = 20  # submissions that the client lists at once
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # an upload must not go on when nobody will know of it
SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|USERNAME)", re.IGNORECASE)
LOOKS_SECRET = re.compile(r"\b[0-9a-fA-F]{32,}\b|\bKGAT_\S+|(?<=://)[^/\s@]+@")


@dataclass(frozen=True)
class Ticket:
    """One submission as a target is given it. `since`: the day of the first attempt, empty before. is_sent: the target took it."""

    number: int
    message: str
    adapter_dir: Path
    archive: Path
    since: str = ""
    is_sent: bool = False


@dataclass(frozen=True)
class Answer:
    """`printed` is the score as the target wrote it, None while there is none; `note` tells of a late submission."""

    printed: str | None = None
    note: str = ""


class Target(Protocol):
    """Both raise TargetFailed; then nothing is known and the same may be asked again."""

    def submit(self, ticket: Ticket) -> Answer:
        """Send it."""

    def poll(self, ticket: Ticket) -> Answer | None:
        """What became of it; None where the target knows no such submission: it may be sent, unless it is known that it was."""


def target_of(external: External, campaign_dir: Path) -> Target | None:
    """The configured target; None where nobody else scores."""
    kind = external.kind
    if kind == "local":
        return Local(campaign_dir)
    if kind == "kaggle":
        return Kaggle(external.competition, external.score, external.timeout_seconds)
    if kind == "command":
        return Command(tuple(external.command), tuple(external.poll_command), external.timeout_seconds)
    return Manual() if kind == "manual" else None


@dataclass(frozen=True)
class Local:
    """The local board: as often as it is asked, one submission has one score, so there is nothing to ask first."""

    campaign_dir: Path

    def submit(self, ticket: Ticket) -> Answer:
        command = [sys.executable, "-P", "-m", "pipeline", "board", "local", str(self.campaign_dir), str(ticket.number)]
        said = ask(["env", f"PYTHONPATH={HERE}", *command], None, {"": "local_board"})
        return Answer(score_in(said, "the local board"))

    def poll(self, ticket: Ticket) -> Answer | None:
        return None


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
        return ask(["kaggle", "competitions", *arguments], self.timeout_seconds, kaggle_kind)


@dataclass(frozen=True)
class Command:
    """A site's scorer. Without a second command to ask, the first is repeated under the same number after a kill."""

    command: tuple[str, ...]
    poll_command: tuple[str, ...]
    timeout_seconds: int

    def submit(self, ticket: Ticket) -> Answer:
        word = self.last_word(self.command, ticket)
        return Answer() if word == "pending" else Answer(score_in(word, self.command[0]))

    def poll(self, ticket: Ticket) -> Answer | None:
        if not self.poll_command:
            return self.submit(ticket) if ticket.is_sent else None
        word = self.last_word(self.poll_command, ticket)
        if word == "unknown":
            return None
        return Answer() if word == "pending" else Answer(score_in(word, self.poll_command[0]))

    def last_word(self, command: Sequence[str], ticket: Ticket) -> str:
        values = {
            "{adapter}": str(ticket.adapter_dir), "{archive}": str(ticket.archive), "{number}": str(ticket.number),
            "{message}": ticket.message,
        }  # fmt: skip
        filled = [re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], word) for word in command]
        return (ask(filled, self.timeout_seconds).strip().splitlines() or [""])[-1].strip()


class Manual:
    """A person sends what is in the outbox and types the score."""

    def submit(self, ticket: Ticket) -> Answer:
        return Answer()

    def poll(self, ticket: Ticket) -> Answer | None:
        return Answer() if ticket.since else None


def ask(command: Sequence[str], timeout_seconds: int | None, kind_of: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; what it wrote to stdout. It dies with this process.

    Raises TargetFailed with the program's own words: client_missing, timeout, else by `kind_of` (pattern -> kind), or unreachable.
    """
    try:
        process = subprocess.Popen(
            [*DIES_WITH_US, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise TargetFailed("client_missing", f"no program {DIES_WITH_US[0]}", "It is part of util-linux") from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TargetFailed("timeout", f"{command[0]} ran longer than {timeout_seconds} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
    if (
        process.returncode in (126, 127) and "failed to execute" in err
    ):  # setpriv's words for a program that is not there
        raise TargetFailed(
            "client_missing", f"no program {command[0]} that can be run", "Install it where the submission is sent"
        )
    if process.returncode:
        words = clean(f"{err}\n{out}")
        kind = next(
            (kind for pattern, kind in (kind_of or {}).items() if re.search(pattern, words, re.IGNORECASE)),
            "unreachable",
        )
        raise TargetFailed(kind, f"{Path(command[0]).name} ended with exit code {process.returncode}: {words}")
    return out


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


def score_in(text: str, who: str) -> str:
    """A printed score. Raises TargetFailed (not_a_score)."""
    try:
        return parse_score(text.strip())
    except ConfigError as error:
        raise TargetFailed("not_a_score", f"{who} printed {clean(error.what)}", error.cure) from None


def clean(text: str) -> str:
    """A program's words for a record: one line, printable, cut, and without what looks like a credential or is one of the environment's."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return LOOKS_SECRET.sub("***", line)[-WORDS:]
