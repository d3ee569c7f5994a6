"""`board`: work with the external target by hand.

`status` shows the submissions and how many are left, `push` sends from a login node, `score` enters a score, and `finalists` submits the
best arms once more. The meta stage starts `local`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import Campaign
from pipeline.cli.arguments import (
    JOBS,
    Commands,
    add_campaign,
    add_dry_run,
    add_json,
    next_command,
    quoted_campaign,
    typed,
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    acts = commands.within("board", "The external target: show submissions and scores, and send them by hand.")

    sub = acts.add("status", status_verb, "Show every submission, its state and score, and what is left of the caps.")
    add_campaign(sub)
    add_json(sub)

    sub = acts.add("push", push_verb, "Send what is in the outbox and ask for scores, from a node with internet.")
    add_campaign(sub)
    sub.add_argument(
        "--wait",
        type=int,
        default=0,
        metavar="SECONDS",
        help="How long to wait for scores. The default is to ask once.",
    )
    add_dry_run(sub)

    sub = acts.add("score", score_verb, "Enter the score of a submission, or take it back; the newest entry counts.")
    add_campaign(sub)
    sub.add_argument("number", type=int, metavar="NUMBER", help="The number of the submission.")
    sub.add_argument("score", nargs="?", metavar="SCORE", help="The score: 0 to 1, at most five places.")
    sub.add_argument("--withdraw", action="store_true", help="Take the score back.")
    add_dry_run(sub)

    sub = acts.add(
        "finalists",
        finalists_verb,
        "Have the best of a campaign scored once more, by the submissions held back for it.",
    )
    add_campaign(sub)
    add_dry_run(sub)

    sub = acts.add("local", local_verb, "Score a reserved submission with the local board.", group=JOBS)
    add_campaign(sub)
    sub.add_argument("number", type=int, metavar="NUMBER", help="The number of the submission.")


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
        {name: getattr(submission, name) for name in names} | {"score": submission.printed, "why": submission.why}
        for submission in known
    ]
    if arguments.json:
        print(json.dumps({"target": chosen.external.kind, "day": day, "left": left, "submissions": rows}, indent=1))
        return
    print(
        f"target: {chosen.external.kind}; submissions left: {left['day']} on {day}, {left['campaign']} in the campaign, and "
        f"{left['finalists']} for finalists"
    )
    for row in rows:
        result = row["score"] or row["why"]
        print(
            f"{row['number']:4d}  {row['round']}  {row['arm']:<9}  {row['purpose']:<9}  {row['day']}  {row['state']:<9}  {result}".rstrip()
        )
    waiting = next((submission.number for submission in known if submission.state not in board.SETTLED), None)
    print(next_command(*words_for(waiting, quoted_campaign(arguments), chosen.external)))


def words_for(waiting: int | None, name: str, external: Any) -> list[str]:
    """The command that gets a score for a submission. waiting: its number; None if none waits. name: the campaign's folder, quoted."""
    if waiting is None or external.kind == "none":
        return ["status", name]
    if external.kind == "manual":
        return ["board", "score", name, str(waiting), "0.84"]
    return ["board", "push", name] if external.push == "login" else ["meta", name]


def push_verb(arguments: argparse.Namespace) -> None:
    from pipeline.external import board

    campaign, facts, chosen, caps = frozen_campaign(arguments)
    if chosen.external.kind == "local":
        raise ConfigError(
            "this campaign has the local board, to which only the meta stage submits",
            f"`{typed('meta', quoted_campaign(arguments))}` runs the meta stage",
        )
    lines = board.push(campaign, facts, chosen, caps, wait_seconds=arguments.wait, dry_run=arguments.dry_run)
    for line in lines or ["no submission waits to be sent or scored"]:
        print(f"would: {line}" if arguments.dry_run and lines else line)
    print(next_command("board", "status", quoted_campaign(arguments)))


def score_verb(arguments: argparse.Namespace) -> None:
    from pipeline.campaign.facts import facts_of
    from pipeline.campaign.log import Log
    from pipeline.decision import board_submissions
    from pipeline.external import board_log

    if (arguments.score is None) != arguments.withdraw:
        raise ConfigError(
            "either a score or --withdraw is needed, and not both",
            f"`{typed('board', 'score', quoted_campaign(arguments), str(arguments.number), '0.84')}` enters a score",
        )
    campaign = Campaign.at(arguments.campaign)
    facts_of(campaign)
    change = f"number {arguments.number} " + ("is withdrawn" if arguments.withdraw else f"scored {arguments.score}")
    if arguments.score is not None:
        board_submissions.parse_score(arguments.score)
    board_log.check_reserved(Log(campaign.log).records(), arguments.number)
    if arguments.dry_run:
        print(f"would log: {change}")
        return
    board_log.set_score(campaign, arguments.number, arguments.score)
    print(f"{change}; the next meta stage uses it")
    print(next_command("board", "status", quoted_campaign(arguments)))


def finalists_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.campaign.facts import load_constitution
    from pipeline.external.round_submissions import RoundSubmissions

    campaign, facts, chosen, _ = frozen_campaign(arguments)
    if chosen.external.kind == "none":
        raise ConfigError(
            "this campaign has no external target", "Start a new campaign with external=local or another target"
        )
    newest = list(campaign.frozen_rounds())[-1].name
    rules = load_constitution(facts["constitution_digest"])
    submissions = RoundSubmissions.of(campaign, newest, facts, chosen, rules)
    lines = submissions.finish(dry_run=arguments.dry_run)
    for line in lines or ["there is nothing to send"]:
        print(f"would: {line}" if arguments.dry_run and lines else line)
    print(next_command("report", quoted_campaign(arguments)))


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
