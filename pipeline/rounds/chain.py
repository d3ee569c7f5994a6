"""Let a campaign go on by itself: submit the round after a closed one, pause, resume."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any

from pipeline.campaign import facts
from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.config import settings
from pipeline.rounds import freeze, launch


def get_ready(campaign: Campaign, round_name: str) -> None:
    """While the meta stage works: what the next round's plan needs, read and composed once as it will be then. Raises nothing."""
    with contextlib.suppress(Exception):  # whatever it is, `chain` meets it again, and tells it
        importlib.import_module("submitit")
        freeze.rehearse(campaign, campaign.round(round_name))


def chain(campaign: Campaign, folder: Round) -> Mapping[str, Any] | str:
    """Submit the round after a closed one where the campaign runs by itself; else says in a word why not."""
    auto = settings.load(folder.config).campaign
    rules = facts.load_constitution(facts_of(campaign)["constitution_digest"])
    if not auto.auto:
        return "campaign.auto is off"
    if campaign.paused.exists():
        return "paused; `resume` goes on"
    if not folder.closed.exists():
        return f"{folder.name} is not closed"
    if folder.number >= min(rules.num_rounds, auto.rounds or rules.num_rounds):
        return f"{folder.name} was the last round"
    operational: list[str] = read_json(folder.operational)
    following = freeze.freeze(campaign, f"r{folder.number + 1:04d}", operational)
    if following.submitted.exists():
        return f"{following.name} is submitted already"
    return {"round": following.name, **launch.submit(campaign, following)}


def pause(campaign: Campaign) -> None:
    """The round that runs is the last one until `resume`."""
    facts_of(campaign)
    write_file(campaign.paused, "")


def resume(campaign: Campaign, folder: Round) -> Mapping[str, Any] | str:
    """Take the pause back, and start the next round where this one is closed."""
    campaign.paused.unlink(missing_ok=True)
    return chain(campaign, folder)
