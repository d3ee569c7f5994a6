"""The kinds of external target, each with the methods `submit` and `poll` (target_client.Target).

local     a process of this machine, `python -m pipeline board local` (local_board.py)
kaggle    the official client, `kaggle competitions submit|submissions`; before a second sending, its list is searched (kaggle.py)
command   a site's own scorer
manual    a person, who types the score (`board score`)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.campaign.layout import CODE_ROOT
from pipeline.config.schema import External
from pipeline.external.kaggle import Kaggle
from pipeline.external.target_client import Answer, Target, Ticket, run_client, score_in


def target_of(external: External, campaign_dir: Path) -> Target | None:
    """Return the configured target, or None for external=none."""
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
    """The local board. It gives a submission the same score each time, so `poll` need not ask."""

    campaign_dir: Path

    def submit(self, ticket: Ticket) -> Answer:
        command = [sys.executable, "-P", "-m", "pipeline", "board", "local", str(self.campaign_dir), str(ticket.number)]
        output = run_client(["env", f"PYTHONPATH={CODE_ROOT}", *command], None, lambda words: "local_board")
        return Answer(score_in(output, "the local board"))

    def poll(self, ticket: Ticket) -> Answer | None:
        return None


@dataclass(frozen=True)
class Command:
    """A site's scorer. The last line of its output is a score, `pending`, or for `poll_command` also `unknown`.

    Without a `poll_command`, `poll` runs `command` again with the same number.
    """

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
        """Run a command with its placeholders filled in; returns the last line of its output, a word in small letters. Raises TargetFailed."""
        values = {
            "{adapter}": str(ticket.adapter_dir), "{archive}": str(ticket.archive), "{number}": str(ticket.number),
            "{message}": ticket.message,
        }  # fmt: skip
        filled = [re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], word) for word in command]
        return (run_client(filled, self.timeout_seconds).strip().splitlines() or [""])[-1].strip().lower()


class Manual:
    """A person, who sends the files in the outbox and types the score."""

    def submit(self, ticket: Ticket) -> Answer:
        return Answer()

    def poll(self, ticket: Ticket) -> Answer | None:
        return Answer() if ticket.since else None
