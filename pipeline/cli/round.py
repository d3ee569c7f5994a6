"""`init`, `round` and `campaign`: freeze a campaign, run or submit its next round, run several rounds."""

from __future__ import annotations

import argparse
import shlex
import time

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import Campaign
from pipeline.cli.arguments import newest_frozen


def init_verb(arguments: argparse.Namespace) -> None:
    from pipeline.rounds.init import init

    init(Campaign.at(arguments.campaign), arguments.overrides)
    print(f"campaign {arguments.campaign} is frozen\nnext: python -m pipeline round {arguments.campaign}")


def round_verb(arguments: argparse.Namespace) -> int | None:
    from pipeline.cli.round_display import follow_slurm, run_local, show_dry_run, show_plan
    from pipeline.rounds import freeze, launch
    from pipeline.rounds.init import init

    campaign, name = Campaign.at(arguments.campaign), shown(arguments)
    if arguments.json and not arguments.dry_run:
        raise ConfigError(
            "--json goes with --dry-run", f"What came of a round: `python -m pipeline report {name} --json`"
        )
    if arguments.dry_run:
        show_dry_run(campaign, arguments.overrides, as_json=arguments.json)
        if arguments.json:
            return None
        print(f"next: python -m pipeline round {' '.join([name, *map(shlex.quote, arguments.overrides)])}")
        return None
    if not campaign.folder.exists():
        init(campaign, arguments.overrides)
        print(f"campaign {name} is frozen (image, code, constitution, commitments)")
    folder = freeze.freeze(campaign, freeze.next_round(campaign), arguments.overrides)
    show_plan(folder)
    if arguments.no_submit:
        for stages in launch.arrays(campaign, folder):
            indices = ",".join(stage[3].removeprefix("a") for stage in stages)
            print(f"next: sbatch --array={indices} slurm/round.sbatch {name} {stages[0][2]}")
        print(f"then: sbatch --dependency=afterany:ID[:ID] slurm/meta.sbatch {name} {folder.name}")
        return None
    if launch.is_local(folder):
        return run_local(name, campaign, folder)
    began = time.monotonic()
    record = launch.submit(campaign, folder)
    print(
        f"submitted in {time.monotonic() - began:.2f} s: arrays {record['array_job_ids']}, meta {record['meta_job_id']}"
    )
    print(f"next: python -m pipeline status {name}")
    return follow_slurm(name, campaign, folder) if arguments.wait else None


def campaign_verb(arguments: argparse.Namespace) -> int | None:
    """`round` with campaign.auto; where it runs on this machine, again and again until the last round is closed."""
    from pipeline.campaign import facts
    from pipeline.rounds import launch

    arguments.overrides = [*arguments.overrides, "campaign.auto=true", f"campaign.rounds={arguments.rounds}"]
    arguments.dry_run = arguments.no_submit = arguments.wait = arguments.json = False
    campaign = Campaign.at(arguments.campaign)
    last = min(arguments.rounds or facts.load_constitution().num_rounds, facts.load_constitution().num_rounds)
    while True:
        if campaign.folder.exists() and campaign.paused.exists():
            print(f"paused; next: python -m pipeline resume {shown(arguments)}")
            return None
        if campaign.folder.exists() and campaign.round(f"r{last:04d}").closed.exists():
            print(f"r{last:04d} is closed; next: python -m pipeline status {shown(arguments)}")
            return None
        code = round_verb(arguments)
        if code or not launch.is_local(campaign.round(newest_frozen(campaign))):
            return code


def shown(arguments: argparse.Namespace) -> str:
    """The campaign's folder as one types it."""
    return shlex.quote(str(arguments.campaign))
