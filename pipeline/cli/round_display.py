"""What `round` prints: the plan, the arms while they run, then scores, times and reasons, and what to type next."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.facts import facts_of, read_plan
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.records import Decision, Outcome
from pipeline.claims.assess_claims import CONFIRMATIONS, FINAL_ROUND
from pipeline.cli.arguments import jobs_of, next_command, quoted_campaign, typed
from pipeline.config import settings
from pipeline.decision import promotion
from pipeline.execution import base_weights, results
from pipeline.live import follow, view
from pipeline.reporting import status, terminal_tables
from pipeline.reporting.cost import memory_and_cost, show_cost, targets_in_words
from pipeline.rounds import freeze, launch
from pipeline.rounds.init import init
from pipeline.stats import critical_values, lifts
from pipeline.stats.design import Design

SUBMITTED = {
    "array_0": "the eight workers",
    "array_1": "with them in the first round: trains the reference recipe and judges the base",
    "reference": "judges the reference adapter on the fresh items, in the first round after array_1",
    "agent": "serves the agents' model, and is submitted first; it ends when the arms have ended",
    "meta": "decides, after all of them",
    "judge": "not submitted now: a meta job submits it where something is left to judge, and another meta job after it",
}
"""Job -> what it does and when it is submitted, in this order."""


def frozen_choices(facts: Mapping[str, Any], stop_after: int = 0) -> list[str]:
    """What a campaign froze about its claims and tests, and what follows for it, in lines.

    facts: of campaign.yaml. stop_after: the number of rounds that the campaign will run; 0 where nobody said.
    """
    design, confirmation = Design(**facts["design"]), facts["confirmation"]
    num = design.rounds
    simulated = [each.rounds for each in critical_values.GRID if each == replace(design, rounds=each.rounds)]
    ships = (
        f"for {' and '.join(map(str, sorted(simulated)))} rounds of this design"
        if simulated
        else "for no number of rounds of this design"
    )
    lines = [
        f"an improvement is confirmed by {confirmation}: {CONFIRMATIONS[confirmation]} (policy.confirmation)",
        f"error rates are for a campaign of {num} round{'' if num == 1 else 's'} (policy.rounds); simulated critical values ship {ships}",
        f"critical values: {facts['critical_source']}",
    ]
    if facts["choice"] != promotion.VALUE:
        lines.insert(0, f"what is kept follows policy.choice={facts['choice']}: {promotion.CHOICES[facts['choice']]}")
    if facts["critical_source"].startswith("bounds"):
        cost = (
            "; bounds cost power, the board test half of its own, and `evidence combine` may count the campaign as E = 1"
            if design.board_rows
            else "; bounds cost power"
        )
        lines[-1] += cost
    if num == 1:
        lines.append("no improvement can be claimed: that takes two rounds")
    return [*lines, *early_end(facts, stop_after)]


def early_end(facts: Mapping[str, Any], stop_after: int) -> list[str]:
    """The line that says what a campaign loses which ends after `stop_after` rounds, before its frozen number; none where it does not."""
    num, confirmation = facts["design"]["rounds"], facts["confirmation"]
    if not 0 < stop_after < num:
        return []
    spent = round(100 * stop_after * (stop_after - 1) / (num * (num - 1)))
    never = (
        "its one test for claims, in the last round, never comes"
        if confirmation == FINAL_ROUND
        else f"it will have spent {spent} % of its level for claims"
    )
    return [
        f"this campaign ends after round {stop_after}, and its error rates are for {num} rounds, so {never}; a new campaign with "
        f"policy.rounds={stop_after} has them for what it runs"
    ]


def show_plan(folder: Round, *, targets: bool = True) -> None:
    """Print a frozen round's arms, and how many modules its LoRA targets match."""
    frozen, digest = read_plan(folder)
    num_rounds = facts_of(folder.campaign)["design"]["rounds"]
    print(f"round {folder.name} of {num_rounds}, plan {digest[:16]}:")
    for arm in frozen.arms:
        moved = ", ".join(f"{key}={value}" for key, value in arm.overrides) or f"repeats the {arm.replicate_of} recipe"
        print(f"  {arm.name}  {arm.role:<9}  {moved}")
    if targets:
        print(f"  {targets_in_words(settings.load(folder.config))}")


