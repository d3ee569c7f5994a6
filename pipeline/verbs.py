"""Commands beside a round: look (`status`, `logs`), act (`cancel`, `rerun`, `close`, `pause`, `resume`), tidy (`gc`), check (`doctor`).

Each prints what to type next; each that writes has --dry-run, each that reads has --json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import NotFound
from pipeline.layout import Campaign, Round, read_json

Verb = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add(verb: Verb) -> None:
    """Declare the commands. verb: makes a sub-parser from name, function and text."""

    def of_round(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = verb(name, run, text)
        sub.add_argument("campaign", type=Path)
        return sub

    sub = of_round("status", status_verb, "Show every arm of a round, from its files and what Slurm says.")
    sub.add_argument("round", nargs="?", help="default: the newest")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--watch", action="store_true", help="go on until the round is closed")

    sub = of_round("logs", logs_verb, "Show the logs of an arm's newest attempt.")
    sub.add_argument("arm", help="a0 to a7")
    sub.add_argument("--round", help="default: the newest")
    sub.add_argument("--which", choices=("trial", "judge", "job"), help="default: all that are there")
    sub.add_argument("-f", "--follow", action="store_true", help="go on as they grow")
    sub.add_argument("-n", "--lines", type=int, default=20)

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

    sub = of_round("close", close_verb, "Close a round by hand, with what is there; below the quorum nothing changes.")
    sub.add_argument("round", nargs="?", help="default: the newest")
    sub.add_argument("--dry-run", action="store_true")

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


def status_verb(arguments: argparse.Namespace) -> None:
    from pipeline import status

    campaign, folder = found(arguments, arguments.round)
    if arguments.watch:
        watch_round(campaign, folder)
    rows = status.round_status(campaign, folder, states_of(folder))
    submitted: dict[str, Any] = read_json(folder.submitted) if folder.submitted.exists() else {}
    if arguments.json:
        facts = {"round": folder.name, "closed": folder.closed.exists(), "paused": campaign.paused.exists()}
        print(json.dumps({**facts, "submitted": submitted, "arms": status.as_json(rows)}, indent=1))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(status.table(rows))
    shown = shlex.quote(str(arguments.campaign))
    without = [row.arm for row in rows if row.state in ("failed", "lost", "interrupted", "unknown")]
    if folder.closed.exists():
        print(f"closed; next: python -m pipeline round {shown}")
    elif without:
        print(f"open; {', '.join(without)} ended without a score: python -m pipeline rerun {shown} {' '.join(without)}")
    else:
        print(f"open; when its arms are done: python -m pipeline meta {shown} {folder.name}")


def watch_round(campaign: Campaign, folder: Round) -> None:
    """Show changes until the round is closed; Slurm is asked the more seldom the less happens."""
    from pipeline import control, jobs, status, view

    ids = jobs.task_ids(folder)
    asker = jobs.Asker(control.job_names(folder))

    def rows() -> list[status.ArmStatus]:
        states = asker.states(list(ids.values())) if ids else {}
        return status.round_status(campaign, folder, {arm: states[job_id] for arm, job_id in ids.items()})

    with view.follow(rows) as look:
        while not folder.closed.exists():
            look()
            time.sleep(0.5)
        look()


def states_of(folder: Round) -> dict[str, Any]:
    """What Slurm says of the round; nothing where it was never given to one, without importing what asks."""
    if not folder.jobs.exists():
        return {}
    from pipeline import control

    return control.job_states(folder)


def logs_verb(arguments: argparse.Namespace) -> int:
    from pipeline import control, trial

    _, folder = found(arguments, arguments.round)
    paths = control.logs_of(folder, arguments.arm, arguments.which)
    command = ["tail", "-n", str(arguments.lines), *(["-F"] if arguments.follow else []), *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as tail:
        assert tail.stdout is not None
        for line in tail.stdout:
            print(trial.printable(line), end="", flush=arguments.follow)
    return tail.returncode


def cancel_verb(arguments: argparse.Namespace) -> None:
    from pipeline import control

    campaign, folder = found(arguments, arguments.round)
    said = control.cancel(campaign, folder, arguments.arms, dry_run=arguments.dry_run)
    tell(said, "nothing of it waits or runs", arguments.dry_run)
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")


def rerun_verb(arguments: argparse.Namespace) -> None:
    from pipeline import control, status, view

    campaign, folder = found(arguments, arguments.round)
    with view.follow(lambda: status.round_status(campaign, folder)) as watch:
        said = control.rerun(
            campaign, folder, arguments.arms, failed=arguments.failed, dry_run=arguments.dry_run, watch=watch
        )
    tell(said, "every arm has a score", arguments.dry_run)
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")


def close_verb(arguments: argparse.Namespace) -> int:
    from pipeline import decide, frozen, meta

    campaign, folder = found(arguments, arguments.round)
    if arguments.dry_run:
        states = {arm.name: folder.published(arm.name).exists() for arm in folder.frozen_plan().arms}
        print(
            f"would close {folder.name} with {sum(states.values())} of {len(states)} arms published; its fresh seed is then public"
        )
        return 0
    frozen.run_frozen_code(campaign)
    decision = meta.close(campaign, folder, by_person=True)
    print(f"{folder.name}: {decision.state}")
    for reason in decision.reasons:
        print(f"  {reason}")
    print(f"next: python -m pipeline round {shlex.quote(str(arguments.campaign))}")
    return 0 if decision.state in decide.CLOSING else 1


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
    from pipeline import scheduler

    command = scheduler.command(("meta", str(arguments.campaign), arguments.round))
    stage = subprocess.Popen(command) if arguments.meta else None
    from pipeline import control  # meanwhile

    if code := stage.wait() if stage else 0:
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
        print(f"next: python -m pipeline round runs/NAME {overrides}".rstrip() + " --dry-run")
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
        raise NotFound(f"{arguments.campaign} is not a campaign", f"`python -m pipeline round {shown}` makes one")
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
