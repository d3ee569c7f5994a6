"""What a meta stage does with the external target before it decides: choose, reserve in the log, send, take what came.

    reference     as often as article 4 says, before the first round decides
    slots         the arms of a round that follow from the log (derive.choose_submissions), once, as soon as the round can be decided
    finalists     the held-back submissions: byte-identical repeats of the campaign's best, after its last round or by `board finalists`

A choice is logged before it is reserved, and a submission is reserved before it is sent. A cap that refuses a submission stops nobody:
the refusal is logged, and the next meta stage asks for that submission again, after those of its own round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
"""Of a submission: round, arm, purpose, copy."""


@dataclass(frozen=True)
class RoundSubmissions:
    """One meta stage at the external target. `history` follows `log`: the meta stage reads the campaign through the same two.

    Nothing here raises for a target that is down or a cap that is reached. The caller holds the round's meta lock, in a private mount
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
        """With a log and a history of its own, for who has none."""
        log = Log(campaign.log)
        return cls(campaign, round_name, facts, chosen, rules, log, history.Follower(log.records))

    def take(self) -> list[str]:
        """Reserve what this round calls for, send what is reserved, take what scores there are; returns what to tell, a line each.

        Nothing is chosen before the round can be decided.
        """
        if self.chosen.external.kind == "none":
            return []
        if derive.derive_round(self.history.now(), self.round_name).decision.state not in decide.CLOSING:
            return self._send()
        self.log.append_from(lambda records: choice(self.history.after(records), self.round_name))
        return self._reserve(slots(self.history.now(), self.round_name, self.rules)) + self._send()

    def finish(self, *, dry_run: bool = False) -> list[str]:
        """The finalists' repeats, of the campaign as it stands: chosen once, reserved, sent. Returns what to tell."""
        if self.chosen.external.kind == "none":
            return []
        if dry_run:
            known = self.history.now().finalists or derive.choose_finalists(self.history.now())
            return [f"send {name}/{arm} once more, as a finalist" for name, arm in known]
        self.log.append_from(lambda records: finalists(self.history.after(records)))
        wanted = [(name, arm, "finalist", 1) for name, arm in self.history.now().finalists]
        return self._reserve(wanted) + self._send()

    @property
    def _caps(self) -> submission_caps.Caps:
        return submission_caps.caps_of(self.rules.articles["4"], self.chosen.external.kind)

    def _send(self) -> list[str]:
        return board.take_scores(self.campaign, self.facts, self.chosen, self._caps)

    def _reserve(self, wanted: Iterable[Wanted]) -> list[str]:
        """Reserve each, and log what was refused under the round of this meta stage."""
        said, closed = [], set()
        known = self.history.now()  # no reservation changes an outcome
        for name, arm, purpose, copy in wanted:
            if (name, arm, purpose) in closed:
                continue  # a repeat of what was refused
            digest = derive.digest_of(known, name, arm)
            if not digest:
                said.append(f"{name}/{arm} ({purpose}) is not submitted: it has no adapter")
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
                said.append(f"{name}/{arm} ({purpose}) is not submitted: {error}")
                closed.add((name, arm, purpose))
        return said


def choice(known: History, round_name: str) -> tuple[str, dict[str, Any]] | None:
    """The record of a round's arms to submit; None where it is there."""
    if round_name in known.chosen:
        return None
    return history.CHOSEN, {"round": round_name, "arms": list(derive.choose_submissions(known, round_name))}


def finalists(known: History) -> tuple[str, dict[str, Any]] | None:
    """The record of the finalists; None where it is there, or where there are none."""
    found = [] if known.finalists else [list(each) for each in derive.choose_finalists(known)]
    return (history.FINALISTS, {"finalists": found}) if found else None


def slots(known: History, round_name: str, rules: Constitution) -> Iterator[Wanted]:
    """What is to be reserved, in order: the reference, this round's choice, then what earlier rounds chose and were refused."""
    for copy in range(1, int(rules.articles["4"]["reference_submissions"]) + 1):
        yield round_name, history.REFERENCE, history.REFERENCE, copy
    for name in sorted((each for each in known.chosen if each <= round_name), reverse=True):
        yield from ((name, arm, "slot", 1) for arm in known.chosen[name])
