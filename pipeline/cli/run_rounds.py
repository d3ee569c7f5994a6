"""`init`, `round` and `campaign`: freeze a campaign, run or submit its next round, run several in a row; the judge job of a round."""

from __future__ import annotations

import argparse
import shlex
import time

from pipeline.campaign.errors import ConfigError, Refused
from pipeline.campaign.layout import Campaign
from pipeline.cli.arguments import (
    Commands,
    add_campaign,
    add_overrides,
    jobs_of,
    newest_frozen,
    next_command,
    quoted_campaign,
    told_next,
    typed,
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add("init", init_verb, "Freeze a new campaign; the first `round` does this by itself.")
    add_campaign(sub, "The folder to make for the campaign.")
    add_overrides(sub, "Hydra overrides, such as experiment=smoke recipe.num_steps=100.")

    sub = commands.add(
        "round", round_verb, "Freeze the next round, and run it here (cluster=local) or submit it to Slurm.", as_frozen=True
    )  # fmt: skip
    add_campaign(sub, "The folder of the campaign. The first round makes it.")
    add_overrides(sub, "Hydra overrides. After the first round only cluster=... may change.")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="Show the plan and the sbatch texts, and write nothing.")
    how.add_argument("--no-submit", action="store_true", help="Freeze the round only, for sbatch or a Hydra multirun.")
    how.add_argument(
        "--wait",
        action="store_true",
        help="Follow the round until it is closed. With cluster=local it is always followed.",
    )
    sub.add_argument("--json", action="store_true", help="With --dry-run: print plan, costs and sbatch texts as JSON.")

    sub = commands.add(
        "campaign",
        campaign_verb,
        "Run rounds one after the other: here, or on Slurm, where each meta job submits the next one.",
        as_frozen=True,
    )
    add_campaign(sub, "The folder of the campaign. The first round makes it.")
    add_overrides(sub, "Hydra overrides, as of `round`.")
    sub.add_argument(
        "--rounds", type=int, metavar="N",
        help="Stop after round N. The default is the budget of the constitution's article 4, which is 8 rounds. A new campaign's error rates are "
        "then for N rounds (policy.rounds=N), unless you choose another number or no simulated critical values ship for N.",
    )  # fmt: skip


def init_verb(arguments: argparse.Namespace) -> None:
    campaign = Campaign.at(arguments.campaign)
    freeze_campaign(campaign, arguments.overrides)
    print(next_command("round", quoted_campaign(arguments)))


def freeze_campaign(campaign: Campaign, overrides: list[str]) -> None:
    """Freeze a new campaign, and print what was chosen for good."""
    from pipeline.campaign.facts import facts_of
    from pipeline.cli.round_display import frozen_choices
    from pipeline.config import decoding, settings
    from pipeline.execution import base_weights
    from pipeline.rounds.init import init

    place = shlex.quote(str(campaign.folder))
    print(f"freezing the campaign {place}: its settings are checked, and image and code are packed", flush=True)
    init(campaign, overrides)
    chosen = settings.load(campaign.round("r0000").config)
    if unread := base_weights.unused(chosen.cluster.weights_dir, chosen.to_dict()["model"]):
        print(f"note: {unread}")
    print(f"campaign {place} is frozen (image, code, constitution, commitments)")
    facts = facts_of(campaign)
    for line in [*frozen_choices(facts, chosen.campaign.rounds), *decoding.in_words(chosen, facts["settled"])]:
        print(line)


def round_verb(arguments: argparse.Namespace) -> int | None:
    from pipeline.cli.round_display import follow_slurm, run_local, show_dry_run, show_plan
    from pipeline.rounds import freeze, launch

    campaign, name = Campaign.at(arguments.campaign), quoted_campaign(arguments)
    if arguments.json and not arguments.dry_run:
        raise ConfigError(
            "--json goes with --dry-run", f"`{typed('report', name, '--json')}` prints the result of a round"
        )
    if arguments.dry_run:
        refusal = show_dry_run(campaign, arguments.overrides, as_json=arguments.json)
        if not arguments.json:
            told_next(refusal, next_command("round", name, *map(shlex.quote, arguments.overrides)))
        return None
    if not campaign.folder.exists():
        freeze_campaign(campaign, arguments.overrides)
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
    print(f"{folder.name} was submitted in {time.monotonic() - began:.2f} s: {jobs_of(record)}")
    print(next_command("status", name))
    return follow_slurm(name, campaign, folder) if arguments.wait else None


