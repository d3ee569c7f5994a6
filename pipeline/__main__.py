"""The command line, `python -m pipeline COMMAND`. Each module of `pipeline/cli/` declares its commands; docs/commands.md lists them all."""

from __future__ import annotations

import argparse
import difflib
import sys

from pipeline.campaign.errors import OtherVersion, PipelineError
from pipeline.campaign.files import explain_permission_error
from pipeline.campaign.layout import Campaign
from pipeline.cli import (
    audit,
    board,
    change_campaign,
    doctor_and_memory,
    evidence,
    exports,
    image,
    job_stages,
    run_rounds,
    show_round,
)
from pipeline.cli.arguments import Commands
from pipeline.sandbox import runtime_needs

MODULES = (
    run_rounds, show_round, exports, change_campaign, doctor_and_memory, image, audit, evidence, job_stages, board,
)  # fmt: skip
"""The modules that declare commands, in the order in which the help shows them."""
LISTS = ("overrides", "arms")
"""Names of the arguments that take any number of words."""
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
    """Run the command that `argv` names. Returns its exit code; an expected error is printed to stderr as one sentence.

    argv: the words after `python -m pipeline`; those of this process by default.
    """
    arguments = parse(argv)
    try:
        if arguments.as_frozen:
            from pipeline.rounds import frozen_code

            frozen_code.act_as_frozen(Campaign.at(arguments.campaign), sys.argv[1:] if argv is None else argv)
        return int(arguments.run(arguments) or 0)
    except PipelineError as error:
        told = by_its_own_code(error, arguments, argv) if isinstance(error, OtherVersion) else error
        print(f"{type(told).__name__}: {told}", file=sys.stderr)
        return told.exit_code
    except PermissionError as error:
        print(f"PermissionError: {explain_permission_error(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("pipeline", "substrate")):
            raise
        print(
            f"{error.name} is not installed for {sys.executable}. Run `make setup` and use .venv/bin/python, which has it. "
            f"For a container, {runtime_needs.CURE}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes where this one stopped", file=sys.stderr)
        return 130


def by_its_own_code(error: OtherVersion, arguments: argparse.Namespace, argv: list[str] | None) -> PipelineError:
    """The error to tell instead where the command's campaign was frozen under other rules: which command reads it. Else `error`."""
    from pipeline.campaign import other_rules

    folder = getattr(arguments, "campaign", None)
    facts = other_rules.facts_in(folder / "log.jsonl") if folder else None
    if not folder or not facts:
        return error
    why = other_rules.other_constitution(facts) or other_rules.other_code(folder, facts)
    words = sys.argv[1:] if argv is None else argv
    return other_rules.error(folder, folder, facts, why, words) if why else error


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments of a command. The words of a list may stand before and after options, which argparse alone does not allow.

    A wrong argument raises SystemExit with code 2, as argparse does.
    """
    top, commands = declared()
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-") and words[0] not in commands.first_words:
        near = difflib.get_close_matches(words[0], commands.first_words, n=1)
        top.error(f"{words[0]!r} is no command; {f'did you mean `{near[0]}`? ' if near else ''}`--help` lists all")
    arguments, rest = top.parse_known_args(argv)
    name = next((name for name in LISTS if hasattr(arguments, name)), None)
    if rest and (name is None or any(item.startswith("-") for item in rest)):
        top.error(
            f"unrecognized arguments: {' '.join(rest)}; `python -m pipeline {words[0]} --help` has the valid ones"
        )
    if rest and name:
        setattr(arguments, name, [*getattr(arguments, name), *rest])
    return arguments


def declared() -> tuple[argparse.ArgumentParser, Commands]:
    """Build the parser. Returns it with the commands that the modules declared."""
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
