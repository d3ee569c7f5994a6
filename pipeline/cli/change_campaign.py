"""`pause`, `resume`, `end` and `gc`: commands that change a campaign as a whole."""

from __future__ import annotations

import argparse
import json

from pipeline.campaign.layout import Campaign
from pipeline.cli.arguments import (
    Commands,
    add_campaign,
    add_dry_run,
    add_json,
    campaign_and_round,
    next_command,
    quoted_campaign,
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add(
        "pause", pause_verb, "Let no round follow the running one until `resume` (with campaign.auto).", as_frozen=True
    )  # fmt: skip
    add_campaign(sub)

    sub = commands.add(
        "resume",
        resume_verb,
        "Take a pause back, and start the next round if the newest one is closed.",
        as_frozen=True,
    )
    add_campaign(sub)

    sub = commands.add(
        "end", end_verb, "End a campaign: the seeds of dev and of the board become public.", as_frozen=True
    )
    add_campaign(sub)
    add_dry_run(sub)

    sub = commands.add("gc", gc_verb, "List the files that no later run of a campaign needs; --delete deletes them.")
    add_campaign(sub)
    sub.add_argument("--delete", action="store_true", help="Delete the files that are listed.")
    add_json(sub)


def pause_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import chain

    chain.pause(Campaign.at(arguments.campaign))
    print(f"the campaign pauses after the running round; {next_command('resume', quoted_campaign(arguments))}")


def resume_verb(arguments: argparse.Namespace) -> None:
    from pipeline.cli import round_display
    from pipeline.rounds import chain

    campaign, folder = campaign_and_round(arguments, None)
    round_display.print_next_round(chain.resume(campaign, folder), arguments)


def end_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import end_campaign, frozen_code

    campaign, _ = campaign_and_round(arguments, None)
    if not arguments.dry_run:
        frozen_code.run_frozen_code(campaign)
    names = ", ".join(end_campaign.end(campaign, dry_run=arguments.dry_run))
    act = "`end` would reveal" if arguments.dry_run else "the campaign has ended and revealed"
    print(f"{act} the seeds of {names}; no round follows")
    print(next_command("audit", quoted_campaign(arguments), "--rescore"))


def gc_verb(arguments: argparse.Namespace) -> None:
    from pipeline.config.footprint import in_units
    from pipeline.rounds import end_campaign

    campaign, _ = campaign_and_round(arguments, None)
    items = list(end_campaign.garbage(campaign))
    if arguments.delete:
        end_campaign.remove(items)
    if arguments.json:
        print(json.dumps([{"path": str(path), "bytes": size} for path, size in items], indent=1))
        return
    for path, size in items:
        print(f"{in_units(size):>12}  {path}")
    total = in_units(sum(size for _, size in items))
    print(
        f"gc has deleted {total}"
        if arguments.delete
        else f"{total} can be deleted; {next_command('gc', quoted_campaign(arguments), '--delete')}"
    )
