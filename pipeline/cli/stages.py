"""The commands that jobs run: `worker`, `reference`, `meta` and `chain`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from typing import Any

from pipeline.campaign.files import read_json
from pipeline.campaign.layout import CODE_ROOT, Campaign
from pipeline.cli.arguments import found, newest_frozen
from pipeline.cli.round import shown


def worker_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.execution import multinode, worker

    arm = f"a{arguments.arm}" if arguments.arm.isdigit() else arguments.arm
    if multinode.task_number() > 0:
        multinode.help_with(campaign, campaign.round(arguments.round), arm)
        return
    attempt = worker.work(campaign, campaign.round(arguments.round), arm, arguments.plan)
    print(
        f"{arguments.round}/{arm} "
        + (f"is published ({attempt.folder.name})" if attempt else "was published before; nothing to do")
    )
    print(f"next, when all arms are: python -m pipeline meta {shown(arguments)} {arguments.round}")


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
    outcome = meta.judge_reference(campaign, campaign.round(arguments.round), stop.is_set)
    print(f"the reference is {outcome.status} for {arguments.round}; meta takes it up")


def meta_verb(arguments: argparse.Namespace) -> int:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.reporting import page
    from pipeline.rounds import meta

    folder = campaign.round(arguments.round or newest_frozen(campaign))
    decision = meta.close(campaign, folder, tell=print)
    for line in page.write_page(folder) if folder.closed.exists() else []:
        print(line)
    print(f"{folder.name}: {decision.state}" + (f", kept {decision.kept}" if decision.kept else ""))
    for reason in decision.reasons:
        print(f"  {reason}")
    if decision.state == "undecided":
        print(
            f"next: run the missing arms (python -m pipeline worker {shown(arguments)} {folder.name} aN), then meta again"
        )
        return 1
    print(f"signed head, to keep somewhere else: {read_json(folder.closed)['anchor']}")
    print(f"next: python -m pipeline round {shown(arguments)}")
    return 0


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
        print(f"no next round: {started}")
    else:
        print(f"submitted {started['round']}: arrays {started['array_job_ids']}, meta {started['meta_job_id']}")
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))}")
