"""External targets behind one protocol: send a submission, ask what became of one. What is down says so and may be asked again.

    local     a process of this machine, `python -m pipeline board local` (local_board.py)
    kaggle    the official client, `kaggle competitions submit|submissions`; its list is searched for our message before anything is sent
    command   a site's own scorer
    manual    a person, who types the score (`board score`)

No credential passes through here: a client finds its own, and what it says is cleaned of them before anybody keeps it.
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
        said = run_client(["env", f"PYTHONPATH={CODE_ROOT}", *command], None, {"": "local_board"})
        return Answer(score_in(said, "the local board"))

    def poll(self, ticket: Ticket) -> Answer | None:
        return None


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
        return (run_client(filled, self.timeout_seconds).strip().splitlines() or [""])[-1].strip()


class Manual:
    """A person sends what is in the outbox and types the score."""

    def submit(self, ticket: Ticket) -> Answer:
        return Answer()

    def poll(self, ticket: Ticket) -> Answer | None:
        return Answer() if ticket.since else None
