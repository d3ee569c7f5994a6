"""The command line: `python -m pipeline COMMAND`. Each module of `pipeline/cli/` declares its commands; docs/commands.md lists them all."""

from __future__ import annotations

import argparse
import sys

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import explain_permission_error
from pipeline.campaign.layout import Campaign
from pipeline.cli import (
    audit,
    board,
    change_campaign,
    change_round,
    doctor_and_memory,
    evidence,
    image,
    job_stages,
    run_rounds,
    show_round,
)
from pipeline.cli.arguments import Commands

MODULES = (
    run_rounds, show_round, change_round, change_campaign, doctor_and_memory, image, audit, evidence, job_stages, board,
)  # fmt: skip
"""In the order in which the help shows what they declare."""
LISTS = ("overrides", "arms")
"""Arguments that take any number of words."""
EXIT_CODES = {
    0: "The command did its work.",
    1: "The work failed, a check found something bad, or there is too little to decide.",
    2: "The usage or the configuration is wrong, or something is not there.",
    3: "The constitution refuses it.",
    4: "A digest, a seal or a record does not match, or an audit found something.",
    75: "The work was interrupted and its state is saved: start it again.",
    93: "Several starts in a row made no progress: it is not started again by itself.",
    130: "Ctrl-C stopped it; the same command goes on from there.",
}


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn expected errors into their sentence and exit code."""
    arguments = parse(argv)
    try:
        if arguments.as_frozen:
            from pipeline.rounds import frozen_code

            frozen_code.act_as_frozen(Campaign.at(arguments.campaign), sys.argv[1:] if argv is None else argv)
        return int(arguments.run(arguments) or 0)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"PermissionError: {explain_permission_error(error)}", file=sys.stderr)
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
    """Arguments of a command; words of a list may stand before and after its options, which argparse alone refuses."""
    top, _ = declared()
    arguments, rest = top.parse_known_args(argv)
    name = next((name for name in LISTS if hasattr(arguments, name)), None)
    if rest and (name is None or any(item.startswith("-") for item in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and name:
        setattr(arguments, name, [*getattr(arguments, name), *rest])
    return arguments


def declared() -> tuple[argparse.ArgumentParser, Commands]:
    """The parser, and the commands that it has."""
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        usage="python -m pipeline COMMAND ...",
        description="Run rounds of post-training arms, judge and decide them, and show what came of it.\n"
        "`python -m pipeline COMMAND --help` says more; each command ends with what to type next.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = Commands(top)
    for module in MODULES:
        module.add(commands)
    codes = "\n".join(f"  {code:>3}  {text}" for code, text in EXIT_CODES.items())
    top.epilog = f"{commands.listing()}\n\nexit codes:\n{codes}"
    return top, commands


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(1)
