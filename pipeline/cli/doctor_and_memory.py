"""Before a campaign: `doctor` checks this machine or site, `plan-memory` shows what a configuration needs, `first-contact` tries a new site.

The first two take the folder of a campaign, overrides, or both. With a campaign they use its frozen configuration, and overrides change it for the
check alone. `doctor` takes only overrides that `round` would take; `plan-memory` also answers what another configuration would need.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, PipelineError
from pipeline.campaign.layout import Campaign
from pipeline.cli.arguments import (
    Commands,
    add_campaign,
    add_dry_run,
    add_json,
    add_overrides,
    next_command,
    quoted_campaign,
    told_next,
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add("doctor", doctor_verb, "Check this machine or site, and name a cure for whatever is wrong.")
    add_words(sub, "its frozen digests are checked as well")
    add_json(sub)

    sub = commands.add(
        "plan-memory", plan_memory_verb, "Show what a configuration needs: memory, checkpoints, hours and money."
    )
    add_words(sub, "the hours follow from the speed that its rounds measured")
    add_json(sub)

    sub = commands.add(
        "first-contact", first_contact_verb, "Take a new site through gates, the cheapest first, up to one whole arm."
    )
    add_campaign(
        sub, "The folder that the campaign will have. The gates keep their files beside it, in DIR.first-contact."
    )
    add_overrides(sub, "Hydra overrides, such as cluster=mine cluster.weights_dir=/models/nano experiment=nano_30b.")
    sub.add_argument(
        "--until",
        metavar="GATE",
        default="items",
        help="The last gate to pass; the default is items, and arm is the last.",
    )
    sub.add_argument(
        "--log-probs", type=Path, metavar="FILE", help="Log-probabilities to compare with (docs/first-contact.md)."
    )
    sub.add_argument(
        "--sha256", type=Path, metavar="FILE", help="Digests of the published files, as `sha256sum *` prints them."
    )
    sub.add_argument("--again", action="store_true", help="Repeat the gates that were passed before.")
    add_dry_run(sub)
    add_json(sub)


def add_words(sub: argparse.ArgumentParser, of_campaign: str) -> None:
    sub.add_argument(
        "overrides", nargs="*", metavar="DIR|KEY=VALUE",
        help=f"The folder of a campaign, whose frozen configuration is used; {of_campaign}. "
        "Or Hydra overrides, such as cluster=slurm_pyxis experiment=nano_30b.",
    )  # fmt: skip


def doctor_verb(arguments: argparse.Namespace) -> int:
    from pipeline.cluster import doctor

    campaign, overrides = campaign_and_overrides("doctor", arguments.overrides)
    if campaign and overrides:
        from pipeline.campaign.facts import facts_of
        from pipeline.rounds import freeze

        freeze.check_overrides(campaign, facts_of(campaign), overrides)
    chosen = configuration(campaign, overrides)
    checks = doctor.examine(chosen, campaign, settled=settled_of(campaign, overrides, chosen))
    refusal = refusal_of(chosen, campaign, overrides, with_weights=False)  # doctor has looked at them
    if refusal and refusal.what not in [check.found for check in checks]:
        checks.append(doctor.Check("the first round", "bad", f"`round` refuses it: {refusal.what}", refusal.cure))
    is_fit = all(check.verdict != "bad" for check in checks)
    if arguments.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(doctor.table(checks))
        again = next_command("doctor", *map(shlex.quote, arguments.overrides))
        print(next_command(*dry_run(campaign, overrides)) if is_fit else f"{again}    (once that is mended)")
    return int(not is_fit)


def plan_memory_verb(arguments: argparse.Namespace) -> None:
    from pipeline.campaign.records import NUM_ARMS
    from pipeline.config.fit import check_plan_fits, check_sizes
    from pipeline.reporting import cost

    campaign, overrides = campaign_and_overrides("plan-memory", arguments.overrides)
    chosen = configuration(campaign, overrides)
    check_sizes(chosen)
    rounds = campaign.frozen_rounds() if campaign else ()
    settled = settled_of(campaign, overrides, chosen)
    refused = refusal_of(chosen, campaign, overrides)
    refusal = f"{type(refused).__name__}: {refused}" if refused else ""
    if arguments.json:
        print(json.dumps({**cost.memory_and_cost(chosen, NUM_ARMS, rounds, settled), "refusal": refusal}, indent=1))
    else:
        cost.show_cost(chosen, NUM_ARMS, rounds, settled)
    check_plan_fits(chosen)
    if not arguments.json:
        known = chosen.cluster.capacity.gpu_memory_gib
        fits = (
            "it fits"
            if known
            else "whether it fits is not known; cluster.capacity.gpu_memory_gib can say how much a GPU has"
        )
        told_next(refusal, next_command(*dry_run(campaign, overrides)), fits)


def first_contact_verb(arguments: argparse.Namespace) -> int:
    from pipeline.first_contact import gates
    from pipeline.first_contact.visit import Visit

    if arguments.until not in gates.NAMES:
        raise ConfigError(f"--until {arguments.until} is no gate", f"Valid: {', '.join(gates.NAMES)}")
    visit = Visit(Campaign.at(arguments.campaign), arguments.overrides, arguments.log_probs, arguments.sha256, say=say)
    wanted = gates.GATES[: gates.NAMES.index(arguments.until) + 1]
    words = [quoted_campaign(arguments), *map(shlex.quote, arguments.overrides)]
    given = {"--log-probs": arguments.log_probs, "--sha256": arguments.sha256}
    options = [word for name, path in given.items() if path for word in (name, shlex.quote(str(path)))]
    until = ["--until", arguments.until] if arguments.until != gates.DEFAULT_UNTIL else []
    visit.check()
    if arguments.dry_run:
        rows = [{"gate": gate.name, "question": gate.question, "cost": gate.cost(visit)} for gate in wanted]
        print(
            json.dumps(rows, indent=1)
            if arguments.json
            else "\n".join(f"{r['gate']:<11} {r['question']} ({r['cost']})" for r in rows)
        )
        same = next_command("first-contact", *words, *options, *until)
        if why := visit.check_can_be_planned():
            say(f"here the gates would stop: {why}")
        say(f"{same}{'    (once that is mended)' if why else ''}")
        return 0
    passed = []
    for each in gates.walk(visit, arguments.until, again=arguments.again):
        passed.append(each)
        before = "" if each.is_new else " (passed before; --again repeats it)"
        say(
            f"{each.verdict:<8}{each.gate}: {each.found}{f'. {each.cure}' if each.cure else ''} ({each.seconds:.0f} s{before})"
        )
    if arguments.json:
        print(json.dumps([vars(each) for each in passed], indent=1))
    if passed[-1].verdict == "bad":
        say(
            f"stopped at the gate {passed[-1].gate}; the same command goes on there, or from the first gate where a setting or a file has changed"
        )
        return 1
    if arguments.until == gates.NAMES[-1]:
        say(next_command("round", *words))
    else:
        following = gates.GATES[len(passed)]
        again = next_command("first-contact", *words, *options, "--until", following.name)
        say(f"{again}    ({following.cost(visit)})")
    return 0


def say(line: str) -> None:
    """Print a line for people. It goes to stderr, because stdout is for the JSON that a program reads."""
    print(line, file=sys.stderr, flush=True)


def refusal_of(
    chosen: Any, campaign: Campaign | None, overrides: Sequence[str], *, with_weights: bool = True
) -> PipelineError | None:
    """What `round` would say of a configuration that it refuses, beside the memory; None if it would take it.

    with_weights: also compare the published checkpoint with the model.
    """
    from pipeline.campaign.facts import load_constitution
    from pipeline.campaign.records import NUM_ARMS
    from pipeline.config.fit import check_experiment, check_plan_fits
    from pipeline.execution import base_weights
    from pipeline.rounds import freeze, init

    try:
        check_plan_fits(chosen)
    except PipelineError:
        return None  # told as such
    try:
        rules = load_constitution()
        if campaign is None:
            check_experiment(chosen, overrides)
            init.check_can_be_planned(chosen, rules, is_draft=False)
            if with_weights and base_weights.are_outside(chosen.to_dict()["model"]):
                base_weights.describe(chosen.cluster.weights_dir, chosen.to_dict()["model"])
            freeze.check_cost(chosen, NUM_ARMS, rules, 0)
        else:
            freeze.check_budget(campaign, chosen, NUM_ARMS, rules)
    except PipelineError as error:
        return error
    return None


def campaign_and_overrides(command: str, words: Sequence[str]) -> tuple[Campaign | None, list[str]]:
    """(the campaign that a word names, the words that are Hydra overrides).

    Raises ConfigError for a word that is neither, and for a second campaign.
    """
    campaigns: list[Campaign] = []
    overrides: list[str] = []
    for word in words:
        if Campaign.at(word).frozen.exists():
            campaigns.append(Campaign.at(word))
        elif "=" in word or word.startswith("~"):  # Hydra's `~key` removes a key
            overrides.append(word)
        else:
            there = [str(path.parent) for path in sorted(Path().glob("*/*/campaign.yaml"))]
            what = (
                "is a folder, and no campaign"
                if Path(word).is_dir()
                else "is neither a campaign's folder nor an override"
            )
            campaigns_here = (
                f"campaigns here are {', '.join(there)}" if there else "there is none below this folder yet"
            )
            raise ConfigError(
                f"{word} {what}",
                f"Valid: the folder of a campaign ({campaigns_here}), or overrides as key=value, such as `{command} cluster=slurm_pyxis`",
            )
    if len(campaigns) > 1:
        raise ConfigError(f"{command} was given {len(campaigns)} campaigns", "Valid: one at a time")
    return (campaigns[0] if campaigns else None), overrides


def configuration(campaign: Campaign | None, overrides: Sequence[str]) -> Any:
    """The settings that the overrides compose; with a campaign, those of its newest frozen round, changed by the overrides.

    Raises IntegrityError if that round's configuration is missing, and what `settings.compose` raises.
    """
    from pipeline.campaign.facts import facts_of, verified_code
    from pipeline.config import corrections, settings
    from pipeline.rounds import freeze

    if campaign is None:
        return settings.compose(overrides)
    newest = max(campaign.frozen_rounds(), key=lambda folder: folder.number, default=campaign.round("r0000"))
    if not newest.config.exists():
        raise IntegrityError(f"{newest.config} is missing", "Restore it from a copy of the campaign")
    if not overrides:
        return corrections.of_round(newest)
    facts = facts_of(campaign)
    of_round = [f"+round={newest.name}"] if campaign.overrides(newest.name).exists() else []
    every = [*freeze.frozen_words(facts), *overrides, *of_round]
    return settings.compose(every, verified_code(campaign, facts) / "hydra_conf", campaign.folder)


def settled_of(campaign: Campaign | None, overrides: Sequence[str], chosen: Any) -> dict[str, dict[str, str]]:
    """What `auto` was settled as in `chosen`, with the reasons: by the campaign at `init`, or now."""
    from pipeline.campaign.facts import facts_of
    from pipeline.config import decoding

    typed = {word.lstrip("+").partition("=")[0] for word in overrides}
    frozen = facts_of(campaign)["settled"] if campaign else {}
    return {key: each for key, each in frozen.items() if key not in typed} | decoding.settled_of(chosen)


def dry_run(campaign: Campaign | None, overrides: Sequence[str]) -> list[str]:
    """The words of a dry run with the same configuration."""
    folder = shlex.quote(str(campaign.folder)) if campaign else "runs/NAME"
    return ["round", folder, *map(shlex.quote, overrides), "--dry-run"]
