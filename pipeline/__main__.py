"""The commands: `python -m pipeline VERB`. Each stage takes a campaign's folder, and each command ends with what to type next.

    round DIR [HYDRA OVERRIDES]    make the campaign if it is not there; freeze the next round, run or submit it
    worker DIR ROUND ARM           one arm              meta DIR [ROUND]      aggregate, decide, write the next overrides
    reference DIR ROUND            its reference, beside the arms
    status DIR, logs DIR ARM       what is going on     cancel, rerun, close, pause, resume, gc DIR
    plan-memory, doctor [HYDRA OVERRIDES]               image build|verify|show
    board status|push|score|finalists DIR               the external target: what was sent, send, type a score
    report DIR [ROUND]                                  the one page of a decision
    audit DIR|BUNDLE                                    check it as an outsider would; --export a bundle
    evidence simulate|replay|nulls                      how far verdicts can be believed; a table of scores judged

Exit codes: 0 done, 1 the work failed, 2 usage or configuration, 3 refused by the constitution, 4 integrity, 75 interrupted with the
state saved (start it again), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import audit_verbs, board_verbs, evidence_verbs, image_verbs, page_verbs, status_verbs, verbs
from pipeline.errors import ConfigError, PipelineError
from pipeline.layout import Campaign, read_json, whose
from pipeline.verbs import newest_frozen

AS_FROZEN = ("round", "campaign", "cancel", "rerun", "chain", "pause", "report", "resume")
"""What acts on a campaign, or derives its decisions anew, does so with the code that it was frozen with. Stages and `close` go further: into
a namespace of their own."""


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn expected errors into their sentence and exit code."""
    arguments = parse(argv)
    try:
        if arguments.verb in AS_FROZEN:
            from pipeline import frozen

            frozen.act_as_frozen(Campaign.at(arguments.campaign), sys.argv[1:] if argv is None else argv)
        return int(arguments.run(arguments) or 0)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"PermissionError: {whose(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("pipeline", "substrate")):
            raise
        print(
            f"{error.name} is not there for {sys.executable}; `make setup` makes .venv/bin/python, which has it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of a command; overrides may stand before and after its options, which argparse alone refuses."""
    commands = parser()
    arguments, rest = commands.parse_known_args(argv)
    if rest and (any(item.startswith("-") for item in rest) or not hasattr(arguments, "overrides")):
        commands.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = top.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, verb=name)
        return sub

    sub = verb("init", init_verb, "Freeze a new campaign (what the first `round` does by itself).")
    sub.add_argument("campaign", type=Path)
    sub.add_argument("overrides", nargs="*", help="Hydra overrides, such as experiment=smoke recipe.num_steps=100")

    sub = verb("round", round_verb, "Freeze the next round and run it (cluster=local) or submit it to Slurm.")
    sub.add_argument("campaign", type=Path, help="folder of the campaign, made by the first round")
    sub.add_argument("overrides", nargs="*", help="Hydra overrides; after the first round only cluster=...")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="show plan and sbatch text; write nothing")
    how.add_argument("--no-submit", action="store_true", help="freeze only: for sbatch and multirun")
    how.add_argument(
        "--wait", action="store_true", help="follow until the round is closed (always so with cluster=local)"
    )
    sub.add_argument("--json", action="store_true", help="of a dry run: plan, costs and sbatch texts as one object")

    sub = verb(
        "campaign", campaign_verb, "Run rounds one after the other: here, or each submitted by the meta job before it."
    )
    sub.add_argument("campaign", type=Path)
    sub.add_argument("overrides", nargs="*", help="as of `round`")
    sub.add_argument("--rounds", type=int, default=0, help="stop after this round; default: the constitution's budget")

    sub = verb("worker", worker_verb, "Run one arm of a frozen round: what each task of the array does.")
    sub.add_argument("campaign", type=Path)
    sub.add_argument("round")
    sub.add_argument("arm", help="a0 to a7, or the array index")
    sub.add_argument("--plan", metavar="SHA256", help="refuse unless the frozen plan has this digest")

    sub = verb("meta", meta_verb, "Aggregate a round's arms, decide, write the next round's overrides.")
    sub.add_argument("campaign", type=Path)
    sub.add_argument("round", nargs="?", help="default: the newest")

    sub = verb(
        "reference", reference_verb, "Judge the reference on a round's fresh items: what a job beside the array does."
    )
    sub.add_argument("campaign", type=Path)
    sub.add_argument("round")

    verbs.add(verb)
    evidence_verbs.add(verb)
    board_verbs.add(verb)
    page_verbs.add(verb)
    audit_verbs.add(verb)

    sub = verb(
        "plan-memory",
        plan_memory_verb,
        "Memory a rank, checkpoints, hours and money of a configuration; builds nothing.",
    )
    sub.add_argument("overrides", nargs="*", help="Hydra overrides, such as experiment=nano_30b cluster=slurm_pyxis")
    sub.add_argument("--campaign", type=Path, help="take tokens per second from what its rounds measured")
    sub.add_argument("--json", action="store_true")
    image_verbs.add(verb)
    status_verbs.add(verb)
    return top


def init_verb(arguments: argparse.Namespace) -> None:
    from pipeline.init import init

    init(Campaign.at(arguments.campaign), arguments.overrides)
    print(f"campaign {arguments.campaign} is frozen\nnext: python -m pipeline round {arguments.campaign}")


