"""Commands beside a round: act (`cancel`, `rerun`, `close`, `pause`, `resume`), tidy (`gc`), check (`doctor`).

Each prints what to type next; each that writes has --dry-run, each that reads has --json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import NotFound
from pipeline.layout import Campaign, Round

Verb = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


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
    from pipeline import control

    campaign, folder = found(arguments, arguments.round)
    said = control.cancel(campaign, folder, arguments.arms, dry_run=arguments.dry_run)
    tell(
        said,
        "nothing of it waits in Slurm or runs here (what a `round` has not begun yet ends with that: Ctrl-C there)",
        arguments.dry_run,
    )
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")


def rerun_verb(arguments: argparse.Namespace) -> None:
    from pipeline import control, scheduler, status, view

    campaign, folder = found(arguments, arguments.round)
    if arguments.saved and (done := scheduler.requeue_this_job()) != scheduler.FORBIDDEN:
        print(
            f"job {scheduler.this_job()} is {done}"
            + ("" if done == scheduler.REQUEUED else " by somebody's word: no other is started")
        )
        return
    with view.follow(lambda: status.round_status(campaign, folder)) as watch:
        said = control.rerun(
            campaign, folder, arguments.arms, failed=arguments.failed, dry_run=arguments.dry_run, watch=watch
        )
    tell(said, "every arm has a score", arguments.dry_run)
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")


def close_verb(arguments: argparse.Namespace) -> int:
    from pipeline import decide, frozen, meta

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
    frozen.run_frozen_code(campaign)
    decision = meta.close(campaign, folder, by_person=True, tell=print)
    print(f"{folder.name}: {decision.state}")
    for reason in decision.reasons:
        print(f"  {reason}")
    print(f"next: python -m pipeline round {shlex.quote(str(arguments.campaign))}")
    return 0 if decision.state in decide.CLOSING else 1


def end_verb(campaign: Campaign, arguments: argparse.Namespace) -> int:
    from pipeline import ending, frozen

    if not arguments.dry_run:
        frozen.run_frozen_code(campaign)
    names = ending.end(campaign, dry_run=arguments.dry_run)
    print(
        f"{'would reveal' if arguments.dry_run else 'ended; revealed'} the seeds of {', '.join(names)}; no round follows"
    )
    print(f"next: python -m pipeline audit {shlex.quote(str(arguments.campaign))} --rescore")
    return 0


def gc_verb(arguments: argparse.Namespace) -> None:
    from pipeline import control
    from pipeline.footprint import in_units

    campaign, _ = found(arguments, None)
    items = list(control.garbage(campaign))
    if arguments.delete:
        control.remove(items)
    if arguments.json:
        print(json.dumps([{"path": str(path), "bytes": size} for path, size in items], indent=1))
        return
    for path, size in items:
        print(f"{in_units(size):>12}  {path}")
    total = in_units(sum(size for _, size in items))
    shown = shlex.quote(str(arguments.campaign))
    print(f"freed {total}" if arguments.delete else f"{total} can go; next: python -m pipeline gc {shown} --delete")


def pause_verb(arguments: argparse.Namespace) -> None:
    from pipeline import control

    control.pause(Campaign.at(arguments.campaign))
    print(f"paused after the round that runs; next: python -m pipeline resume {shlex.quote(str(arguments.campaign))}")


def resume_verb(arguments: argparse.Namespace) -> None:
    from pipeline import control

    campaign, folder = found(arguments, None)
    tell_chained(control.resume(campaign, folder), arguments)


def chain_verb(arguments: argparse.Namespace) -> int:
    from pipeline import namespace, scheduler

    command = scheduler.command(("meta", str(arguments.campaign), arguments.round))
    if command[0] == sys.executable:  # a cluster's runtime is entered first, and the namespace within it
        command = namespace.privately(command)
    code_dir = str(
        Path(__file__).resolve().parent.parent
    )  # `python -P` looks nowhere else, and slurm/meta.sbatch sets nothing
    stage = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": code_dir}) if arguments.meta else None
    from pipeline import control  # meanwhile

    if stage:
        control.get_ready(Campaign.at(arguments.campaign), arguments.round)
        if code := stage.wait():
            return code
    campaign, folder = found(arguments, arguments.round)
    tell_chained(control.chain(campaign, folder), arguments)
    return 0


def tell_chained(started: Any, arguments: argparse.Namespace) -> None:
    """What was submitted, or why nothing was."""
    if isinstance(started, str):
        print(f"no next round: {started}")
    else:
        print(f"submitted {started['round']}: arrays {started['array_job_ids']}, meta {started['meta_job_id']}")
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))}")


def doctor_verb(arguments: argparse.Namespace) -> int:
    from pipeline import doctor

    checks = doctor.examine(arguments.overrides, Campaign.at(arguments.campaign) if arguments.campaign else None)
    if arguments.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(doctor.table(checks))
        overrides = " ".join(map(shlex.quote, arguments.overrides))
        again = "doctor" if any(check.verdict == "bad" for check in checks) else "round runs/NAME"
        print(f"next: python -m pipeline {again} {overrides}".rstrip() + " --dry-run" * (again != "doctor"))
    return int(any(check.verdict == "bad" for check in checks))


def tell(said: list[str], nothing: str, dry_run: bool) -> None:
    """What was done, or would be."""
    for line in said or [nothing]:
        print(f"would: {line}" if dry_run and said else line)


def found(arguments: argparse.Namespace, name: str | None) -> tuple[Campaign, Round]:
    """The campaign and its round of that name, or the newest frozen one. Raises NotFound with what there is."""
    campaign = Campaign.at(arguments.campaign)
    shown = shlex.quote(str(arguments.campaign))
    if not campaign.frozen.exists():
        near = [
            path.parent for at in (campaign.folder, campaign.folder.parent) for path in sorted(at.glob("*/log.jsonl"))
        ]
        cure = f"There: {', '.join(map(str, near))}" if near else f"`python -m pipeline round {shown}` makes one"
        raise NotFound(f"{arguments.campaign} is not a campaign", cure)
    folder = campaign.round(name or newest_frozen(campaign))
    if not folder.plan.exists():
        raise NotFound(
            f"round {folder.name} is not frozen", f"Frozen: {', '.join(r.name for r in campaign.frozen_rounds())}"
        )
    return campaign, folder


def newest_frozen(campaign: Campaign) -> str:
    """Name of the newest round that has a plan. Raises NotFound before the first."""
    names = [folder.name for folder in campaign.frozen_rounds()]
    if not names or names == ["r0000"]:
        raise NotFound(
            f"{campaign.folder} has no frozen round yet", f"`python -m pipeline round {campaign.folder}` starts one"
        )
    return names[-1]
