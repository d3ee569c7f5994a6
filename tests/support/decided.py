"""Campaigns with decided rounds, made from published arm files: the real meta stage decides them in a second."""

from pathlib import Path

from pipeline.campaign.layout import Campaign
from pipeline.rounds import freeze, meta
from tests.support.campaigns import OVERRIDES, frozen_campaign, publish

BEST = "a2"


def decided_campaign(parent: Path) -> Campaign:
    """Round 1 is decided: a2 is far above the reference, a1 diverged, and a6 never came."""
    campaign = frozen_campaign(parent)
    folder = campaign.round("r0001")
    for number in (0, 2, 3, 4, 5, 7):
        publish(folder, f"a{number}", 38 if f"a{number}" == BEST else 20)
    publish(folder, "a1", None)
    meta.close(campaign, folder)
    return campaign


def with_open_round(campaign: Campaign) -> Campaign:
    """The same campaign with its second round frozen and one arm's score published, which nobody has judged yet."""
    publish(freeze.freeze(campaign, "r0002", OVERRIDES), "a0", 30)
    return campaign
