"""`board`: the external target by hand: what was sent and what is left (`status`), send from a login node (`push`), type a score (`score`), the
finalists' repeats (`finalists`)."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import Campaign

Verb = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add(verb: Verb) -> None:
    """Declare the commands. verb: makes a sub-parser from name, function and text."""
    acts = verb("board", status_verb, "The external target: submissions, their scores, and sending them by hand.")
    choices = acts.add_subparsers(required=True, metavar="ACT")

    def act(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = choices.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("campaign", type=Path)
        return sub

    sub = act("status", status_verb, "Every submission, its state and score, and what is left of the caps.")
    sub.add_argument("--json", action="store_true")

    sub = act(
        "push",
        push_verb,
        "Send what is in the outbox, and ask for scores: on a node with internet, as often as one likes.",
    )
    sub.add_argument("--wait", type=int, default=0, metavar="SECONDS", help="for scores; default: ask once")
    sub.add_argument("--dry-run", action="store_true")

    sub = act(
        "score", score_verb, "Type the score of a submission, or take it back; the newest word on a number counts."
    )
    sub.add_argument("number", type=int)
    sub.add_argument("score", nargs="?", help="0 to 1, at most five places")
    sub.add_argument("--withdraw", action="store_true")
    sub.add_argument("--dry-run", action="store_true")

    sub = act(
        "finalists",
        finalists_verb,
        "After the last round: have the campaign's best scored once more, by what was held back for it.",
    )
    sub.add_argument("--dry-run", action="store_true")

    sub = act("local", local_verb, "What the meta stage starts: score a reserved submission with the local board.")
    sub.add_argument("number", type=int)


def status_verb(arguments: argparse.Namespace) -> None:
    from pipeline.campaign.log import Log
    from pipeline.decision import board_submissions, submission_caps
    from pipeline.external import board, board_log

    campaign, _, chosen, caps = frozen_campaign(arguments)
    known, today = board_submissions.submissions_in(Log(campaign.log).records()), board_log.utc_day()
    day = submission_caps.counted_day(known, today)
    left = submission_caps.left_of(known, caps, day)
    names = ("number", "round", "arm", "purpose", "day", "state")
    rows: list[dict[str, Any]] = [
        {name: getattr(one, name) for name in names} | {"score": one.printed, "why": one.why} for one in known
    ]
    if arguments.json:
        print(json.dumps({"target": chosen.external.kind, "day": day, "left": left, "submissions": rows}, indent=1))
        return
    print(
        f"target: {chosen.external.kind}; left on {day}: {left['day']}, of the campaign {left['campaign']}, and {left['finalists']} for finalists"
    )
    for row in rows:
        told = row["score"] or row["why"]
        print(
            f"{row['number']:4d}  {row['round']}  {row['arm']:<9}  {row['purpose']:<9}  {row['day']}  {row['state']:<9}  {told}".rstrip()
        )
    waiting = next((one.number for one in known if one.state not in board.SETTLED), None)
    print(f"next: python -m pipeline {following(arguments, chosen.external, waiting)}")


def following(arguments: argparse.Namespace, external: Any, waiting: int | None) -> str:
    """The command that brings a waiting submission on."""
    shown = shlex.quote(str(arguments.campaign))
    if waiting is None or external.kind == "none":
        return f"status {shown}"
    if external.kind == "manual":
        return f"board score {shown} {waiting} 0.84"
    return f"board push {shown}" if external.push == "login" else f"meta {shown}"


def push_verb(arguments: argparse.Namespace) -> None:
    from pipeline.external import board

    campaign, facts, chosen, caps = frozen_campaign(arguments)
    if chosen.external.kind == "local":
        raise ConfigError(
            "the local board is asked by the meta stage",
            f"python -m pipeline meta {shlex.quote(str(arguments.campaign))}",
        )
    said = board.push(campaign, facts, chosen, caps, wait_seconds=arguments.wait, dry_run=arguments.dry_run)
    for line in said or ["nothing waits"]:
        print(f"would: {line}" if arguments.dry_run and said else line)
    print(f"next: python -m pipeline board status {shlex.quote(str(arguments.campaign))}")


def score_verb(arguments: argparse.Namespace) -> None:
    from pipeline.campaign.facts import facts_of
    from pipeline.campaign.log import Log
    from pipeline.decision import board_submissions
    from pipeline.external import board_log

    if (arguments.score is None) != arguments.withdraw:
        raise ConfigError("a score or --withdraw is needed, and not both", "board score CAMPAIGN NUMBER 0.84")
    campaign = Campaign.at(arguments.campaign)
    facts_of(campaign)
    said = f"number {arguments.number} " + ("is withdrawn" if arguments.withdraw else f"scored {arguments.score}")
    if arguments.score is not None:
        board_submissions.parse_score(arguments.score)
    board_log.check_reserved(Log(campaign.log).records(), arguments.number)
    if arguments.dry_run:
        print(f"would log: {said}")
        return
    board_log.set_score(campaign, arguments.number, arguments.score)
    print(f"{said}; the next meta stage takes it up")
    print(f"next: python -m pipeline board status {shlex.quote(str(arguments.campaign))}")


def finalists_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.campaign.facts import load_constitution
    from pipeline.external.round_submissions import RoundSubmissions

    campaign, facts, chosen, _ = frozen_campaign(arguments)
    if chosen.external.kind == "none":
        raise ConfigError("this campaign has no external target", "external=local, in a new campaign")
    newest = list(campaign.frozen_rounds())[-1].name
    rules = load_constitution(facts["constitution_digest"])
    submissions = RoundSubmissions.of(campaign, newest, facts, chosen, rules)
    for line in submissions.finish(dry_run=arguments.dry_run) or ["nothing is to be sent"]:
        print(f"would: {line}" if arguments.dry_run else line)
    print(f"next: python -m pipeline report {shlex.quote(str(arguments.campaign))}")


def local_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.external import local_board

    print(local_board.score(campaign, arguments.number))


def frozen_campaign(arguments: argparse.Namespace) -> tuple[Campaign, dict[str, Any], Any, Any]:
    """(campaign, its frozen facts, its newest frozen configuration, the caps of its own constitution)."""
    from pipeline.campaign.facts import facts_of, load_constitution, verified_code
    from pipeline.config import settings
    from pipeline.decision import submission_caps

    campaign = Campaign.at(arguments.campaign)
    facts = facts_of(campaign)
    rules = load_constitution(facts["constitution_digest"], verified_code(campaign, facts) / "constitution")
    newest = list(campaign.frozen_rounds())[-1]  # `init` froze r0000
    chosen = settings.load(newest.config)
    return campaign, facts, chosen, submission_caps.caps_of(rules.articles["4"], chosen.external.kind)
