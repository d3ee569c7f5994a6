"""The interface of every external target, and the function that runs a target's client program.

The pipeline handles no credentials: a client finds its own, and `clean` removes them from its output before anything is stored.
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

WORDS = 300  # characters of a client's output that are kept, from its end
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # an upload must end with the process that would log it
SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|USERNAME)", re.IGNORECASE)
LOOKS_SECRET = re.compile(r"\b[0-9a-fA-F]{32,}\b|\bKGAT_\S+|(?<=://)[^/\s@]+@")


@dataclass(frozen=True)
class Ticket:
    """One submission, as a target gets it. `since`: day of the first attempt, "" before any. `is_sent`: the target has accepted it."""

    number: int
    message: str
    adapter_dir: Path
    archive: Path
    since: str = ""
    is_sent: bool = False


@dataclass(frozen=True)
class Answer:
    """`printed` is the score as the target wrote it, None while there is none; `note` is a remark, such as on a late submission."""

    printed: str | None = None
    note: str = ""


class Target(Protocol):
    """Scores submissions. Both methods raise TargetFailed where the outcome is unknown, and may be called again."""

    def submit(self, ticket: Ticket) -> Answer:
        """Send a submission."""

    def poll(self, ticket: Ticket) -> Answer | None:
        """Ask for the score; None where the target does not know the submission, so that it may be sent."""


def run_client(command: Sequence[str], timeout_seconds: int | None, kind_of: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return its stdout. The program is killed where this process dies.

    kind_of: pattern in the output -> kind of failure. Raises TargetFailed with the program's output: client_missing, timeout, a kind of
    `kind_of`, or unreachable.
    """
    try:
        process = subprocess.Popen(
            [*DIES_WITH_US, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise TargetFailed(
            "client_missing", f"no program {DIES_WITH_US[0]}", "Install util-linux, which contains it"
        ) from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TargetFailed("timeout", f"{command[0]} ran longer than {timeout_seconds} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # together with the processes that it started
    if process.returncode in (126, 127) and "failed to execute" in err:  # setpriv's message for a missing program
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
    """Return a printed score. Raises TargetFailed (not_a_score) for text that is not one; who: the program, for the message."""
    try:
        return parse_score(text.strip())
    except ConfigError as error:
        raise TargetFailed("not_a_score", f"{who} printed {clean(error.what)}", error.cure) from None


def clean(text: str) -> str:
    """Make a program's output fit for a record: one printable line, cut to WORDS characters, without credentials.

    Removes values of environment variables with secret names, and text that looks like a credential.
    """
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return LOOKS_SECRET.sub("***", line)[-WORDS:]
