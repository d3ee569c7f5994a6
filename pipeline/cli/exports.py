"""`export` and `compare`: a campaign as files for other tools, and several campaigns side by side. Both only read campaigns."""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from pathlib import Path

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.cli.arguments import Commands, add_campaign, add_json, add_round, campaign_and_round, next_command

EXAMPLES = """
examples:
  python -m pipeline export runs/demo --to exports/demo --as csv
  python -m pipeline export runs/demo --to exports/demo --as tensorboard mlflow --round r0001
  python -m pipeline export runs/demo --to exports/demo --as tensorboard --follow
  python -m pipeline export runs/demo --to exports/demo --as csv --json
"""
COMPARE_EXAMPLES = """
examples:
  python -m pipeline compare runs/first runs/second
  python -m pipeline compare runs/first runs/second runs/third --html compare.html
  python -m pipeline compare runs/first runs/second --json
"""
SHOWN = 3  # files of a form that are printed, beside its last one


def add(commands: Commands) -> None:
    """Declare the commands."""
    sub = commands.add(
        "export", export_verb, "Write a campaign's outcomes and curves as files for other tools (docs/exports.md)."
    )
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = textwrap.dedent(EXAMPLES)
    add_campaign(sub)
    sub.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="A new folder outside of the campaign, or an earlier export of it, which is renewed."
    )  # fmt: skip
    sub.add_argument(
        "--as", dest="forms", nargs="+", action="extend", required=True, metavar="FORM",
        help="The forms to write, one or several: csv, parquet, tensorboard, mlflow, wandb. `pip install 'postrain[exports]'` brings the "
        "packages that parquet, tensorboard and wandb need.",
    )  # fmt: skip
    add_round(sub, default="The default is every round.")
    sub.add_argument(
        "--follow", action="store_true", help="Go on writing the curves of the newest round for TensorBoard until it is closed, then export again."
    )  # fmt: skip
    add_json(sub)

    sub = commands.add(
        "compare", compare_verb, "Show two or more campaigns side by side; a difference between them is no claim."
    )
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = textwrap.dedent(COMPARE_EXAMPLES)
    sub.add_argument("campaigns", nargs="+", type=Path, metavar="DIR", help="The folders of two campaigns or more.")
    sub.add_argument("--html", type=Path, metavar="FILE", help="Write the page as one HTML file, too.")
    add_json(sub)


def export_verb(arguments: argparse.Namespace) -> None:
    from pipeline.exports import forms, reading
    from pipeline.exports.folder import counted

    campaign, folder = campaign_and_round(arguments, arguments.round)
    if arguments.follow and "tensorboard" not in arguments.forms:
        raise ConfigError("--follow has no effect without --as tensorboard", "Valid: --as tensorboard --follow")
    if arguments.follow and folder.closed.exists() and not arguments.json:
        print(
            f"{folder.name} is the newest round and is closed, so there is nothing to follow; begin when the next round is frozen"
        )
    read = reading.read_campaign(campaign, arguments.round)
    made = forms.export(read, arguments.to, arguments.forms)
    if arguments.follow and not folder.closed.exists():
        follow(folder, arguments)
        read = reading.read_campaign(campaign, arguments.round)
        made = forms.export(read, arguments.to, arguments.forms)
    if arguments.json:
        print(json.dumps(made, indent=1))
        return
    for form in dict.fromkeys(arguments.forms):
        *rest, last = made["forms"][form]["files"] or [None]
        for file in [*rest[:SHOWN], last] if last else []:
            print(f"{arguments.to / file['path']}: {file['holds']}")
        if rest[SHOWN:]:
            print(f"{arguments.to / form}: {counted(len(rest[SHOWN:]), 'more part')}, which README.md lists")
    if read.left_out:
        print(f"left out, because they are not decided and closed: {', '.join(read.left_out)}")
    print(f"made from the log head {read.anchor}; {shlex.quote(str(arguments.to))}/README.md says what the files are")
    print(f"next: {forms.openers(arguments.to)[arguments.forms[0]]}")


def follow(folder: Round, arguments: argparse.Namespace) -> None:
    """Write the curves of a round until it is closed."""
    from pipeline.exports import forms, tensorboard_events

    if not arguments.json:
        print(
            f"writes the curves of {folder.name} until it is closed; look with: {forms.openers(arguments.to)['tensorboard']}",
            flush=True,
        )
    tensorboard_events.Follower(folder, arguments.to / "tensorboard").follow()


def compare_verb(arguments: argparse.Namespace) -> None:
    from pipeline.exports import compare, compare_page, folder
    from pipeline.reporting import document

    campaigns = [Campaign.at(folder) for folder in arguments.campaigns]
    page = arguments.html
    if page:
        folder.refuse_inside(page, "--html")
    found = compare.compare(campaigns)
    sections = compare_page.sections(found)
    if page:
        write_file(page, document.as_html(sections))
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    print(document.as_text(sections), end="")
    first = shlex.quote(str(arguments.campaigns[0]))
    print(f"next: open {shlex.quote(str(page))} in a browser" if page else next_command("report", first))
