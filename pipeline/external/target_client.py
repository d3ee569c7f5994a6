"""The interface of every external target, and the function that runs a target's client program.

The pipeline handles no credentials: a client finds its own, and `clean` removes them from its output before anything is stored.

`kind_of_words` sorts what a client says. `unreachable` is the connection alone, by phrases and never by one word: names, refused or broken
connections, time, TLS, proxies, and a server that fails itself (5xx). Whatever else a client says is the board's own answer, and at least `rejected`.
"""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.campaign.errors import ConfigError, TargetFailed
from pipeline.config.credentials import masked
from pipeline.decision.board_submissions import parse_score

WORDS = 300  # characters of a client's output that are kept, from its beginning and its end
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # an upload must end with the process that would log it
NO_NEWS = re.compile(  # progress bars, and what Kaggle's client says to everybody
    r"^.*\d%\|.*$|^Warning: (Looks like you're using an outdated|Your Kaggle API key is readable).*$"
    r"|^If this is unexpected, you can re-run.*$|^traceback\. If you think this is a bug.*$",
    re.MULTILINE,
)
MARKUP = re.compile(r"<(script|style|svg)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)
CURES: Mapping[str, str] = {
    "client_missing": "Install it where the submission is sent",
    "client_broken": "Mend what its words name where the submission is sent: the client's version and packages, disk, rights",
    "credentials": "Give the client valid credentials where it runs",
    "rules": "Accept the rules, or have phone or identity verified, on the board's page, with the account that sends",
    "limit": "The board allows no more now; the next meta stage or `board push` tries again",
    "rejected": "Mend what the board's words name; the next meta stage or `board push` tries again",
    "unreachable": "Check network, proxy and certificates where the submission is sent; the next meta stage or `board push` tries again",
    "timeout": "Set a longer external.timeout_seconds in a new campaign, or send from a faster line",
    "not_a_score": "Type the score with `board score` if you know it",
    "unclear": "Look on the board's page for the submission; if it has a score there, type it with `board score`",
    "no_archive": "Run the meta stage again, which packs it",
    "local_board": "Read the message; the next meta stage tries again",
    "late": "Every meta stage still asks, and a score counts from then on; or type it with `board score`",
}
"""Kind of failure -> its cure. The kinds stand in the sealed log, before the words."""


def _status(*numbers: int) -> str:
    """Return a pattern for an HTTP status, which is not any number of these digits."""
    number = f"({'|'.join(map(str, numbers))})"
    return (
        rf"(?<![\w.]){number}\W{{1,3}}(-|client|server|error|reason|unauthor|forbidden|too|not|bad|payment|request|internal|service|gateway)"
        rf"|((http\S*|status|code|error|responses?)\W{{0,9}}|^){number}\b(?! +(rows|lines|files|bytes|columns|submissions))|\({number}\)"
    )


SORTS: Sequence[tuple[str, str]] = (
    ("limit", "too many 429 error"),
    ("unreachable",
     r"connection ?(error|refused|reset|aborted|broken|closed|timed|timeout|failed)|max retries exceeded|remote ?(end )?(closed|disconnected)"
     r"|(connect|read|write|socket|operation|connection|request|handshake)\w* ?time?d?.?out|timeouterror|timeout was reached"
     r"|name or service not known|name resolution|getaddrinfo|nodename nor servname|could ?n.t resolve|could not resolve|no address associated"
     r"|unknown host|no such host|network is (unreachable|down)|no route to host|host is (down|unreachable)|failed to (connect\b|establish a)"
     r"|\[ssl\b|\bssl: [a-z]+_|ssl(cert\w*|eof|zeroreturn)?error|(ssl|tls)\w{0,3}\b( \w+){0,2} (handshake|alert|connect|error|fail|problem)|gnutls"
     r"|certificate.?verif(y|ication).?failed|self.signed certificate|local issuer certificate|hostname mismatch|\bx509:|alert handshake"
     r"|proxyerror|connect(ing|ion)? to (the )?proxy"
     r"|proxy (connect(ion)?|tunnel\w{0,4}|authenticat\w{1,4}|server|handshake)( \w+){0,2} (fail|refus|requir|abort|error|unreach)"
     r"|proxy \w+ required|tunnel(l?ing)? (connection )?fail|eof occurred in|incompleteread|protocolerror|chunkedencodingerror|broken ?pipe"
     r"|(you|we|it|kaggle|server|site|host) (are|is|seems?|appears?)( to be| currently)? offline"
     r"|bad gateway|gateway time-?out|service (is )?(temporarily |currently )?unavailable|internal server error|problem on kaggle's side"
     r"|" + _status(407, *range(500, 505), *range(520, 531))),
    ("client_broken",
     r"modulenotfounderror|importerror|no module named|syntaxerror|command not found|unrecognized arguments|invalid choice"
     r"|disk quota|no space left|memoryerror|errno 13|read-only file system|permission denied: '"),
    ("credentials", r"kaggle\.json"),
    ("limit",  # stands before what may only be a hint, such as that a phone that is verified allows more
     r"max\w*( allowed| number)?( of)?( \d+)?( daily| allowed)? (submissions|entries)\b|\b(submissions?|entries|entry) (per|a|each) day\b"
     r"|\b(no|0|zero)( more)? (submissions|entries) (left|remain)|(daily|today'?s) submissions? (limit|cap|allowance|quota)"
     r"|(submissions?|entries) (limit|quota|cap) (was |were |is |has been )?(reached|exceeded|exhausted)|too many (submissions|entries)"),
    ("rules", r"phone|\bidentity\b|captcha|verification|team (size|merg)"),
    ("rejected", r"too (large|big)|file size|max\w* (allowed )?(file )?size|size limit|exceeds .{0,20}size|" + _status(413)),
    ("rejected", r"no longer accept|not accepting|deadline|has (ended|closed|finished)|(is|are|was) (closed|over|finished)|already (ended|closed)"),
    ("rejected", r"not found|could not find|" + _status(404)),
    ("limit",
     r"(daily|today|hourly|weekly|total|lifetime|max\w*|all)\b.{0,40}\b(submissions?|entries)\b|\b(per|a|each) day\b|quota|allowance"
     r"|\b(submissions?|entries)\b.{0,40}\b(remain\w*|left|limit\w*|today|daily|cap|maximum|exhausted|used up)\b|rate.?limit|throttl"
     r"|(daily|submissions?|request|usage) (limit|cap)|limits? (was |were |is |has been )?(reached|exceeded)|too many (submissions|requests|entries)"
     r"|(reached|exceeded|hit|over|used) .{0,40}(limit|maximum)|" + _status(429)),
    ("credentials",
     r"unauthori[sz]ed|authenticat|credential|\bapi (token|key)|access.token|\blog ?in\b|logged in|sign in|invalid (token|key)"
     r"|(token|session|key) (has |is )?(expired|invalid)|expired (token|session|key)|" + _status(401)),
    ("rules",
     r"forbidden|\brules\b|\bterms\b|\bverif(y|ied)\b|eligib|not allowed|not permitted|must (join|enter|register|accept)|permission"
     r"|not .{0,20}(joined|entered|registered|a participant)|access denied|don't have access|" + _status(403)),
)  # fmt: skip
"""(kind, pattern in a client's output), the first that fits counts: what names the cause stands before a status that goes with many."""


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


def kind_of_words(words: str, otherwise: str = "rejected") -> str:
    """Return the kind of failure that a client's output tells of: the first of SORTS, `otherwise` where none fits."""
    return next((kind for kind, pattern in SORTS if re.search(pattern, words, re.IGNORECASE)), otherwise)


def run_client(
    command: Sequence[str], timeout_seconds: int | None, kind_of: Callable[[str], str] = kind_of_words
) -> str:
    """Run a program to its end and return its stdout. The program is killed where this process dies.

    kind_of: the output as one line -> kind of failure. Raises TargetFailed with the program's own words: client_missing, timeout, unclear
    for a program that was killed or said nothing, or what `kind_of` gives.
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
            raise failure("timeout", f"{command[0]} ran longer than {timeout_seconds} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # together with the processes that it started
    if process.returncode in (126, 127) and "failed to execute" in err:  # setpriv's message for a missing program
        raise failure("client_missing", f"no program {command[0]} that can be run")
    if process.returncode:
        words = one_line(f"{err}\n{out}")
        kind = kind_of(words) if words and process.returncode > 0 else "unclear"
        raise failure(kind, f"{Path(command[0]).name} ended with exit code {process.returncode}: {shortened(words)}")
    return out


def failure(kind: str, what: str) -> TargetFailed:
    """Return a failure with the cure of its kind."""
    return TargetFailed(kind, what, CURES[kind])


def score_in(text: str, who: str) -> str:
    """Return a printed score. Raises TargetFailed (not_a_score) for text that is not one; who: the program, for the message."""
    try:
        return parse_score(text.strip())
    except ConfigError as error:
        raise TargetFailed("not_a_score", f"{who} printed {clean(error.what)}", error.cure) from None


def clean(text: str) -> str:
    """Make a program's output fit for a record: one printable line of at most WORDS characters, without credentials."""
    return shortened(one_line(text))


def one_line(text: str) -> str:
    """Return a program's output as one printable line, without credentials, markup, and lines that are no news."""
    text = masked(text)  # a credential of several lines too
    if re.search(r"<(!doctype|html|head|body)\b", text, re.IGNORECASE):
        text = html.unescape(MARKUP.sub(" ", text))
    text = NO_NEWS.sub("", text.replace("\r", "\n"))
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return masked(line)


def shortened(line: str) -> str:
    """Return a line of at most WORDS characters, without its middle: clients begin with the cause, and tracebacks end with it."""
    half = WORDS // 2
    return line if len(line) <= WORDS else f"{line[: half - 5].rstrip()} ... {line[-half:].lstrip()}"
