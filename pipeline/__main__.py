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
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import whose
from pipeline.campaign.layout import Campaign
from pipeline.cli import audit, board, control, evidence, image, report, status
from pipeline.cli.doctor import plan_memory_verb
from pipeline.cli.round import campaign_verb, init_verb, round_verb
from pipeline.cli.stages import meta_verb, reference_verb, worker_verb

AS_FROZEN = ("round", "campaign", "cancel", "rerun", "chain", "pause", "report", "resume")
"""What acts on a campaign, or derives its decisions anew, does so with the code that it was frozen with. Stages and `close` go further: into
a namespace of their own."""


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn expected errors into their sentence and exit code."""
    arguments = parse(argv)
    try:
        if arguments.verb in AS_FROZEN:
            from pipeline.rounds import frozen_code

            frozen_code.act_as_frozen(Campaign.at(arguments.campaign), sys.argv[1:] if argv is None else argv)
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

    control.add(verb)
    evidence.add(verb)
    board.add(verb)
    report.add(verb)
    audit.add(verb)

    sub = verb(
        "plan-memory",
        plan_memory_verb,
        "Memory a rank, checkpoints, hours and money of a configuration; builds nothing.",
    )
    sub.add_argument("overrides", nargs="*", help="Hydra overrides, such as experiment=nano_30b cluster=slurm_pyxis")
    sub.add_argument("--campaign", type=Path, help="take tokens per second from what its rounds measured")
    sub.add_argument("--json", action="store_true")
    image.add(verb)
    status.add(verb)
    return top


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(1)