def show_dry_run(campaign: Campaign, overrides: Sequence[str], *, as_json: bool = False) -> str:
    """Print plan, costs and, for a Slurm site, the sbatch texts of the next round, made in a temporary copy: the campaign stays as it is.

    Returns what `round` would refuse on this machine and a draft does without, empty if nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        draft = Campaign.at(Path(folder, campaign.name))
        if campaign.folder.exists():
            shutil.copytree(
                campaign.folder, draft.folder, ignore=shutil.ignore_patterns("a?", "*.h5", "*.sqsh", "meta")
            )
        else:
            init(draft, overrides, is_draft=True)
        frozen = freeze.freeze(draft, freeze.next_round(draft), overrides, is_draft=True)
        chosen = settings.load(frozen.config)
        refusal = absent_weights(campaign, chosen)
        num_arms, earlier = len(frozen.frozen_plan().arms), campaign.frozen_rounds()
        written = {path.stem: path for path in sorted(frozen.slurm_dir.glob("*.sbatch"))}
        texts = {
            written[name].name: written[name].read_text().replace(str(draft.folder), str(campaign.folder))
            for name in sorted(written, key=list(SUBMITTED).index)
        }
        if as_json:
            costs = memory_and_cost(chosen, num_arms, earlier, facts_of(draft)["settled"])
            choices = {
                name: facts_of(draft)[name]
                for name in ("choice", "confirmation", "design", "critical_source", "settled")
            }
            plan = frozen.frozen_plan().to_json()
            told = {"plan": plan, "frozen": choices, "costs": costs, "sbatch": texts, "refusal": refusal}
            print(json.dumps(told, indent=2))
            return refusal
        show_plan(frozen, targets=False)  # the costs have them
        for line in frozen_choices(facts_of(draft), chosen.campaign.rounds):
            print(line)
        proposer = chosen.policy.proposals
        if proposer.kind != "none":
            print(f"the round would also ask {proposer.kind} ({proposer.mode}) for proposals; a dry run asks nobody")
        show_cost(chosen, num_arms, earlier, facts_of(draft)["settled"])
        if chosen.cluster.kind == "local":
            print("the stages run on this machine (cluster=local), so sbatch gets nothing")
        for name, text in texts.items():
            print(f"\n--- {name}: {SUBMITTED[Path(name).stem]}\n{text}")
        if unread := base_weights.unused(chosen.cluster.weights_dir, chosen.to_dict()["model"]):
            print(f"note: {unread}")
        return refusal


def absent_weights(campaign: Campaign, chosen: settings.Settings) -> str:
    """Why `round` would refuse the folder of the weights on this machine, on which a dry run needs none; empty if it would not."""
    if campaign.frozen.exists() or not base_weights.are_outside(chosen.to_dict()["model"]):
        return ""
    try:
        base_weights.published_files(chosen.cluster.weights_dir)
    except PipelineError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_local(name: str, campaign: Campaign, folder: Round) -> int:
    """Run a round on this machine. A terminal shows a live table; elsewhere each change is a line. Returns the exit code."""
    began, shown = time.time(), rounds_of(campaign, folder)
    earlier = status.worked_seconds(shown, before=began)
    with follow.follow(lambda: view.of_round(campaign, folder)) as watch:
        launch.run_here(campaign, folder, watch)
    return report_end(name, campaign, folder, time.time() - began, earlier)


def follow_slurm(name: str, campaign: Campaign, folder: Round) -> int:
    """Follow a submitted round by its files until the meta job has closed it or left it undecided. Returns the exit code."""
    began = time.time()
    with follow.follow(lambda: view.of_round(campaign, folder)) as watch:
        while not folder.closed.exists():
            if (
                folder.evidence.exists()
                and folder.evidence.stat().st_mtime > began
                and not folder.decisions_dir.exists()
            ):
                break
            watch()
            time.sleep(1)
    return report_end(name, campaign, folder, time.time() - began)


def rounds_of(campaign: Campaign, folder: Round) -> list[Round]:
    """r0000 beside r0001, whose jobs run together; else the round alone."""
    return [campaign.round("r0000"), folder] if folder.number == 1 else [folder]


def report_end(name: str, campaign: Campaign, folder: Round, seconds: float, earlier: float = 0.0) -> int:
    """Print what was decided, where the time went, and what to type next. Returns 0 if the round is closed, else 1.

    name: the campaign's folder, quoted for a shell. seconds: how long this command followed it. earlier: how long arms worked before that,
    if the round was interrupted and goes on.
    """
    totals = status.breakdown(rounds_of(campaign, folder))
    resumed = f" ({earlier:.0f} s before it was interrupted, {seconds:.0f} s since)" if earlier else ""
    print(
        f"\n{folder.name} took {earlier + seconds:.0f} s{resumed}; of the workers' time: "
        + ", ".join(f"{n} {t:.0f} s" for n, t in totals.items())
    )
    if folder.evidence.exists():
        show_scores(campaign, folder)
    if not folder.closed.exists():
        print(f"{folder.name} is undecided; `{typed('meta', name, '--round', folder.name)}` says why")
        return 1
    for line in read_json(sorted(folder.decisions_dir.glob("*.json"))[-1])["reasons"]:
        print(f"  {line}")
    print(f"the report is {folder.report}; to read it here: {typed('report', name, '--round', folder.name)}")
    print(f"keep this anchor of the signed log outside of this machine: {read_json(folder.closed)['anchor']}")
    print(f"{next_command('round', name)}    (reads {campaign.overrides(f'r{folder.number + 1:04d}').name})")
    return 0


def show_scores(campaign: Campaign, folder: Round) -> None:
    """Print the accuracies of every arm, the reference and the base, and what the reference gained over the base."""
    base = results.read_arm(campaign.round("r0000"), read_plan(campaign.round("r0000"))[0], "a1", "base")
    outcomes = [Outcome(**fields) for fields in read_json(folder.evidence)["outcomes"]]
    Console(width=120).print(terminal_tables.scores([base, *outcomes]))
    print("The columns of families are % of fresh items, and of dev items for the base.")
    if base.scored("dev") and outcomes[0].scored("dev"):
        print(
            f"reference over base on dev: {terminal_tables.lift_in_words(lifts.paired_lift(outcomes[0], base, 'dev', 'base'))}"
        )


def write_pages(folder: Round) -> None:
    """Write the pages of a round that has evidence and of its campaign, and print a line about each that could not be written."""
    try:
        from pipeline.pages import write

        lines = write.write_pages(folder) if folder.evidence.exists() else []
    except Exception as error:  # a page must not end a stage, not even where its library is missing
        lines = [f"no page could be written: {error!r}"]
    for line in lines:
        print(line)


def print_decision(folder: Round, decision: Decision) -> None:
    """Print what was decided, why, and the anchor of the signed head."""
    print(f"{folder.name} is {decision.state}" + (f"; {decision.kept} is kept" if decision.kept else ""))
    for reason in decision.reasons:
        print(f"  {reason}")
    if folder.closed.exists():
        print(f"keep this anchor of the signed log outside of this machine: {read_json(folder.closed)['anchor']}")


def print_next_round(started: Any, arguments: argparse.Namespace) -> None:
    """Print what was submitted, or why nothing was. started: what `chain.chain` returned."""
    if isinstance(started, str):
        print(f"no round was submitted: {started}")
    else:
        print(f"{started['round']} is submitted: {jobs_of(started)}")
    print(next_command("status", quoted_campaign(arguments)))
