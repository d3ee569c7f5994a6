"""Submissions to the external target: send what board_log.py reserved, ask, and write into the sealed log what was known when.

    reserve   under the log's lock, within the caps: a number, before anything is sent
    attempt   logged before each act; whoever finds one without an answer asks the target first, and sends only what it does not know
    sent      logged when the target took it: from then on it is only asked
    score     late, missing, repeated, revised, withdrawn: the newest record of a number counts for what comes after it

A target that is down stops nobody: the log says why there is no score, a round closes without it, and the next meta stage asks again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, PipelineError, Refused
from pipeline.campaign.files import exclusive_lock
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config.settings import Settings
from pipeline.decision import board_submissions, submission_caps
from pipeline.decision.board_submissions import Submission
from pipeline.decision.submission_caps import Caps
from pipeline.external import board_log, outbox
from pipeline.external.target_client import Answer, Target, Ticket
from pipeline.external.targets import target_of

POLL_SECONDS = 15.0
SETTLED = ("scored", "withdrawn")


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
    """What the meta stage does with everything that is reserved, of this round or an earlier one: send it, ask, log what came.

    Call it between `reserve` and the decision, in a private mount namespace. With external.push=login it fills the outbox and sends
    nothing. Never raises for a target that is down, an adapter that is gone or a cap that is reached; returns what to tell, a line a
    number. Two at once: the second leaves it to the first. target, pack: others than the configured ones, for tests.
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
            return [f"the board is left to another process: {error.what}"]
        board = Board(campaign, facts, caps, target, today, has_outbox=external.kind != "local")
        if board.has_outbox:
            said = board.fill(pack)
            if external.push == "login":
                return said
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
    """What `board push` does on a login node: send what the outbox has and nobody sent, and ask for what was sent.

    Raises ConfigError while another process has the board. Again and again is as good as once.
    """
    target = target or target_of(chosen.external, campaign.folder)
    if target is None:
        raise ConfigError("this campaign has no external target", "external=kaggle, and push=login, in a new campaign")
    with exclusive_lock(campaign.board_lock, "process with the board"):
        board = Board(campaign, facts, caps, target, today, has_outbox=chosen.external.kind != "local")
        return board.plan() if dry_run else board.send(wait_seconds)


class Board:
    """One pass over the ledger, by whoever holds the board's lock."""

    def __init__(
        self, campaign: Campaign, facts: Mapping[str, Any], caps: Caps, target: Target, today: str | None, *, has_outbox: bool
    ) -> None:  # fmt: skip
        """today: for tests; else the day of each attempt, for a pass may wait past midnight."""
        self.campaign, self.facts, self.caps, self.target, self.today = campaign, facts, caps, target, today
        self.has_outbox = has_outbox
        self.log = Log(campaign.log)

    def ledger(self) -> tuple[Submission, ...]:
        return board_submissions.submissions_in(self.log.records())

    def fill(self, pack: outbox.Pack | None) -> list[str]:
        """Put into the outbox what was not sent yet."""
        said = []
        for one in self.ledger():
            if one.state in SETTLED or one.is_sent:
                continue
            try:
                outbox.add(self.campaign, self.facts, one, pack)
                said.append(f"{name_of(one)} is in the outbox")
            except PipelineError as error:
                said.append(self.fail(one, error))
        return said

    def plan(self) -> list[str]:
        """What `send` would do."""
        said = []
        for one in self.ledger():
            if one.state == "scored" and one.attempts and self.has_outbox:
                said.append(f"ask again for {name_of(one)}")
            elif one.state not in SETTLED:
                ready = not self.has_outbox or outbox.is_ready(self.campaign, one.number)
                act = "ask for" if one.is_sent else "ask for, else send," if one.attempts else "send"
                said.append(
                    f"{act} {name_of(one)}" if ready or one.is_sent else f"leave {name_of(one)}: not in the outbox"
                )
        return said

    def send(self, wait_seconds: float) -> list[str]:
        """Send and ask, until everything is settled or the time is over."""
        deadline = time.monotonic() + wait_seconds
        told: dict[int, str] = {}
        asked = [one for one in self.ledger() if one.state != "withdrawn"]
        while True:
            told |= {one.number: line for one in asked if (line := self.look(one))}
            # What failed is for another pass: each try is a whole upload.
            asked = [one for one in self.ledger() if one.state in ("sent", "attempted")]
            if not asked or time.monotonic() >= deadline:
                return [told[number] for number in sorted(told)]
            time.sleep(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))

    def look(self, one: Submission) -> str:
        """Bring one submission on as far as it goes now; what to tell of it."""
        try:
            answer = self.deliver(one)
        except Refused as error:
            return f"{name_of(one)} waits: {error}"
        except PipelineError as error:
            return self.fail(one, error)
        if answer is None:
            return ""
        if answer.printed is None:
            return f"{name_of(one)} is sent; no score yet"
        note = {"note": answer.note} if answer.note else {}
        is_new = board_log.record(self.log, {"number": one.number, "score": answer.printed, **note})
        outbox.remove(self.campaign, one.number)
        return f"{name_of(one)} scored {answer.printed}" if is_new else ""

    def deliver(self, one: Submission) -> Answer | None:
        """Ask first where it may have been sent, then send. None: settled, and nothing new."""
        if one.state == "scored" and (not one.attempts or not self.has_outbox):
            return None  # typed by a person before anything was sent, or ours: it is not revised
        ticket = self.ticket(one)
        if one.attempts:
            answer = self.target.poll(ticket)
            if answer is not None and (answer.printed is not None or one.state != "scored"):
                return self.sent(one, answer)
        if one.state == "scored":
            return None
        if one.is_sent:
            return Answer()
        if self.has_outbox and not outbox.is_ready(self.campaign, one.number):
            raise NotFound(f"number {one.number} is not in the outbox", "The meta stage puts it there")
        self.attempt(one)
        return self.sent(one, self.target.submit(ticket))

    def ticket(self, one: Submission) -> Ticket:
        folder = outbox.folder_of(self.campaign, one.number)
        message, since = outbox.message_of(self.facts, one), min(one.attempts, default="")
        return Ticket(one.number, message, folder / "adapter", folder / outbox.ARCHIVE, since, one.is_sent)

    def attempt(self, one: Submission) -> None:
        """Log that it is about to be sent. Raises Refused (daily_cap)."""

        def make(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
            day = submission_caps.attempt_day(
                board_submissions.submissions_in(records), self.caps, one.number, self.today or board_log.utc_day()
            )
            return "board_attempt", {"number": one.number, "day": day}

        self.log.append_from(make)

    def sent(self, one: Submission, answer: Answer) -> Answer:
        """Log that the target has it."""
        self.log.append_once("board_sent", number=one.number)
        return answer

    def fail(self, one: Submission, error: PipelineError) -> str:
        """Log why there is no score; a score that is known stays."""
        if one.state == "scored":
            return f"{name_of(one)} could not be asked for again: {error}"
        what = (
            "adapter or record changed" if isinstance(error, IntegrityError) else error.what
        )  # whose words hold paths
        board_log.record(self.log, {"number": one.number, "score": None, "why": f"{error.kind}: {what}"})
        return f"{name_of(one)} has no score: {error}"


def name_of(one: Submission) -> str:
    return f"number {one.number} ({one.round}/{one.arm}, {one.purpose})"
