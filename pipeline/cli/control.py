"""Commands beside a round: act (`cancel`, `rerun`, `close`, `pause`, `resume`), tidy (`gc`), check (`doctor`).

Each prints what to type next; each that writes has --dry-run, each that reads has --json.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

from pipeline.campaign.layout import Campaign
from pipeline.cli.arguments import Verb, found
from pipeline.cli.doctor import doctor_verb
from pipeline.cli.stages import chain_verb, tell_chained


def add(verb: Verb) -> None:
    """Declare the commands. verb: makes a sub-parser from name, function and text."""

    def of_round(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = verb(name, run, text)
        sub.add_argument("campaign", type=Path)
        return sub

    for name, run, text in (
        ("cancel", cancel_verb, "Stop arms that wait or run; without any, the whole round."),
        ("rerun", rerun_verb, "Start arms without a score again, then the meta stage."),
    ):
        sub = of_round(name, run, text)
        sub.add_argument("arms", nargs="*", metavar="ARM")
        sub.add_argument("--round", help="default: the newest")
        sub.add_argument("--dry-run", action="store_true")
        if name == "rerun":
            sub.add_argument("--failed", action="store_true", help="those that began and have no score")
            sub.add_argument(
                "--saved", action="store_true", help="from inside an arm's job: requeue it, else another job"
            )

    sub = of_round("close", close_verb, "Close a round by hand, with what is there; below the quorum nothing changes.")
    sub.add_argument("round", nargs="?", help="default: the newest")
    sub.add_argument("--dry-run", action="store_true")
    sub.add_argument("--end", action="store_true", help="end the campaign: dev's and the board's seeds become public")

    sub = of_round("gc", gc_verb, "Say what no later run needs; --delete frees it.")
    sub.add_argument("--delete", action="store_true")
    sub.add_argument("--json", action="store_true")

    of_round("pause", pause_verb, "With campaign.auto: the round that runs is the last until `resume`.")
    of_round("resume", resume_verb, "Take a pause back, and start the next round where it can.")
    sub = of_round("chain", chain_verb, "What a meta job does: submit the next round if the campaign runs by itself.")
    sub.add_argument("round")
    sub.add_argument("--meta", action="store_true", help="run the meta stage first")

    sub = verb("doctor", doctor_verb, "Check this machine or site for a campaign; each finding with its cure.")
    sub.add_argument("overrides", nargs="*", help="Hydra overrides, such as cluster=slurm_pyxis experiment=nano_30b")
    sub.add_argument("--campaign", type=Path, help="check a campaign's digests, too")
    sub.add_argument("--json", action="store_true")


def cancel_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import control

    campaign, folder = found(arguments, arguments.round)
    said = control.cancel(campaign, folder, arguments.arms, dry_run=arguments.dry_run)
    tell(
        said,
        "nothing of it waits in Slurm or runs here (what a `round` has not begun yet ends with that: Ctrl-C there)",
        arguments.dry_run,
    )
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")


def rerun_verb(arguments: argparse.Namespace) -> None:
    from pipeline.cluster import slurm_submit
    from pipeline.reporting import live_view, status
    from pipeline.rounds import control

    campaign, folder = found(arguments, arguments.round)
    if arguments.saved and (done := slurm_submit.requeue_this_job()) != slurm_submit.FORBIDDEN:
        print(
            f"job {slurm_submit.this_job()} is {done}"
            + ("" if done == slurm_submit.REQUEUED else " by somebody's word: no other is started")
        )
        return
    with live_view.follow(lambda: status.round_status(campaign, folder)) as watch:
        said = control.rerun(
            campaign, folder, arguments.arms, failed=arguments.failed, dry_run=arguments.dry_run, watch=watch
        )
    tell(said, "every arm has a score", arguments.dry_run)
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")


def close_verb(arguments: argparse.Namespace) -> int:
    from pipeline.decision import decide
    from pipeline.reporting import page
    from pipeline.rounds import frozen_code, meta

    campaign, folder = found(arguments, arguments.round)
    if arguments.end:
        return end_verb(campaign, arguments)
    if arguments.dry_run and folder.closed.exists():
        print(f"{folder.name} is closed already; what came later would be taken up as late arms")
        print(f"next: python -m pipeline round {shlex.quote(str(arguments.campaign))}")
        return 0
    if arguments.dry_run:
        states = {arm.name: folder.published(arm.name).exists() for arm in folder.frozen_plan().arms}
        print(
            f"would close {folder.name} with {sum(states.values())} of {len(states)} arms published; its fresh seed is then public"
        )
        print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")
        return 0
    frozen_code.run_frozen_code(campaign)
    decision = meta.close(campaign, folder, by_person=True, tell=print)
    for line in page.write_page(folder) if folder.closed.exists() else []:
        print(line)
    print(f"{folder.name}: {decision.state}")
    for reason in decision.reasons:
        print(f"  {reason}")
    print(f"next: python -m pipeline round {shlex.quote(str(arguments.campaign))}")
    return 0 if decision.state in decide.CLOSING else 1


def end_verb(campaign: Campaign, arguments: argparse.Namespace) -> int:
    from pipeline.rounds import end_campaign, frozen_code

    if not arguments.dry_run:
        frozen_code.run_frozen_code(campaign)
    names = end_campaign.end(campaign, dry_run=arguments.dry_run)
    print(
        f"{'would reveal' if arguments.dry_run else 'ended; revealed'} the seeds of {', '.join(names)}; no round follows"
    )
    print(f"next: python -m pipeline audit {shlex.quote(str(arguments.campaign))} --rescore")
    return 0


def gc_verb(arguments: argparse.Namespace) -> None:
    from pipeline.config.footprint import in_units
    from pipeline.rounds import garbage

    campaign, _ = found(arguments, None)
    items = list(garbage.garbage(campaign))
    if arguments.delete:
        garbage.remove(items)
    if arguments.json:
        print(json.dumps([{"path": str(path), "bytes": size} for path, size in items], indent=1))
        return
    for path, size in items:
        print(f"{in_units(size):>12}  {path}")
    total = in_units(sum(size for _, size in items))
    shown = shlex.quote(str(arguments.campaign))
    print(f"freed {total}" if arguments.delete else f"{total} can go; next: python -m pipeline gc {shown} --delete")


def pause_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import chain

    chain.pause(Campaign.at(arguments.campaign))
    print(f"paused after the round that runs; next: python -m pipeline resume {shlex.quote(str(arguments.campaign))}")


def resume_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import chain

    campaign, folder = found(arguments, None)
    tell_chained(chain.resume(campaign, folder), arguments)


def tell(said: list[str], nothing: str, dry_run: bool) -> None:
    """What was done, or would be."""
    for line in said or [nothing]:
        print(f"would: {line}" if dry_run and said else line)
