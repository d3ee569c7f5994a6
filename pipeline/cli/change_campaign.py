"""`cancel`, `rerun`, `close`, `pause`, `resume`, `end` and `gc`: commands that change a round, or a campaign as a whole.

With --dry-run each only says what it would do.
"""

from __future__ import annotations

import argparse
import json

from pipeline.campaign.layout import Campaign
from pipeline.cli.arguments import (
    Commands,
    add_campaign,
    add_dry_run,
    add_json,
    add_round,
    campaign_and_round,
    deciding_round,
    next_command,
    next_round_command,
    quoted_campaign,
    typed,
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add(
        "cancel", cancel_verb, "Stop arms that wait or run; without ARM, stop the whole round.", as_frozen=True
    )
    add_campaign(sub)
    add_arms(sub)
    add_round(sub)
    add_dry_run(sub)

    sub = commands.add(
        "rerun",
        rerun_verb,
        "Start arms that have no score again, on Slurm also a reference's job that left nothing, then the meta stage.",
        as_frozen=True,
    )
    add_campaign(sub)
    add_arms(sub)
    add_round(sub)
    add_dry_run(sub)
    sub.add_argument("--failed", action="store_true", help="Start only the arms that began and have no score.")
    sub.add_argument(
        "--saved", action="store_true", help="Inside an arm's job: requeue the job, or submit another if Slurm refuses."
    )  # fmt: skip

    sub = commands.add(
        "close",
        close_verb,
        "Close a round of which nothing runs any more. Below the quorum, or without a score of the recipe that the arms are compared with, "
        "nothing is decided.",
        as_frozen=True,
    )
    add_campaign(sub)
    add_round(sub)
    add_dry_run(sub)

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


def add_arms(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("arms", nargs="*", metavar="ARM", help="Arms: a0 to a7.")


def cancel_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import control

    campaign, folder = campaign_and_round(arguments, arguments.round)
    lines = control.cancel(campaign, folder, arguments.arms, dry_run=arguments.dry_run)
    what = f"{' and '.join(arguments.arms)} of {folder.name}" if arguments.arms else folder.name
    nothing = f"no job of {what} waits or runs in Slurm, and no process of it runs here"
    if not lines and arguments.arms and (pid := control.round_pid(folder)):
        nothing = (
            f"{' and '.join(arguments.arms)} cannot be cancelled before the `round` here (process {pid}) begins them; "
            f"this stops the whole round: {typed('cancel', quoted_campaign(arguments), '--round', folder.name)}"
        )
    print_lines(lines, nothing, arguments.dry_run)
    print(next_command("status", quoted_campaign(arguments), "--round", folder.name))


def rerun_verb(arguments: argparse.Namespace) -> None:
    from pipeline.cluster import slurm_submit
    from pipeline.live import follow, view
    from pipeline.rounds import control

    campaign, folder = campaign_and_round(arguments, arguments.round)
    if arguments.saved and (done := slurm_submit.requeue_this_job()) != slurm_submit.FORBIDDEN:
        print(
            f"job {slurm_submit.this_job()} is {done}"
            + (
                ""
                if done == slurm_submit.REQUEUED
                else " because somebody cancelled or requeued it; no other is started"
            )
        )
        return
    with follow.follow(lambda: view.of_round(campaign, folder)) as watch:
        lines = control.rerun(
            campaign, folder, arguments.arms, failed=arguments.failed, dry_run=arguments.dry_run, watch=watch
        )
    print_lines(lines, "there is no arm to start", arguments.dry_run)
    if lines and folder.closed.exists():
        print(
            f"{folder.name} is closed and its fresh seed is public, so an arm that is scored now gets dev marks alone and counts for nothing"
        )
    print(next_command("status", quoted_campaign(arguments), "--round", folder.name))


def close_verb(arguments: argparse.Namespace) -> int:
    from pipeline.campaign.errors import ConfigError
    from pipeline.campaign.facts import facts_of, load_constitution
    from pipeline.decision import decide
    from pipeline.execution.results import has_score
    from pipeline.rounds import frozen_code, meta

    campaign, folder = deciding_round(arguments)
    if arguments.dry_run and folder.closed.exists():
        print(f"{folder.name} is closed already; `close` would add scores that came later as late arms")
        print(next_round_command(arguments))
        return 0
    running = [] if folder.closed.exists() else meta.still_running(folder)
    cancel = typed("cancel", quoted_campaign(arguments), "--round", folder.name)
    if arguments.dry_run:
        if running:
            print(
                f"`close` would refuse while {', '.join(running)} may still bring a score; this stops all of it: {cancel}"
            )
        arms = folder.frozen_plan().arms
        scored = sum(has_score(folder.published(arm.name)) for arm in arms)
        why = meta.lacking(campaign, folder, load_constitution(facts_of(campaign)["constitution_digest"]).quorum)
        print(
            f"`close` would close {folder.name} with {scored} of {len(arms)} arms that have a score; its fresh seed would become public"
        )
        print(
            f"nothing would be decided, because {why}; the policy would stay as it is"
            if why
            else "the round would be decided"
        )
        print(next_command("status", quoted_campaign(arguments), "--round", folder.name))
        return 0
    if running:
        raise ConfigError(
            f"{folder.name} still runs: {', '.join(running)}",
            f"Wait, or stop all of it with `{cancel}` and close it then",
        )
    frozen_code.run_frozen_code(campaign)
    from pipeline.cli import round_display

    decision = meta.close(campaign, folder, by_person=True, report_line=print)
    round_display.write_pages(folder)
    round_display.print_decision(folder, decision)
    print(next_round_command(arguments))
    return 0 if decision.state in decide.CLOSING else 1


def print_lines(lines: list[str], nothing: str, dry_run: bool) -> None:
    """Print what was done, or with `dry_run` what would be done. nothing: the line to print if there are none."""
    for line in lines or [nothing]:
        print(f"would: {line}" if dry_run and lines else line)


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
