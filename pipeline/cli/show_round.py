"""`status` and `logs`: commands that show a round. They read its files, and also ask Slurm if the round was submitted."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.files import is_alive, read_json
from pipeline.campaign.layout import Campaign, Round
from pipeline.cli.arguments import (
    Commands,
    add_campaign,
    add_json,
    add_round,
    campaign_and_round,
    next_command,
    next_round_command,
    quoted_campaign,
    typed,
)
from pipeline.cluster import slurm_jobs

if TYPE_CHECKING:
    from pipeline.live.view import RoundView  # imported late, because a command must start quickly

ENDED_WITHOUT = ("failed", "lost", "interrupted", "unknown")
"""States of an arm that may have ended without a score, and that nobody cancelled."""
LINES_SECONDS = 5.0  # between two readings of what stands under the table while nothing changes
WATCHED = "Ctrl-C ends this view alone"
OVER_SECONDS = 5.0  # so long nothing of a round runs before `--watch` ends


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add("status", status_verb, "Show every arm of a round, from its files and what Slurm says.")
    add_campaign(sub)
    add_round(sub)
    add_json(sub)
    sub.add_argument(
        "--watch",
        action="store_true",
        help="Show the round on one screen until it is closed; a file gets a line for each change.",
    )

    sub = commands.add("logs", logs_verb, "Show the logs of an arm's newest attempt.")
    add_campaign(sub)
    sub.add_argument(
        "arm", metavar="ARM", help="The arm, a0 to a7; `reference`, `judge` and `meta` are the other jobs of a round."
    )
    add_round(sub)
    sub.add_argument("--which", choices=("trial", "judge", "job"), help="Show only this log. The default is all.")
    sub.add_argument("-f", "--follow", action="store_true", help="Show new lines as the logs grow.")
    sub.add_argument(
        "-n", "--lines", type=int, default=20, metavar="N", help="Begin N lines before the end. The default is 20."
    )


def status_verb(arguments: argparse.Namespace) -> int:
    from pipeline.live import view
    from pipeline.reporting import outside, status, terminal_tables
    from pipeline.rounds import control

    if arguments.watch and arguments.json:
        raise ConfigError("--watch prints lines and --json one value", "Valid: one of the two")
    campaign, folder = campaign_and_round(arguments, arguments.round)
    if arguments.watch and not folder.closed.exists():
        return watch_round(campaign, folder, arguments)
    said = control.ask_slurm(folder) if folder.jobs.exists() else slurm_jobs.Report({})
    found = view.of_round(campaign, folder, said)
    if arguments.json:
        submitted = read_json(folder.submitted) if folder.submitted.exists() else {}
        facts = {"round": folder.name, "closed": folder.closed.exists(), "paused": campaign.paused.exists()}
        facts |= {"submitted": submitted, "gpu_hours": status.gpu_hours(folder, [arm.row for arm in found.arms])}
        facts |= {"slurm_complaints": list(said.complaints), "jobs": view.other_jobs(folder, said.jobs)}
        facts |= {"troubles": [asdict(each) for each in outside.troubles(campaign)]} | found.to_json()
        facts |= {"r0000": [arm.to_json() for arm in found.beside], "arms": [arm.to_json() for arm in found.arms]}
        print(json.dumps(facts, indent=1))
        return 0
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(terminal_tables.table(found.rows))
    for line in below(campaign, folder, found, said, arguments):
        print(line)
    return 0


def below(
    campaign: Campaign, folder: Round, found: RoundView, said: slurm_jobs.Report, arguments: argparse.Namespace
) -> list[str]:
    """The lines under the table of arms: other jobs, warnings, troubles, GPU-hours, and last what to type next."""
    from pipeline.live import view
    from pipeline.reporting import outside

    name = quoted_campaign(arguments)
    lines = [
        f"{role}: job {job['job']} {' '.join(filter(None, (job['state'], job['node'], job['detail'])))}"
        for role, job in view.other_jobs(folder, said.jobs).items()
    ]
    if view.is_cut_short(folder):
        again = typed("round", name)
        lines.append(
            f"a submission of this round was cut short; this cancels its jobs and submits the round again: {again}"
        )
    if said.complaints and not folder.closed.exists():
        lines.append(f"not all of Slurm's answer could be had: {'; '.join(said.complaints)}")
    lines += map(str, outside.troubles(campaign))
    lines += filter(None, (view.silence_warning(folder, said.jobs), view.gpu_hours_in_words(folder, found)))
    if not found.is_over and any(arm.losses for arm in found.arms):
        curves = typed("export", name, "--to", f"exports/{campaign.name}", "--as", "tensorboard", "--follow")
        lines.append(f"training curves for TensorBoard, as they grow: {curves}")
    if campaign.paused.exists():
        lines.append(f"rounds that follow by themselves are paused; `{typed('resume', name)}` takes that back")
    return lines + what_to_type(folder, found, said.jobs, arguments)


def what_to_type(
    folder: Round, found: RoundView, states: Mapping[str, slurm_jobs.Job], arguments: argparse.Namespace
) -> list[str]:
    """What a person can do about arms without a score, and the command to type next."""
    from pipeline.rounds import launch

    name, rows = quoted_campaign(arguments), [arm.row for arm in found.arms]
    submitted: dict[str, Any] = read_json(folder.submitted) if folder.submitted.exists() else {}
    without = [row.arm for row in rows if row.state in ENDED_WITHOUT]
    lines = []
    for row in [arm.row for arm in found.beside]:
        if row.state in ENDED_WITHOUT and not folder.closed.exists() and submitted.get("kind") == "slurm":
            again = typed("rerun", name, row.arm, "--round", "r0000")
            lines.append(f"r0000/{row.arm} ended without a score; start it again: {again}")
    if cancelled := [] if folder.closed.exists() else [row.arm for row in rows if row.state == "cancelled"]:
        again = typed("rerun", name, *cancelled, *(["--round", folder.name] if arguments.round else []))
        lines.append(
            f"a person cancelled {', '.join(cancelled)}, so nothing starts them again by itself; this does: {again}"
        )
    if folder.closed.exists():
        lines.append(f"the round is closed; {next_round_command(arguments)}")
    elif folder.number == 0:
        never = f"{folder.name} holds the reference and the base and is never decided"
        lines.append(f"{never}; {next_command('status', name)}")
    elif submitted.get("kind") == "local":
        lines.append(open_here(submitted, without, arguments))
    elif not submitted and not launch.was_begun(folder):
        lines.append(f"the round is frozen, and no job of it was submitted; this starts it: {typed('round', name)}")
        lines += [] if launch.is_local(folder) else [launch.how_to_correct(folder)]
    elif without:
        rerun = typed("rerun", name, *without, *(["--round", folder.name] if arguments.round else []))
        sessions = [row.arm for row in rows if row.arm in without and row.detail.startswith("agent_")]
        paid = f" ({', '.join(sessions)}: an agent's session, which costs again what it cost)" if sessions else ""
        lines.append(
            f"the round is open; {', '.join(without)} ended without a score{paid}; this starts them again: {rerun}"
        )
    elif (meta := states.get("meta")) and (meta.waits or meta.runs):
        lines.append(
            f"the round is open; meta job {meta.job_id} decides it when its arms are done; {goes_on(arguments)}"
        )
    else:
        lines.append(
            f"the round is open; decide it when its arms are done: {typed('meta', name, '--round', folder.name)}"
        )
    return lines


def open_here(submitted: Mapping[str, Any], without: list[str], arguments: argparse.Namespace) -> str:
    """What to do about an open round on this machine. without: arms that ended without a score."""
    if is_alive(pid := submitted["pid"]):
        return f"the round is open; `round` runs here as process {pid} and decides by itself; {goes_on(arguments)}"
    why = f"{', '.join(without)} ended without a score" if without else "no process runs it now"
    return f"the round is open; {why}; this resumes it: {typed('round', quoted_campaign(arguments))}"


def goes_on(arguments: argparse.Namespace) -> str:
    """What to type while a round goes on by itself."""
    return WATCHED if arguments.watch else next_command("status", quoted_campaign(arguments), "--watch")


def watch_round(campaign: Campaign, folder: Round, arguments: argparse.Namespace) -> int:
    """Show changes until the round is closed, or nothing that could close it runs any more. Returns 0 if it is closed, else 1.

    Slurm is asked less often while nothing changes. Other machines' files may come late, so an end is believed only after a while.
    """
    from pipeline.live import follow, view
    from pipeline.reporting import status
    from pipeline.rounds import control

    asker = follow.Asker(lambda: control.ask_slurm(folder))
    nothing, told_at, told, states = slurm_jobs.Report({}), -LINES_SECONDS, list[str](), list[tuple[str, str]]()

    def look() -> RoundView:
        ids = slurm_jobs.task_ids(folder)
        return view.of_round(campaign, folder, asker.said(ids) if ids else nothing)

    def lines(found: RoundView) -> list[str]:
        """As `below`, which reads the whole log and may ask Slurm, so it is not called at each refresh."""
        nonlocal told_at, told, states
        now = [(found.state, ""), *((row.arm, row.state) for row in found.rows)]
        if now != states or time.monotonic() - told_at >= LINES_SECONDS:
            ids = slurm_jobs.task_ids(folder)
            told = below(campaign, folder, found, asker.said(ids) if ids else nothing, arguments)
            told_at, states = time.monotonic(), now
        return told

    over_since: float | None = None
    patience = OVER_SECONDS + status.file_wait_seconds(folder)
    try:
        with follow.follow(look, lines) as show:
            while not folder.closed.exists():
                over_since = (over_since or time.monotonic()) if show().is_over else None
                if over_since and time.monotonic() - over_since >= patience:
                    break
                time.sleep(follow.REFRESH_SECONDS)
    except KeyboardInterrupt:  # the ordinary way to leave, and nothing of the round was interrupted
        return 130
    return 0 if folder.closed.exists() else 1


def logs_verb(arguments: argparse.Namespace) -> int:
    from pipeline.execution import trial
    from pipeline.rounds import control

    _, folder = campaign_and_round(arguments, arguments.round)
    if arguments.arm not in control.OTHER_JOBS:
        control.chosen_arms(folder, [arguments.arm])  # raises ConfigError for an arm that does not exist
    paths = control.logs_of(folder, arguments.arm, arguments.which)
    command = ["tail", "-n", str(arguments.lines), *(["-F"] if arguments.follow else []), *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as tail:
        assert tail.stdout is not None
        if arguments.follow:
            threading.Thread(target=end_with, args=(tail, folder, arguments.arm), daemon=True).start()
        for line in tail.stdout:
            print(trial.printable(line), end="", flush=arguments.follow)
    return max(0, tail.returncode)  # negative if `end_with` terminated it


def end_with(tail: subprocess.Popen[str], folder: Round, arm: str) -> None:
    """Stop following logs once the arm or the reference is published or the round is closed, because nothing more is written then."""
    while tail.poll() is None and not (
        folder.closed.exists() or folder.published(arm).exists()
    ):  # reference.h5 is one too
        time.sleep(1)
    time.sleep(1)  # lets `tail` print the last lines
    tail.terminate()
