"""Test that docs/commands.md and `--help` agree with the parser, and that exit codes are those of the errors."""

import argparse
import os
import subprocess
import sys

import pytest

from pipeline.__main__ import EXIT_CODES, declared, main
from pipeline.campaign import errors
from pipeline.cli import show_round
from pipeline.cli.arguments import JOBS, PEOPLE
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "commands.md"
OF_JOBS = ["worker", "reference", "forward", "judge", "serve", "meta", "chain", "board local"]
CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.PipelineError)]


def synopsis(name: str, sub: argparse.ArgumentParser) -> str:
    """A command with its arguments: positional ones first, what may be left out in brackets."""
    first, then = [name], []
    for action in sub._actions:
        word = str(action.metavar or ("|".join(action.choices) if action.choices else action.dest))
        if isinstance(action, argparse._HelpAction):
            continue
        if not action.option_strings:
            first.append({None: word, "?": f"[{word}]"}.get(action.nargs, f"[{word} ...]"))
            continue
        option = action.option_strings[-1] + (f" {word}" if action.nargs != 0 else "")
        option += " ..." if action.nargs == "*" else ""
        then.append(option if action.required else f"[{option}]")
    return " ".join([*first, *then])


def page() -> str:
    """The whole of docs/commands.md."""
    groups = declared()[1].groups
    lines = [
        "# Commands",
        "",
        "Type `python -m pipeline COMMAND` in the root of a checkout; `python -m pipeline COMMAND --help` explains each argument.",
        "DIR is the folder of a campaign, such as `runs/demo`. A round has a name of r and four digits, such as `r0002`.",
        "This page is written from the parser: `RENEW_GOLDEN=1 python -m pytest tests/cli/test_commands_page.py`.",
    ]
    for group, parsers in groups.items():
        lines += ["", f"## {group.capitalize()}", ""]
        lines += [f"- `{synopsis(name, sub)}`: {sub.description}" for name, sub in parsers.items()]
    lines += ["", "## Exit codes", "", "| code | what happened | error |", "|---|---|---|"]
    for code, text in EXIT_CODES.items():
        names = ", ".join(f"`{each.__name__}`" for each in CLASSES if each.exit_code == code)
        lines.append(f"| {code} | {text} | {names} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_every_command_and_no_other():
    if os.environ.get("RENEW_GOLDEN"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), "docs/commands.md differs from the parser; it says itself how to renew it"


def test_every_exit_code_is_that_of_an_error_or_of_success_or_of_ctrl_c():
    assert {each.exit_code for each in CLASSES} == set(EXIT_CODES) - {0, 130}


@pytest.mark.parametrize("error", CLASSES, ids=lambda each: each.__name__)
def test_an_error_ends_with_its_exit_code(error, monkeypatch, capsys):
    words = {errors.Refused: ("4", "code"), errors.TrialFailed: ("kind",), errors.TargetFailed: ("kind",)}

    def fail(*_):
        raise error(*words.get(error, ()), "what came", "What to do")

    monkeypatch.setattr(show_round, "campaign_and_round", fail)
    assert main(["status", "x"]) == error.exit_code
    assert capsys.readouterr().err.endswith("what came. What to do\n")


def test_ctrl_c_ends_with_its_exit_code(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(show_round, "campaign_and_round", stop)
    assert main(["status", "x"]) == 130


def test_help_comes_fast_and_shows_two_groups_and_the_exit_codes():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert not any(name in done.stderr for name in ("hydra", "h5py", "numpy", "torch", "submitit", "rich.", "yaml"))
    _, _, groups = done.stdout.partition(f"{PEOPLE}:\n")
    people, _, rest = groups.partition(f"\n{JOBS}:\n")
    jobs, _, codes = rest.partition("\nexit codes:\n")
    starts = {group: [line[2:18].strip() for line in text.splitlines() if line[2:3].strip()] for group, text in
              (("people", people), ("jobs", jobs))}  # fmt: skip
    assert starts["jobs"] == OF_JOBS
    assert {"init", "round", "status", "report", "end", "doctor", "image", "board push"} <= set(starts["people"])
    assert [int(line.split()[0]) for line in codes.splitlines()] == list(EXIT_CODES)


def test_every_command_has_help_in_sentences():
    for group in declared()[1].groups.values():
        for name, sub in group.items():
            own = [action for action in sub._actions if not isinstance(action, argparse._HelpAction)]
            texts = [sub.description, *(action.help for action in own)]
            for text in texts:
                assert text and text[0].isupper() and text.endswith("."), f"{name}: {text}"
