"""The commands that jobs run: `worker`, `reference`, `forward`, `meta` and `chain`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.campaign.errors import Interrupted, NotFound, SlurmRefused
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import CODE_ROOT, Campaign, Round
from pipeline.cli.arguments import (
    JOBS,
    Commands,
    add_campaign,
    add_round,
    campaign_and_round,
    deciding_round,
    next_command,
    next_round_command,
    quoted_campaign,
    round_of,
    typed,
)
from pipeline.cli.run_rounds import awaited_judge, has_submitted_judge, requested_of


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add("worker", worker_verb, "Train, judge and publish one arm of a frozen round.", group=JOBS)
    add_campaign(sub)
    add_round(sub, required=True)
    sub.add_argument("arm", metavar="ARM", help="The arm: a0 to a7, or its index in the array.")
    sub.add_argument("--plan", metavar="SHA256", help="Refuse to work unless the frozen plan has this digest.")
    sub.add_argument(
        "--replay",
        metavar="TRANSCRIPT",
        help="Run an agent's arm again with a transcript's answers, and publish nothing; exit code 1 if the adapter is another.",
    )

    sub = commands.add("reference", reference_verb, "Judge the reference on a round's fresh items.", group=JOBS)
    add_campaign(sub)
    add_round(sub, required=True)

    sub = commands.add("forward", forward_verb, "Run the forward pass of a first contact.", group=JOBS)
    add_campaign(sub)
    add_round(sub, required=True)

    sub = commands.add(
        "judge", judge_verb, "Judge what a round's meta stage found unjudged and cannot judge itself.", group=JOBS
    )
    add_campaign(sub)
    add_round(sub, required=True)

    sub = commands.add(
        "serve", serve_verb, "Serve the model of a round's agents until their arms have ended.", group=JOBS
    )
    add_campaign(sub)
    add_round(sub, required=True)
    what = "An arm that it is for, or a3=1 for one with an attempt before. The default is all."
    sub.add_argument("arms", nargs="*", metavar="ARM", help=what)

    sub = commands.add(
        "meta", meta_verb, "Gather a round's arms, decide, and write the next round's overrides.", group=JOBS
    )
    add_campaign(sub)
    add_round(sub)
    add_asked(sub)
    sub.add_argument(
        "--no-pages",
        action="store_true",
        help="Leave the pages to `chain`, which writes them after the next round is submitted.",
    )

    sub = commands.add(
        "chain",
        chain_verb,
        "Submit the round after a closed one if the campaign runs by itself (campaign.auto).",
        group=JOBS,
        as_frozen=True,
    )
    add_campaign(sub)
    add_round(sub, required=True)
    sub.add_argument("--meta", action="store_true", help="Run the meta stage of the round first.")
    add_asked(sub)


def add_asked(sub: argparse.ArgumentParser) -> None:
    """Declare what a meta job that follows a judge job is told."""
    sub.add_argument(
        "--asked",
        action="append",
        default=[],
        metavar="WHAT",
        help="What a judge job was submitted for before, as the log asked for it. The meta job after it is told so.",
    )


def worker_verb(arguments: argparse.Namespace) -> int:
    from pipeline.rounds import frozen_code

    campaign = Campaign.at(arguments.campaign)
    frozen_code.run_frozen_code(campaign)
    from pipeline.agent import arm as agents_arm
    from pipeline.execution import multinode, worker

    arm = f"a{arguments.arm}" if arguments.arm.isdigit() else arguments.arm
    folder = round_of(campaign, arguments.round)
    if multinode.task_number() > 0:
        multinode.help_with(campaign, folder, arm)
        return 0
    if arguments.replay:
        return replayed(campaign, folder, arm, Path(arguments.replay))
    attempt = worker.work(campaign, folder, arm, arguments.plan, agents_arm)
    result = f"is published ({attempt.folder.name})" if attempt else "was published before, so there is nothing to do"
    print(f"{folder.name}/{arm} {result}")
    print(after_an_arm(campaign.round("r0001") if folder.number == 0 else folder, quoted_campaign(arguments)))
    return 0


def replayed(campaign: Campaign, folder: Round, arm: str, transcript: Path) -> int:
    """Replay an agent's arm and say what came out; 1 where that is not what the transcript's attempt sealed."""
    from pipeline.agent import rerun

    found = rerun.replay(campaign, folder, arm, transcript)
    print(f"{folder.name}/{arm} replayed: {found.outcome}{f'; {found.differs}' if found.differs else ''}")
    same = "the same adapter as the attempt's" if found.is_same else "not what the attempt left"
    if found.outcome != found.recorded_outcome:
        print(f"the attempt itself ended as {found.recorded_outcome}")
    if found.adapter_digest or found.recorded:
        print(f"adapter {found.adapter_digest[:16] or 'none'}, sealed {found.recorded[:16] or 'none'}: {same}")
    return int(not found.is_same)


def after_an_arm(folder: Round, name: str) -> str:
    """The last line of a worker. The meta stage runs by itself where `round` started or submitted the arms. name: the campaign's, quoted."""
    if not folder.submitted.exists():
        return f"{next_command('meta', name, '--round', folder.name)}    (when all arms are published)"
    meta = read_json(folder.submitted).get("meta_job_id")
    who = f"meta job {meta}" if meta else "`round`"
    return f"{who} decides {folder.name} once all its arms have ended; {next_command('status', name, '--round', folder.name)}"