def campaign_verb(arguments: argparse.Namespace) -> int | None:
    """Run `round` with campaign.auto. On this machine it is repeated until the last round is closed; on Slurm meta jobs go on."""
    from pipeline.rounds import launch

    campaign = Campaign.at(arguments.campaign)
    last = last_round(campaign, arguments.rounds)
    if arguments.rounds and campaign.folder.exists():
        from pipeline.campaign.facts import facts_of
        from pipeline.cli.round_display import early_end

        for line in early_end(facts_of(campaign), last):
            print(line)
    elif arguments.rounds:
        arguments.overrides = [*arguments.overrides, *chosen_rounds(arguments.overrides, last)]
    arguments.overrides = [*arguments.overrides, "campaign.auto=true", f"campaign.rounds={arguments.rounds or 0}"]
    arguments.dry_run = arguments.no_submit = arguments.wait = arguments.json = False
    while True:
        if campaign.folder.exists() and campaign.paused.exists():
            print(f"the campaign is paused; {next_command('resume', quoted_campaign(arguments))}")
            return None
        if campaign.folder.exists() and campaign.round(f"r{last:04d}").closed.exists():
            print(f"r{last:04d} is closed; {next_command('status', quoted_campaign(arguments))}")
            return None
        code = round_verb(arguments)
        if code or not launch.is_local(campaign.round(newest_frozen(campaign))):
            return code


def chosen_rounds(overrides: list[str], last: int) -> list[str]:
    """The override that makes a new campaign's error rates for the `last` rounds that it runs, where nothing else was chosen and simulated
    critical values ship for them; it prints the choice."""
    from pipeline.campaign import facts
    from pipeline.config import settings
    from pipeline.rounds.init import design_of
    from pipeline.stats import critical_values

    rules = facts.load_constitution()
    if any("policy.rounds=" in word for word in overrides) or last == rules.num_rounds:
        return []
    word = f"policy.rounds={last}"
    if design_of(settings.compose([*overrides, word]), rules) not in critical_values.GRID:
        return []  # `init` says what that costs
    print(
        f"error rates are for the {last} rounds that this campaign runs ({word}); policy.rounds={rules.num_rounds} would leave room for more"
    )
    return [word]


def last_round(campaign: Campaign, asked: int | None) -> int:
    """The number of the round after which to stop. Raises ConfigError below 1, and Refused (article 4) beyond the frozen rounds.

    The budget of a campaign that does not exist yet is the constitution's; `init` may refuse a round that policy.rounds excludes.
    """
    from pipeline.campaign import facts

    budget = facts.load_constitution().num_rounds
    if campaign.frozen.exists():
        budget = facts.facts_of(campaign)["design"]["rounds"]
    if asked is None:
        return budget
    if asked < 1:
        raise ConfigError(f"--rounds {asked} runs no round", f"Valid: 1 to {budget}; without --rounds, {budget}")
    if asked > budget:
        raise Refused(
            "4",
            "rounds_spent",
            f"--rounds {asked} is more than the campaign's {budget} rounds",
            f"Valid: 1 to {budget}",
        )
    return asked


def awaited_judge(arguments: argparse.Namespace) -> str:
    """Why this meta job has nothing to do: the round's judge job waits or runs, and another meta job follows it. Else empty."""
    campaign = Campaign.at(arguments.campaign)
    folder = campaign.round(arguments.round)
    if not folder.slurm_dir.exists():
        return ""
    from pipeline.cluster import slurm_jobs, slurm_submit

    has_judge = any("judge" in each["tasks"] for each in slurm_jobs.submissions(folder))
    if (folder.folder / "reference.h5").exists() and not has_judge and not slurm_submit.own_mark(folder.slurm_dir):
        return ""  # the usual case: the meta stage starts at once, and what follows is imported while it runs
    from pipeline.rounds import judging

    judging.record_own(folder, arguments.asked)
    return judging.awaited(campaign, folder)


def requested_of(arguments: argparse.Namespace) -> list[str]:
    """What the log asks a judge job for."""
    from pipeline.rounds import judging

    campaign = Campaign.at(arguments.campaign)
    return judging.requested(campaign, campaign.round(arguments.round))


def has_submitted_judge(arguments: argparse.Namespace) -> bool:
    """Submit the judge job that a meta stage asked for, if it did, and a meta job after it. Raises as `judging.submit`."""
    from pipeline.rounds import judging

    campaign = Campaign.at(arguments.campaign)
    ids = judging.submit(campaign, campaign.round(arguments.round))
    if ids:
        print(
            f"judge job {ids['judge_job_id']} judges {', '.join(ids['judges'])}; meta job {ids['meta_job_id']} decides after it"
        )
    return ids is not None
