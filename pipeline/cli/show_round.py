"""`status` and `logs`: commands that show a round. They read its files, and also ask Slurm if the round was submitted."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.files import is_alive, lock_holder, read_json
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

ENDED_WITHOUT = ("failed", "lost", "interrupted", "unknown")
"""States of an arm that may have ended without a score, and that nobody cancelled."""


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add("status", status_verb, "Show every arm of a round, from its files and what Slurm says.")
    add_campaign(sub)
    add_round(sub)
    add_json(sub)
    sub.add_argument("--watch", action="store_true", help="Show changes until the round is closed.")

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


def status_verb(arguments: argparse.Namespace) -> None:
    from pipeline.reporting import outside, status
    from pipeline.rounds import launch

    if arguments.watch and arguments.json:
        raise ConfigError("--watch prints lines and --json one value", "Valid: one of the two")
    campaign, folder = campaign_and_round(arguments, arguments.round)
    if arguments.watch:
        watch_round(campaign, folder)
    states, complaints = ask_slurm(folder)
    rows = status.round_status(campaign, folder, states)
    # r0000, the reference and the base, runs beside the first round.
    beside = status.round_status(campaign, campaign.round("r0000"), states) if folder.number == 1 else []
    jobs = other_jobs(states)
    if "judge" in jobs:
        from pipeline.rounds import judging

        wanted = f"judges {', '.join(sorted(judging.submitted_for(folder)))}"
        jobs["judge"]["detail"] = "; ".join(filter(None, (wanted, jobs["judge"]["detail"])))
    submitted: dict[str, Any] = read_json(folder.submitted) if folder.submitted.exists() else {}
    troubles = outside.troubles(campaign)
    if arguments.json:
        facts = {"round": folder.name, "closed": folder.closed.exists(), "paused": campaign.paused.exists()}
        hours = status.gpu_hours(folder, rows)
        facts |= {"submitted": submitted, "gpu_hours": hours, "slurm_complaints": complaints}
        facts |= {"troubles": [asdict(each) for each in troubles]}
        facts |= {"jobs": jobs, "r0000": [asdict(row) for row in beside]}
        print(json.dumps({**facts, "arms": [asdict(row) for row in rows]}, indent=1))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(status.table([*beside, *rows]))
    for role, job in jobs.items():
        print(f"{role}: job {job['job']} {' '.join(filter(None, (job['state'], job['node'], job['detail'])))}")
    if warning := silence_warning(folder, states):
        print(warning)
    if cut := cut_short_warning(folder, quoted_campaign(arguments)):
        print(cut)
    if complaints and not folder.closed.exists():
        print(f"not all of Slurm's answer could be had: {'; '.join(complaints)}")
    for trouble in troubles:
        print(trouble)
    if hours := status.gpu_hours(folder, rows):
        forecast = (
            f"{hours['forecast']:,.2f} forecast, {hours['source']}"
            if hours["forecast"]
            else "there is no forecast, because no rate is known"
        )
        print(f"GPU-hours of the round's arms: {hours['used']:,.2f} used; {forecast}")
    name = quoted_campaign(arguments)
    if campaign.paused.exists():
        print(f"rounds that follow by themselves are paused; `{typed('resume', name)}` takes that back")
    without = [row.arm for row in rows if row.state in ENDED_WITHOUT]
    for row in beside:
        if row.state in ENDED_WITHOUT and not folder.closed.exists() and submitted.get("kind") == "slurm":
            print(
                f"r0000/{row.arm} ended without a score; start it again: {typed('rerun', name, row.arm, '--round', 'r0000')}"
            )
    if cancelled := [] if folder.closed.exists() else [row.arm for row in rows if row.state == "cancelled"]:
        again = typed("rerun", name, *cancelled, *(["--round", folder.name] if arguments.round else []))
        print(f"a person cancelled {', '.join(cancelled)}, so nothing starts them again by itself; this does: {again}")
    if folder.closed.exists():
        print(f"the round is closed; {next_round_command(arguments)}")
    elif folder.number == 0:
        print(f"{folder.name} holds the reference and the base and is never decided; {next_command('status', name)}")
    elif submitted.get("kind") == "local":
        print(open_here(submitted, without, name))
    elif not submitted and not launch.was_begun(folder):
        print(f"the round is frozen, and no job of it was submitted; this starts it: {typed('round', name)}")
        if not launch.is_local(folder):
            print(launch.how_to_correct(folder))
    elif without:
        rerun = typed("rerun", name, *without, *(["--round", folder.name] if arguments.round else []))
        sessions = [row.arm for row in rows if row.arm in without and row.detail.startswith("agent_")]
        paid = f" ({', '.join(sessions)}: an agent's session, which costs again what it cost)" if sessions else ""
        print(f"the round is open; {', '.join(without)} ended without a score{paid}; this starts them again: {rerun}")
    elif (meta := states.get("meta")) and (meta.waits or meta.runs):
        print(
            f"the round is open; meta job {meta.job_id} decides it when its arms are done; {next_command('status', name, '--watch')}"
        )
    else:
        print(f"the round is open; decide it when its arms are done: {typed('meta', name, '--round', folder.name)}")


def other_jobs(states: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What Slurm says of the jobs beside the arms, if submitted: role -> job, state, node and, while it waits, why."""
    from pipeline.cluster import slurm_answers

    found = [(role, states[role]) for role in ("reference", "agent", "judge", "meta") if role in states]
    return {
        role: {"job": job.job_id, "state": job.state, "node": job.node,
               "detail": slurm_answers.describe_reason(job.reason) if job.waits else job.reason}
        for role, job in found
    }  # fmt: skip


