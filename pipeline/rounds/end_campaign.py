"""End a campaign: publish the seeds that stayed secret throughout it, so that anybody can make its dev items and score them again."""

from __future__ import annotations

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.rounds import meta


def end(campaign: Campaign, *, dry_run: bool = False) -> list[str]:
    """Reveal the seeds of dev, of its replacements and of the board, and sign the head; no round may follow. Returns the seeds' names.

    Seeds of rounds that never ran stay secret, because no decision rests on them. Raises ConfigError while a round is open.
    """
    facts_of(campaign)
    newest = list(campaign.frozen_rounds())[-1]
    if newest.number == 0 or not newest.closed.exists():
        raise ConfigError(
            f"{newest.name} of {campaign.name} is not closed",
            "Wait until the round is closed, or close it by hand with `close`; then run `end` again",
        )
    seeds = read_json(campaign.seeds)
    replaced = {f"dev/{name}" for _, name in newest.frozen_plan().policy.repaired}
    names = [name for name in ("dev", *sorted(replaced), "board") if name in seeds]
    if not dry_run:
        log = Log(campaign.log)
        log.append_once("end", round=newest.name)
        for name in names:
            log.append_once("reveal", round=newest.name, name=name, seed=seeds[name])
        meta.reveal(campaign, newest)
    return names
