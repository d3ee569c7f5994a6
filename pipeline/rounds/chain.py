"""Let a campaign run by itself: submit the next round when one is closed, pause, resume."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any

from pipeline.campaign.errors import WorkFailed
from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.cluster import slurm_clients
from pipeline.config import settings
from pipeline.rounds import control, freeze, launch


def preload_next_round(campaign: Campaign, round_name: str) -> None:
    """Import and read what `chain` will need, while the meta stage still runs, so that the next round is submitted sooner. Never raises."""
    with contextlib.suppress(Exception):  # `chain` will meet the same error and report it
        importlib.import_module("submitit")
        freeze.rehearse(campaign, campaign.round(round_name))


def chain(campaign: Campaign, folder: Round) -> Mapping[str, Any] | str:
    """Submit the round after a closed one. Returns the submission's record with the round's name, or a sentence that says why there is none."""
    auto = settings.load(folder.config).campaign
    num_rounds = facts_of(campaign)["design"]["rounds"]
    if not auto.auto:
        return "campaign.auto is off, so rounds are started by hand"
    if campaign.paused.exists():
        return "paused by hand; `resume` starts it"
    if not folder.closed.exists():
        return f"{folder.name} is not closed"
    if folder.number >= min(num_rounds, auto.rounds or num_rounds):
        return f"{folder.name} was the last round"
    operational: list[str] = read_json(folder.operational)
    following = freeze.freeze(campaign, f"r{folder.number + 1:04d}", operational)
    if following.submitted.exists():
        return f"{following.name} is submitted already"
    return {"round": following.name, **launch.submit(campaign, following)}


def stop_server(folder: Round) -> str:
    """Cancel the job that serves the model of a round's agents once no arm waits or runs. Returns a sentence about it, or empty for none.

    What fails here holds up no decision: the job ends by itself.
    """
    jobs = control.ask_slurm(folder).jobs
    server = jobs.get("agent")
    is_needed = any(job.waits or job.runs or job.may_return for arm, job in jobs.items() if "/" in arm)
    if server is None or is_needed or not (server.waits or server.runs):
        return ""
    try:
        slurm_clients.cancel_jobs([server.job_id])
    except WorkFailed as error:
        return f"the agents' model server, job {server.job_id}, was not cancelled: {error}"
    return f"the agents' model server, job {server.job_id}, is cancelled, because every arm has ended"


def pause(campaign: Campaign) -> None:
    """Let no round follow the running one until `resume`."""
    facts_of(campaign)
    write_file(campaign.paused, "")


def resume(campaign: Campaign, folder: Round) -> Mapping[str, Any] | str:
    """Take a pause back, and start the next round if `folder` is closed. Returns what `chain` returns."""
    campaign.paused.unlink(missing_ok=True)
    return chain(campaign, folder)
