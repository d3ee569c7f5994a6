"""What every external target has: a ticket in, an answer out, and a client program that is run to its end.

No credential passes through here: a client finds its own, and its words are cleaned of credentials before anybody keeps them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.campaign.errors import ConfigError, TargetFailed
from pipeline.decision.board_submissions import parse_score

WORDS = 300  # of a client's own that are kept
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


def run_client(command: Sequence[str], timeout_seconds: int | None, kind_of: Mapping[str, str] | None = None) -> str:
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
