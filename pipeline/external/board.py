"""Send reserved submissions to the external target, ask for their scores, and log every step.

    reserve   board_log.py reserves a number under the log's lock and within the caps, before anything is sent
    attempt   logged before each sending; a process that finds an attempt without an end asks the target before it sends again
    sent      logged once the target has accepted a submission, which is never sent again after that
    score     late, missing, revised or withdrawn: the newest record of a number counts for every decision after it

A target that is down stops nothing. The log says why there is no score, the round closes without one, and the next meta stage asks again.
A score that is missing external.give_up_days after its sending is given up: no stage waits for it any more, but each still asks once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import date
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, PipelineError, Refused, TargetFailed
from pipeline.campaign.files import exclusive_lock
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config.schema import External
from pipeline.config.settings import Settings
from pipeline.decision import board_submissions, submission_caps
from pipeline.decision.board_submissions import Submission
from pipeline.decision.submission_caps import Caps
from pipeline.external import board_log, outbox
from pipeline.external.target_client import Answer, Target, Ticket, failure
from pipeline.external.targets import target_of

POLL_SECONDS = 15.0
SETTLED = ("scored", "withdrawn")
PASSING = (
    "unreachable",
    "timeout",
)  # failures to ask after which the same pass asks again; a failure to send waits for another pass


def take_scores(
    campaign: Campaign,
    facts: Mapping[str, Any],
    chosen: Settings,
    caps: Caps,
    *,
    today: str | None = None,
    target: Target | None = None,
    pack: outbox.Pack | None = None,
) -> list[str]:
    """Send every reserved submission of this and earlier rounds, ask for scores, log them, and return one line per submission.

    The meta stage calls this between `reserve` and the decision, in a private mount namespace. With external.push=login it fills the
    outbox and sends nothing. It does not raise where the target is down, an adapter is missing or a cap is reached. Where another
    process works with the board, it leaves the work to that one. today, target, pack: replace the real ones in tests.
    """
    external = chosen.external
    target = target or target_of(external, campaign.folder)
    if target is None:
        return []
    if external.kind == "local":
        pack = None
    elif pack is None and (external.kind != "command" or "{archive}" in "".join(external.command)):
        pack = outbox.packer(campaign, facts, chosen)
    with ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(campaign.board_lock, "process with the board"))
        except ConfigError as error:
            return [f"this process leaves the board to another one: {error.what}"]
        board = Board(campaign, facts, caps, target, today, external)
        if board.has_outbox:
            lines = board.fill_outbox(pack)
            if external.push == "login":
                return lines
        return board.send(external.wait_seconds)


def push(
    campaign: Campaign,
    facts: Mapping[str, Any],
    chosen: Settings,
    caps: Caps,
    *,
    wait_seconds: int = 0,
    dry_run: bool = False,
    today: str | None = None,
    target: Target | None = None,
) -> list[str]:
    """Send what is in the outbox and was not sent, and ask for missing scores: the command `board push`, on a login node.

    Returns one line per submission; with dry_run, what it would do. Raises ConfigError without an external target, and while another
    process works with the board. Running it again is harmless.
    """
    target = target or target_of(chosen.external, campaign.folder)
    if target is None:
        raise ConfigError(
            "this campaign has no external target", "Start a new campaign with external=kaggle external.push=login"
        )
    with exclusive_lock(campaign.board_lock, "process with the board"):
        board = Board(campaign, facts, caps, target, today, chosen.external)
        return board.describe_send() if dry_run else board.send(wait_seconds)


class Board:
    """One pass over all submissions of a campaign, by the process that holds the board's lock."""

    def __init__(
        self, campaign: Campaign, facts: Mapping[str, Any], caps: Caps, target: Target, today: str | None, external: External
    ) -> None:  # fmt: skip
        """today: a fixed UTC day for tests; None takes the day of each attempt, because a pass may last past midnight."""
        self.campaign, self.facts, self.caps, self.target, self.today = campaign, facts, caps, target, today
        self.has_outbox = external.kind != "local"
        self.give_up_days = external.give_up_days if external.score == "public" else 0  # private scores come at the end
        self.takes_more = True  # until the target says that its limit is reached
        self.log = Log(campaign.log)

    def submissions(self) -> tuple[Submission, ...]:
        """Read every submission from the log."""
        return board_submissions.submissions_in(self.log.records())

    def fill_outbox(self, pack: outbox.Pack | None) -> list[str]:
        """Add every unsent submission to the outbox; returns one line for each."""
        lines = []
        for submission in self.submissions():
            if submission.state in SETTLED or submission.is_sent:
                continue
            try:
                outbox.add(self.campaign, self.facts, submission, pack)
                lines.append(f"{name_of(submission)} is in the outbox")
            except PipelineError as error:
                lines.append(self.log_failure(submission, error))
        return lines

    def describe_send(self) -> list[str]:
        """Return one line per submission that says what `send` would do."""
        lines = []
        for submission in self.submissions():
            name = name_of(submission)
            is_ready = not self.has_outbox or outbox.is_ready(self.campaign, submission.number)
            if submission.state in SETTLED:
                if submission.state == "scored" and submission.attempts and self.has_outbox:
                    lines.append(f"ask again for the score of {name}")
            elif submission.is_sent:
                lines.append(f"ask for the score of {name}")
            elif not is_ready:
                lines.append(f"skip {name}, because it is not in the outbox")
            elif submission.attempts:
                lines.append(f"ask for the score of {name}, and send it if the target does not know it")
            else:
                lines.append(f"send {name}")
        return lines

    def send(self, wait_seconds: float) -> list[str]:
        """Send and ask until every submission is settled or the time is over; returns one line per submission with news."""
        deadline = time.monotonic() + wait_seconds
        lines: dict[int, str] = {}
        pending = [submission for submission in self.submissions() if submission.state != "withdrawn"]
        while True:
            lines |= {submission.number: line for submission in pending if (line := self.advance(submission))}
            # A failed submission waits for another pass, because each try uploads everything again.
            pending = [submission for submission in self.submissions() if is_waited_for(submission)]
            if not pending or time.monotonic() >= deadline:
                return [lines[number] for number in sorted(lines)]
            time.sleep(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))

    def advance(self, submission: Submission) -> str:
        """Send one submission or ask for its score; returns a line for a person, "" without news."""
        try:
            answer = self.deliver(submission)
        except Refused as error:
            return f"{name_of(submission)} was not sent yet: {error}"
        except PipelineError as error:
            return self.log_failure(submission, error)
        if answer is None:
            return ""
        if answer.printed is None and self.is_overdue(submission):
            return self.log_failure(submission, failure("late", f"no score {self.give_up_days} days after it was sent"))
        if answer.printed is None:
            return f"{name_of(submission)} was sent and has no score yet" + (f" ({answer.note})" if answer.note else "")
        note = {"note": answer.note} if answer.note else {}
        is_new = board_log.record(self.log, {"number": submission.number, "score": answer.printed, **note})
        outbox.remove(self.campaign, submission.number)
        return f"{name_of(submission)} scored {answer.printed}" if is_new else ""

    def deliver(self, submission: Submission) -> Answer | None:
        """Ask the target where the submission may have been sent, else send it. None where it is settled and there is no news."""
        if submission.state == "scored" and (not submission.attempts or not self.has_outbox):
            return None  # a person typed the score before anything was sent, or the local board gave it: it is final
        ticket = self.ticket_of(submission)
        if submission.attempts:
            answer = self.target.poll(ticket)
            if answer is not None and (answer.printed is not None or submission.state != "scored"):
                return self.log_sent(submission, answer)
        if submission.state == "scored":
            return None
        if submission.is_sent:
            return Answer()
        if self.has_outbox and not outbox.is_ready(self.campaign, submission.number):
            raise NotFound(f"number {submission.number} is not in the outbox", "The meta stage puts it there")
        if not self.takes_more:
            raise Refused(
                "4",
                "board_limit",
                "the target takes no more submissions now",
                "The next meta stage or `board push` tries",
            )
        self.log_attempt(submission)
        try:
            return self.log_sent(submission, self.target.submit(ticket))
        except TargetFailed as error:
            self.takes_more = error.kind != "limit"  # the others would upload everything for the same refusal
            raise

    def ticket_of(self, submission: Submission) -> Ticket:
        """Return what the target is given of a submission."""
        number, folder = submission.number, outbox.folder_of(self.campaign, submission.number)
        message, since = outbox.message_of(self.facts, submission), min(submission.attempts, default="")
        return Ticket(number, message, folder / "adapter", folder / outbox.ARCHIVE, since, submission.is_sent)

    def log_attempt(self, submission: Submission) -> None:
        """Log that the submission is about to be sent. Raises Refused (daily_cap)."""

        def make(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
            known, today = board_submissions.submissions_in(records), self.today or board_log.utc_day()
            day = submission_caps.attempt_day(known, self.caps, submission.number, today)
            return "board_attempt", {"number": submission.number, "day": day}

        self.log.append_from(make)

    def log_sent(self, submission: Submission, answer: Answer) -> Answer:
        """Log that the target has the submission, again where asking had failed since; returns `answer`."""
        if submission.state == "failed" and submission.is_sent:
            if answer.printed is None and not self.is_overdue(submission):
                self.log.append("board_sent", number=submission.number)
        else:
            self.log.append_once("board_sent", number=submission.number)
        return answer

    def is_overdue(self, submission: Submission) -> bool:
        """Whether a missing score is given up: external.give_up_days UTC days have passed since the last sending."""
        if not self.give_up_days or not submission.attempts:
            return False
        today = date.fromisoformat(self.today or board_log.utc_day())
        return (today - date.fromisoformat(submission.attempts[-1])).days > self.give_up_days

    def log_failure(self, submission: Submission, error: PipelineError) -> str:
        """Log why there is no score, unless a score is known already; returns a line for a person."""
        if submission.state == "scored":
            return f"{name_of(submission)} keeps its score, because asking again failed: {error}"
        # The message of an IntegrityError holds paths, which differ between machines.
        what = "adapter or record changed" if isinstance(error, IntegrityError) else error.what
        board_log.record(self.log, {"number": submission.number, "score": None, "why": f"{error.kind}: {what}"})
        return f"{name_of(submission)} has no score: {error}"


def is_waited_for(submission: Submission) -> bool:
    """Whether a pass asks again for a score: the target may have the submission, and it did not refuse it."""
    return submission.state in ("sent", "attempted") or (
        submission.state == "failed" and submission.is_sent and submission.why.partition(":")[0] in PASSING
    )


def name_of(submission: Submission) -> str:
    """Return how lines for a person name a submission."""
    return f"number {submission.number} ({submission.round}/{submission.arm}, {submission.purpose})"
