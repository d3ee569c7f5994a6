"""The commands that jobs run: `worker`, `reference`, `meta` and `chain`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import CODE_ROOT, Campaign, Round
from pipeline.campaign.records import Decision
from pipeline.cli.arguments import (
    JOBS,
    Commands,
    add_campaign,
    add_round,
    following,
    found,
    jobs_of,
    newest_frozen,
    round_of,
    shown,
    typed,
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add("worker", worker_verb, "Train, judge and publish one arm of a frozen round.", group=JOBS)
    add_campaign(sub)
    add_round(sub, required=True)
    sub.add_argument("arm", metavar="ARM", help="The arm: a0 to a7, or its index in the array.")
    sub.add_argument("--plan", metavar="SHA256", help="Refuse to work unless the frozen plan has this digest.")

    sub = commands.add("reference", reference_verb, "Judge the reference on a round's fresh items.", group=JOBS)
    add_campaign(sub)
    add_round(sub, required=True)

    sub = commands.add(
        "meta", meta_verb, "Gather a round's arms, decide, and write the next round's overrides.", group=JOBS
    )
    add_campaign(sub)
    add_round(sub)

    sub = commands.add(
        "chain",
        chain_verb,
        "Submit the round after a closed one where the campaign runs by itself.",
        group=JOBS,
        as_frozen=True,
    )
    add_campaign(sub)
    add_round(sub, required=True)
    sub.add_argument("--meta", action="store_true", help="Run the meta stage of the round first.")


def worker_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.execution import multinode, worker

    arm = f"a{arguments.arm}" if arguments.arm.isdigit() else arguments.arm
    folder = round_of(campaign, arguments.round)
    if multinode.task_number() > 0:
        multinode.help_with(campaign, folder, arm)
        return
    attempt = worker.work(campaign, folder, arm, arguments.plan)
    said = f"is published ({attempt.folder.name})" if attempt else "was published before, so there is nothing to do"
    print(f"{folder.name}/{arm} {said}")
    print(f"{following('meta', shown(arguments), '--round', folder.name)}    (when all arms are published)")


def reference_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    import signal
    import threading

    from pipeline.rounds import meta

    stop = threading.Event()
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    outcome = meta.judge_reference(campaign, round_of(campaign, arguments.round), stop.is_set)
    print(f"the reference is {outcome.status} for {arguments.round}; the meta stage takes it up")


def meta_verb(arguments: argparse.Namespace) -> int:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.rounds import meta

    folder = round_of(campaign, arguments.round or newest_frozen(campaign))
    decision = meta.close(campaign, folder, tell=print)
    tell_decision(folder, decision)
    if decision.state == "undecided":
        arm = typed("worker", shown(arguments), "--round", folder.name, "aN")
        print(f"next: run the missing arms (`{arm}`), then the meta stage again")
        return 1
    print(following("round", shown(arguments)))
    return 0


def tell_decision(folder: Round, decision: Decision) -> None:
    """Write the page of a closed round, and say what was decided, why, and under which signed head."""
    from pipeline.reporting import page

    for line in page.write_page(folder) if folder.closed.exists() else []:
        print(line)
    print(f"{folder.name} is {decision.state}" + (f"; {decision.kept} is kept" if decision.kept else ""))
    for reason in decision.reasons:
        print(f"  {reason}")
    if folder.closed.exists():
        print(f"keep this signed head somewhere else, too: {read_json(folder.closed)['anchor']}")


def chain_verb(arguments: argparse.Namespace) -> int:
    from pipeline.cluster import stage_command
    from pipeline.sandbox import namespace

    command = stage_command.command(("meta", str(arguments.campaign), arguments.round))
    if command[0] == sys.executable:  # a cluster's runtime is entered first, and the namespace within it
        command = namespace.privately(command)
    # `python -P` looks nowhere else, and slurm/meta.sbatch sets nothing.
    stage = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(CODE_ROOT)}) if arguments.meta else None
    from pipeline.rounds import chain  # while the meta stage starts

    if stage:
        chain.get_ready(Campaign.at(arguments.campaign), arguments.round)
        if code := stage.wait():
            return code
    campaign, folder = found(arguments, arguments.round)
    tell_chained(chain.chain(campaign, folder), arguments)
    return 0


def tell_chained(started: Any, arguments: argparse.Namespace) -> None:
    """What was submitted, or why nothing was."""
    if isinstance(started, str):
        print(f"there is no next round: {started}")
    else:
        print(f"{started['round']} is submitted: {jobs_of(started)}")
    print(following("status", shown(arguments)))
