"""What the commands share: how one is declared, and how a campaign and a round are found from its arguments."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable

from pipeline.campaign.errors import NotFound
from pipeline.campaign.layout import Campaign, Round

Verb = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


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
