"""The submissions of one meta stage, before it decides: choose arms, reserve numbers, send adapters, collect scores.

    reference     sent as often as article 4 says, before the first round decides
    slots         arms that the log determines (derive.choose_submissions), chosen once, as soon as the round can be decided
    finalists     byte-identical repeats of the campaign's best arms, from the submissions that were held back: after the last round, or
                  by `board finalists`

A choice is logged before its submissions are reserved, and a submission is reserved before it is sent. Where a cap refuses a submission,
the refusal is logged and the meta stage goes on; the next one tries again, after the submissions of its own round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import Refused
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config.settings import Settings
from pipeline.decision import decide, derive, history, submission_caps
from pipeline.decision.history import History
from pipeline.external import board, board_log

Wanted = tuple[str, str, str, int]
"""A submission to reserve: (round, arm, purpose, copy)."""


@dataclass(frozen=True)
class RoundSubmissions:
    """The submissions of one round's meta stage. `history` follows `log`; the meta stage reads the campaign through the same two objects.

    No method raises where the target is down or a cap is reached. The caller holds the round's meta lock and has entered a private mount
    namespace.
    """

    campaign: Campaign
    round_name: str
    facts: Mapping[str, Any]
    chosen: Settings
    rules: Constitution
    log: Log
    history: history.Follower

    @classmethod
    def of(
        cls, campaign: Campaign, round_name: str, facts: Mapping[str, Any], chosen: Settings, rules: Constitution
    ) -> RoundSubmissions:
        """Make one with a log and history of its own, for callers that have none."""
        log = Log(campaign.log)
        return cls(campaign, round_name, facts, chosen, rules, log, history.Follower(log.records))

    def take(self, before_sending: Callable[[], None] = lambda: None) -> list[str]:
        """Reserve this round's submissions, send all that are reserved and collect scores; returns lines for a person.

        Arms are chosen only once the round can be decided. before_sending: is called once all are reserved.
        """
        if self.chosen.external.kind == "none":
            return []
        if derive.derive_round(self.history.now(), self.round_name).decision.state not in decide.CLOSING:
            before_sending()
            return self._send()
        self.log.append_from(lambda records: choice(self.history.after(records), self.round_name))
        lines = self._reserve(slots(self.history.now(), self.round_name, self.rules))
        before_sending()
        return lines + self._send()

    def finish(self, *, dry_run: bool = False, before_sending: Callable[[], None] = lambda: None) -> list[str]:
        """Choose the finalists once, then reserve and send their repeats; returns lines for a person.

        dry_run: only what would be sent. before_sending: as `take`.
        """
        if self.chosen.external.kind == "none":
            return []
        if dry_run:
            known = self.history.now().finalists or derive.choose_finalists(self.history.now())
            return [f"send {name}/{arm} again, as a finalist" for name, arm in known]
        self.log.append_from(lambda records: finalists(self.history.after(records)))
        wanted = [(name, arm, "finalist", 1) for name, arm in self.history.now().finalists]
        lines = self._reserve(wanted)
        before_sending()
        return lines + self._send()

    @property
    def _caps(self) -> submission_caps.Caps:
        return submission_caps.caps_of(self.rules.articles["4"], self.chosen.external.kind)

    def _send(self) -> list[str]:
        return board.take_scores(self.campaign, self.facts, self.chosen, self._caps)

    def _reserve(self, wanted: Iterable[Wanted]) -> list[str]:
        """Reserve each submission, and log each refusal under this meta stage's round; returns lines about those not reserved."""
        lines, closed = [], set()
        known = self.history.now()  # read once, because reservations change no outcome
        for name, arm, purpose, copy in wanted:
            if (name, arm, purpose) in closed:
                continue  # an earlier copy was refused
            digest = derive.digest_of(known, name, arm)
            if not digest:
                lines.append(f"{name}/{arm} ({purpose}) is not submitted: it has no adapter")
                continue
            try:
                board_log.reserve(
                    self.campaign, name, arm, purpose, digest, board_log.utc_day(),
                    caps=self._caps, target=self.chosen.external.kind, copy=copy,
                )  # fmt: skip
            except Refused as error:
                about = {"round": self.round_name, "submission": f"{name}/{arm}", "purpose": purpose, "copy": copy}
                self.log.append_news(
                    "submission_refused",
                    about,
                    article=error.article,
                    code=error.code,
                    what=error.what,
                    cure=error.cure,
                )
                lines.append(f"{name}/{arm} ({purpose}) is not submitted: {error}")
                closed.add((name, arm, purpose))
        return lines


def choice(known: History, round_name: str) -> tuple[str, dict[str, Any]] | None:
    """Return the record that chooses a round's arms; None where the log has it."""
    if round_name in known.chosen:
        return None
    return history.CHOSEN, {"round": round_name, "arms": list(derive.choose_submissions(known, round_name))}


def finalists(known: History) -> tuple[str, dict[str, Any]] | None:
    """Return the record that chooses the finalists; None where the log has it, or where no arm can be one."""
    chosen = [] if known.finalists else [list(finalist) for finalist in derive.choose_finalists(known)]
    return (history.FINALISTS, {"finalists": chosen}) if chosen else None


def slots(known: History, round_name: str, rules: Constitution) -> Iterator[Wanted]:
    """Yield what to reserve, in order: the reference, the arms of this round, then those of earlier rounds, the newest first."""
    for copy in range(1, int(rules.articles["4"]["reference_submissions"]) + 1):
        yield round_name, history.REFERENCE, history.REFERENCE, copy
    for name in sorted((chosen_in for chosen_in in known.chosen if chosen_in <= round_name), reverse=True):
        yield from ((name, arm, "slot", 1) for arm in known.chosen[name])
