"""What a meta stage does with the external target before it decides: choose, reserve in the log, send, take what came.

    reference     as often as article 4 says, before the first round decides
    slots         the arms of a round that the referee chooses from the log, once, as soon as the round can be decided
    finalists     the held-back submissions: byte-identical repeats of the campaign's best, after its last round or by `board finalists`

What was chosen is logged before it is reserved, and reserved before it is sent. A cap that refuses stops nobody: the refusal is told
and logged, and the next meta stage asks for that submission again, after its own round's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.campaign.constitution import Constitution
from pipeline.campaign.errors import Refused
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.config.settings import Settings
from pipeline.decision import board_submissions, decide, derive, history
from pipeline.external import board

Wanted = tuple[str, str, str, int]
"""Of a submission: round, arm, purpose, copy."""


def take(
    campaign: Campaign, folder: Round, facts: Mapping[str, Any], chosen: Settings, rules: Constitution
) -> list[str]:
    """Reserve what this round calls for, send what is reserved, take what scores there are; what to tell, a line each.

    The caller holds the round's meta lock, in a private mount namespace. Never raises for a target that is down or a cap that is
    reached. Nothing is chosen before the round can be decided.
    """
    if chosen.external.kind == "none":
        return []
    log = Log(campaign.log)
    if derive.derive(log.records(), folder.name).decision.state not in decide.CLOSING:
        return board.take_scores(campaign, facts, chosen, caps_of(rules, chosen))
    log.append_from(lambda records: choice(records, folder.name))
    refused = reserve(campaign, folder.name, slots(log.records(), folder.name, rules), chosen, rules)
    return refused + board.take_scores(campaign, facts, chosen, caps_of(rules, chosen))


def finish(
    campaign: Campaign, round_name: str, facts: Mapping[str, Any], chosen: Settings, rules: Constitution, *, dry_run: bool = False
) -> list[str]:  # fmt: skip
    """The finalists' repeats, of the campaign as it stands: chosen once, reserved, sent. What to tell. As `take`."""
    if chosen.external.kind == "none":
        return []
    log = Log(campaign.log)
    if dry_run:
        ledger = history.read_history(log.records())
        known = ledger.finalists or derive.choose_finalists(ledger)
        return [f"send {name}/{arm} once more, as a finalist" for name, arm in known]
    log.append_from(finals)
    wanted = [(name, arm, "finalist", 1) for name, arm in history.read_history(log.records()).finalists]
    refused = reserve(campaign, round_name, wanted, chosen, rules)
    return refused + board.take_scores(campaign, facts, chosen, caps_of(rules, chosen))


def caps_of(rules: Constitution, chosen: Settings) -> board_submissions.Caps:
    return board_submissions.caps_of(rules.articles["4"], chosen.external.kind)


def choice(records: list[dict[str, Any]], round_name: str) -> tuple[str, dict[str, Any]] | None:
    """The record of a round's arms to submit; None where it is there."""
    ledger = history.read_history(records)
    if round_name in ledger.chosen:
        return None
    return history.CHOSEN, {"round": round_name, "arms": list(derive.choose_submissions(ledger, round_name))}


def finals(records: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The record of the finalists; None where it is there, or where there are none."""
    ledger = history.read_history(records)
    found = [] if ledger.finalists else [list(each) for each in derive.choose_finalists(ledger)]
    return (history.FINALISTS, {"finalists": found}) if found else None


def slots(records: list[dict[str, Any]], round_name: str, rules: Constitution) -> Iterator[Wanted]:
    """What is to be reserved, in order: the reference, this round's choice, then what earlier rounds chose and were refused."""
    ledger = history.read_history(records)
    for copy in range(1, int(rules.articles["4"]["reference_submissions"]) + 1):
        yield round_name, history.REFERENCE, history.REFERENCE, copy
    for name in sorted((each for each in ledger.chosen if each <= round_name), reverse=True):
        yield from ((name, arm, "slot", 1) for arm in ledger.chosen[name])


def reserve(
    campaign: Campaign, round_name: str, wanted: Iterator[Wanted] | list[Wanted], chosen: Settings, rules: Constitution
) -> list[str]:  # fmt: skip
    """Reserve each; what was refused, logged under the round of this meta stage. Raises nothing for a cap."""
    log, said = Log(campaign.log), []
    ledger = history.read_history(log.records())  # whose outcomes no reservation changes
    closed = set()
    for name, arm, purpose, copy in wanted:
        if (name, arm, purpose) in closed:
            continue  # a repeat of what was refused
        digest = derive.digest_of(ledger, name, arm)
        if not digest:
            said.append(f"{name}/{arm} ({purpose}) is not submitted: it has no adapter")
            continue
        try:
            board.reserve(
                campaign, name, arm, purpose, digest, board.utc_day(),
                caps=caps_of(rules, chosen), target=chosen.external.kind, copy=copy,
            )  # fmt: skip
        except Refused as error:
            about = {"round": round_name, "submission": f"{name}/{arm}", "purpose": purpose, "copy": copy}
            log.append_news(
                "submission_refused", about, article=error.article, code=error.code, what=error.what, cure=error.cure
            )
            said.append(f"{name}/{arm} ({purpose}) is not submitted: {error}")
            closed.add((name, arm, purpose))
    return said