def cut_short_warning(folder: Round, name: str) -> str:
    """The warning that a submission was cut short, with what to type; empty if none was, or if one is under way. name: the campaign's."""
    from pipeline.cluster import slurm_jobs, slurm_submit

    is_cut = slurm_submit.is_cut_short(folder.slurm_dir, slurm_jobs.recorded_marks(folder))
    if not is_cut or lock_holder(folder.lock):
        return ""
    return f"a submission of this round was cut short; this cancels its jobs and submits the round again: {typed('round', name)}"


def silence_warning(folder: Round, states: dict[str, Any]) -> str:
    """The warning that the states come from files alone, because Slurm does not answer; empty if it answers."""
    from pipeline.cluster import slurm_jobs

    if folder.closed.exists() or not slurm_jobs.is_slurm_silent(states):
        return ""
    return "Slurm does not answer, so states come from files alone; make `sinfo` work in this shell (SLURM_CONF) to see the jobs"


def open_here(submitted: dict[str, Any], without: list[str], name: str) -> str:
    """What to do about an open round on this machine. without: arms that ended without a score. name: the campaign's folder, quoted."""
    pid = submitted["pid"]
    if is_alive(pid):
        return f"the round is open; `round` runs here as process {pid} and decides by itself; {next_command('status', name, '--watch')}"
    why = f"{', '.join(without)} ended without a score" if without else "no process runs it now"
    return f"the round is open; {why}; this resumes it: {typed('round', name)}"


def watch_round(campaign: Campaign, folder: Round) -> None:
    """Show changes until the round is closed. Slurm is asked less often while nothing changes."""
    from pipeline.cluster import slurm_jobs
    from pipeline.reporting import live_view, status
    from pipeline.rounds import launch

    ids = slurm_jobs.task_ids(folder)
    asker = live_view.Asker(lambda ids: launch.query(folder, ids))

    def rows() -> list[status.ArmStatus]:
        states = asker.states(list(ids.values())) if ids else {}
        return status.round_status(campaign, folder, {arm: states[job_id] for arm, job_id in ids.items()})

    with live_view.follow(rows) as look:
        while not folder.closed.exists():
            look()
            time.sleep(0.5)
        look()


def ask_slurm(folder: Round) -> tuple[dict[str, Any], list[str]]:
    """(arm -> the state of its job, complaints of Slurm's clients); both empty if the round was never submitted to Slurm."""
    if not folder.jobs.exists():
        return {}, []
    from pipeline.rounds import control

    said = control.ask_slurm(folder)
    return said.jobs, list(said.complaints)


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
