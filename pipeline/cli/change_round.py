"""`cancel`, `rerun` and `close`: commands that change a round. Each says what it would do under --dry-run."""

from __future__ import annotations

import argparse

from pipeline.cli.arguments import Commands, add_campaign, add_dry_run, add_round, following, found, shown
from pipeline.cli.job_stages import tell_decision


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add(
        "cancel", cancel_verb, "Stop arms that wait or run; without ARM, the whole round.", as_frozen=True
    )
    add_campaign(sub)
    add_arms(sub)
    add_round(sub)
    add_dry_run(sub)

    sub = commands.add("rerun", rerun_verb, "Start arms that have no score again, then the meta stage.", as_frozen=True)
    add_campaign(sub)
    add_arms(sub)
    add_round(sub)
    add_dry_run(sub)
    sub.add_argument("--failed", action="store_true", help="Start those alone that began and have no score.")
    sub.add_argument(
        "--saved", action="store_true", help="From inside an arm's job: requeue it, or start another where that is refused."
    )  # fmt: skip

    sub = commands.add(
        "close", close_verb, "Close a round with the arms that are there; below the quorum the policy stays."
    )
    add_campaign(sub)
    add_round(sub)
    add_dry_run(sub)


def add_arms(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("arms", nargs="*", metavar="ARM", help="Arms: a0 to a7.")


def cancel_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import control

    campaign, folder = found(arguments, arguments.round)
    said = control.cancel(campaign, folder, arguments.arms, dry_run=arguments.dry_run)
    tell(
        said,
        "nothing of it waits in Slurm or runs here (Ctrl-C where a `round` runs ends what it has not begun yet)",
        arguments.dry_run,
    )
    print(following("status", shown(arguments), "--round", folder.name))


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
    print(following("status", shown(arguments), "--round", folder.name))


def close_verb(arguments: argparse.Namespace) -> int:
    from pipeline.decision import decide
    from pipeline.rounds import frozen_code, meta

    campaign, folder = found(arguments, arguments.round)
    if arguments.dry_run and folder.closed.exists():
        print(f"{folder.name} is closed already; `close` would take up what came later as late arms")
        print(following("round", shown(arguments)))
        return 0
    if arguments.dry_run:
        states = {arm.name: folder.published(arm.name).exists() for arm in folder.frozen_plan().arms}
        done = f"{sum(states.values())} of {len(states)} arms published"
        print(f"`close` would close {folder.name} with {done}; its fresh seed would become public")
        print(following("status", shown(arguments), "--round", folder.name))
        return 0
    frozen_code.run_frozen_code(campaign)
    decision = meta.close(campaign, folder, by_person=True, tell=print)
    tell_decision(folder, decision)
    print(following("round", shown(arguments)))
    return 0 if decision.state in decide.CLOSING else 1


def tell(said: list[str], nothing: str, dry_run: bool) -> None:
    """What was done, or would be."""
    for line in said or [nothing]:
        print(f"would: {line}" if dry_run and said else line)