def stop_wanted_of(folder: Round, role: str) -> Callable[[], bool]:
    """A function that says whether this job of a round is to stop: a signal came, or the job ends soon."""
    import signal
    import threading
    import time

    from pipeline.config import corrections
    from pipeline.execution.job_end import JobEnd

    stop, cluster = threading.Event(), corrections.of_round(folder).cluster
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    end = JobEnd(time.time(), cluster.request(role).time_limit_minutes, cluster.signal_lead_seconds)
    return lambda: stop.is_set() or end.is_near()


def judge_verb(arguments: argparse.Namespace) -> int:
    from pipeline.rounds import frozen_code

    campaign, folder = deciding_round(arguments)
    frozen_code.run_frozen_code(campaign)
    from pipeline.rounds import judging

    failed = judging.judge_left(campaign, folder, stop_wanted_of(folder, "judge"), print)
    return int(bool(failed))


def serve_verb(arguments: argparse.Namespace) -> int:
    from pipeline.rounds import frozen_code

    campaign, folder = campaign_and_round(arguments, arguments.round)
    frozen_code.run_frozen_code(campaign)
    from pipeline.config import corrections
    from pipeline.model_calls import model_server

    chosen, stop_wanted = corrections.of_round(folder), stop_wanted_of(folder, "agent")
    is_over = model_server.serve(folder, chosen, arguments.arms, stop_wanted, lambda line: print(line, flush=True))
    return 0 if is_over else Interrupted.exit_code


def reference_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign, folder = deciding_round(arguments)
    frozen_code.run_frozen_code(campaign)
    from pipeline.rounds import judging

    outcome = judging.judge_reference(campaign, folder, stop_wanted_of(folder, "reference"))
    print(f"the reference is {outcome.status} for {arguments.round}; the meta stage uses its scores")


def forward_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds import frozen_code

    campaign, _ = campaign_and_round(arguments, arguments.round)
    frozen_code.run_frozen_code(campaign)
    from pipeline.first_contact import forward_pass

    forward_pass.run(campaign)
    print("the forward pass is done; `first-contact` compares it")


def meta_verb(arguments: argparse.Namespace) -> int:
    from pipeline.rounds import frozen_code

    campaign, folder = deciding_round(arguments)
    frozen_code.run_frozen_code(campaign)
    from pipeline.cli import round_display
    from pipeline.rounds import meta

    decision = meta.close(campaign, folder, report_line=print, asked=arguments.asked)
    if not arguments.no_pages:
        round_display.write_pages(folder)
    round_display.print_decision(folder, decision)
    if decision.state == "undecided":
        words = (quoted_campaign(arguments), "--round", folder.name)
        again = {"slurm": typed("rerun", *words), "local": typed("round", words[0])}
        kind = read_json(folder.submitted)["kind"] if folder.submitted.exists() else ""
        one_by_one = f"run the missing arms (`{typed('worker', *words, 'aN')}`), then the meta stage again"
        print(f"next: {f'{again[kind]}    (what is missing, and then the meta stage)' if kind else one_by_one}")
        return 1
    print(next_round_command(arguments))
    return 0


def chain_verb(arguments: argparse.Namespace) -> int:
    try:
        return chained(arguments)
    finally:  # the jobs of the next round do not wait for pages
        if arguments.meta:
            from pipeline.cli import round_display

            round_display.write_pages(Campaign.at(arguments.campaign).round(arguments.round))


def chained(arguments: argparse.Namespace) -> int:
    """Run the meta stage of a round where that is wanted, then submit the next round. Returns the exit code."""
    from pipeline.cluster import stage_command
    from pipeline.sandbox import namespace

    def started(asked: Sequence[str]) -> subprocess.Popen[bytes]:
        words = ["--no-pages", *(f"--asked={what}" for what in asked)]
        command = stage_command.command(("meta", str(arguments.campaign), arguments.round, *words))
        if (
            command[0] == sys.executable
        ):  # in a site's runtime, the stage makes its namespace inside the runtime instead
            command = namespace.privately(command)
        # `python -P` finds the package through PYTHONPATH alone, which slurm/meta.sbatch does not set.
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(CODE_ROOT)})

    if arguments.meta and (why := awaited_judge(arguments)):
        print(why)
        return 0
    stage = started(arguments.asked) if arguments.meta else None
    from pipeline.rounds import chain  # imported while the meta stage starts

    if stage:
        if said := chain.stop_server(Campaign.at(arguments.campaign).round(arguments.round)):
            print(said)
        chain.preload_next_round(Campaign.at(arguments.campaign), arguments.round)
        if code := stage.wait():
            try:
                if has_submitted_judge(arguments):
                    return 0
            except (SlurmRefused, NotFound) as error:
                print(f"no judge job is submitted, and the round goes on without what it would judge: {error}")
                code = started([*arguments.asked, *requested_of(arguments)]).wait()
            if code:
                return code
    from pipeline.cli import round_display

    campaign, folder = campaign_and_round(arguments, arguments.round)
    round_display.print_next_round(chain.chain(campaign, folder), arguments)
    return 0
