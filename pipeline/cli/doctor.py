"""`doctor` and `plan-memory`: is this machine or site fit for a campaign, and what would a configuration take?"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from pipeline.campaign.layout import Campaign


def plan_memory_verb(arguments: argparse.Namespace) -> None:
    from pipeline.campaign.facts import facts_of
    from pipeline.campaign.records import NUM_ARMS
    from pipeline.config import settings
    from pipeline.config.fit import check_plan_fits, check_sizes
    from pipeline.reporting import cost

    chosen = settings.compose(arguments.overrides)
    check_sizes(chosen)
    if arguments.campaign:
        facts_of(Campaign.at(arguments.campaign))
    rounds = Campaign.at(arguments.campaign).frozen_rounds() if arguments.campaign else ()
    if arguments.json:
        print(json.dumps(cost.memory_and_cost(chosen, NUM_ARMS, rounds), indent=1))
    else:
        cost.show_cost(chosen, NUM_ARMS, rounds)
    check_plan_fits(chosen)
    if not arguments.json:
        known = chosen.cluster.capacity.gpu_memory_gib
        fits = "it fits" if known else "no limit is known (cluster.capacity.gpu_memory_gib)"
        print(f"{fits}; next: python -m pipeline round runs/NAME {shlex.join([*arguments.overrides, '--dry-run'])}")


def doctor_verb(arguments: argparse.Namespace) -> int:
    from pipeline.cluster import doctor

    checks = doctor.examine(arguments.overrides, Campaign.at(arguments.campaign) if arguments.campaign else None)
    if arguments.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(doctor.table(checks))
        overrides = " ".join(map(shlex.quote, arguments.overrides))
        again = "doctor" if any(check.verdict == "bad" for check in checks) else "round runs/NAME"
        print(f"next: python -m pipeline {again} {overrides}".rstrip() + " --dry-run" * (again != "doctor"))
    return int(any(check.verdict == "bad" for check in checks))