def round_verb(arguments: argparse.Namespace) -> int | None:
    from pipeline import launch, report
    from pipeline.init import init

    campaign, name = Campaign.at(arguments.campaign), shown(arguments)
    if arguments.json and not arguments.dry_run:
        raise ConfigError(
            "--json goes with --dry-run", f"What came of a round: `python -m pipeline report {name} --json`"
        )
    if arguments.dry_run:
        report.show_dry_run(campaign, arguments.overrides, as_json=arguments.json)
        if arguments.json:
            return None
        print(f"next: python -m pipeline round {' '.join([name, *map(shlex.quote, arguments.overrides)])}")
        return None
    if not campaign.folder.exists():
        init(campaign, arguments.overrides)
        print(f"campaign {name} is frozen (image, code, constitution, commitments)")
    folder = launch.freeze(campaign, launch.next_round(campaign), arguments.overrides)
    report.show_plan(folder)
    if arguments.no_submit:
        for stages in launch.arrays(campaign, folder):
            indices = ",".join(stage[3].removeprefix("a") for stage in stages)
            print(f"next: sbatch --array={indices} slurm/round.sbatch {name} {stages[0][2]}")
        print(f"then: sbatch --dependency=afterany:ID[:ID] slurm/meta.sbatch {name} {folder.name}")
        return None
    if launch.is_local(folder):
        return report.run_local(name, campaign, folder)
    began = time.monotonic()
    record = launch.submit(campaign, folder)
    print(
        f"submitted in {time.monotonic() - began:.2f} s: arrays {record['array_job_ids']}, meta {record['meta_job_id']}"
    )
    print(f"next: python -m pipeline status {name}")
    return report.follow_slurm(name, campaign, folder) if arguments.wait else None


def campaign_verb(arguments: argparse.Namespace) -> int | None:
    """`round` with campaign.auto; where it runs on this machine, again and again until the last round is closed."""
    from pipeline import constitution, launch

    arguments.overrides = [*arguments.overrides, "campaign.auto=true", f"campaign.rounds={arguments.rounds}"]
    arguments.dry_run = arguments.no_submit = arguments.wait = arguments.json = False
    campaign = Campaign.at(arguments.campaign)
    last = min(arguments.rounds or constitution.load().num_rounds, constitution.load().num_rounds)
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


def worker_verb(arguments: argparse.Namespace) -> None:
    from pipeline import frozen

    campaign = Campaign.at(arguments.campaign)
    frozen.run_frozen_code(campaign)
    from pipeline import nodes, worker

    arm = f"a{arguments.arm}" if arguments.arm.isdigit() else arguments.arm
    if nodes.task_number() > 0:
        nodes.help_with(campaign, campaign.round(arguments.round), arm)
        return
    attempt = worker.work(campaign, campaign.round(arguments.round), arm, arguments.plan)
    print(
        f"{arguments.round}/{arm} "
        + (f"is published ({attempt.folder.name})" if attempt else "was published before; nothing to do")
    )
    print(f"next, when all arms are: python -m pipeline meta {shown(arguments)} {arguments.round}")


def reference_verb(arguments: argparse.Namespace) -> None:
    from pipeline import frozen

    campaign = Campaign.at(arguments.campaign)
    frozen.run_frozen_code(campaign)
    import signal
    import threading

    from pipeline import meta

    stop = threading.Event()
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    outcome = meta.judge_reference(campaign, campaign.round(arguments.round), stop.is_set)
    print(f"the reference is {outcome.status} for {arguments.round}; meta takes it up")


def meta_verb(arguments: argparse.Namespace) -> int:
    from pipeline import frozen

    campaign = Campaign.at(arguments.campaign)
    frozen.run_frozen_code(campaign)
    from pipeline import meta

    folder = campaign.round(arguments.round or newest_frozen(campaign))
    decision = meta.close(campaign, folder, tell=print)
    print(f"{folder.name}: {decision.state}" + (f", kept {decision.kept}" if decision.kept else ""))
    for reason in decision.reasons:
        print(f"  {reason}")
    if decision.state == "undecided":
        print(
            f"next: run the missing arms (python -m pipeline worker {shown(arguments)} {folder.name} aN), then meta again"
        )
        return 1
    print(f"signed head, to keep somewhere else: {read_json(folder.closed)['anchor']}")
    print(f"next: python -m pipeline round {shown(arguments)}")
    return 0


def plan_memory_verb(arguments: argparse.Namespace) -> None:
    from pipeline import report, settings
    from pipeline.campaign import check_plan_fits, check_sizes, facts_of
    from pipeline.records import NUM_ARMS

    chosen = settings.compose(arguments.overrides)
    check_sizes(chosen)
    if arguments.campaign:
        facts_of(Campaign.at(arguments.campaign))
    rounds = Campaign.at(arguments.campaign).frozen_rounds() if arguments.campaign else ()
    if arguments.json:
        print(json.dumps(report.memory_and_cost(chosen, NUM_ARMS, rounds), indent=1))
    else:
        report.show_cost(chosen, NUM_ARMS, rounds)
    check_plan_fits(chosen)
    if not arguments.json:
        known = chosen.cluster.capacity.gpu_memory_gib
        fits = "it fits" if known else "no limit is known (cluster.capacity.gpu_memory_gib)"
        print(f"{fits}; next: python -m pipeline round runs/NAME {shlex.join([*arguments.overrides, '--dry-run'])}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(1)
