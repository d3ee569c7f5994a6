"""Write the pages of a campaign after a decision. Nothing rests on these files, so an error of any kind must not
stop a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.pages import page
from pipeline.pages.page import Source


def write_pages(folder: Round) -> list[str]:
    """Write `report.html` of a decided round and of its campaign. Returns a line for each file that could not be
    written, else none."""
    campaign = folder.campaign
    return [
        *_write(campaign, folder.report, lambda: round_page(Log(campaign.log).records(), folder)),
        *_write(campaign, campaign.report, lambda: campaign_page(Log(campaign.log).records(), campaign)),
    ]


def round_page(records: Sequence[Mapping[str, Any]], folder: Round) -> str:
    """The page of a round that has evidence. Raises as `page.of_round`."""
    return page.of_round(_source(records, folder), folder.name)


def campaign_page(records: Sequence[Mapping[str, Any]], campaign: Campaign) -> str:
    """The page of a campaign. Raises as `page.of_campaign`."""
    return page.of_campaign(_source(records, max(campaign.frozen_rounds(), key=lambda each: each.number)))


def _source(records: Sequence[Mapping[str, Any]], folder: Round) -> Source:
    campaign = folder.campaign
    return Source(records, facts_of(campaign)["campaign"], settings.load(folder.config).model.name, campaign)


def _write(campaign: Campaign, path: Path, make: Callable[[], str]) -> list[str]:
    try:
        write_file(path, make())
    except Exception as error:
        return [f"{path.relative_to(campaign.folder)} could not be written: {error!r}"]
    return []
