"""`report`, `export` and `compare`: a decision with its page, a campaign as files for other tools, several campaigns side by side."""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.files import write_file
from pipeline.campaign.layout import Campaign, Round
from pipeline.cli.arguments import (
    Commands,
    add_campaign,
    add_json,
    add_round,
    campaign_and_round,
    next_command,
    next_round_command,
    quoted_campaign,
)

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
        "report",
        report_verb,
        "Show what a round's decision rests on, and what would have changed it; write it as a page with figures.",
        as_frozen=True,
    )
    add_campaign(sub)
    add_round(sub, default="The default is the newest that has a decision, else the newest.")
    add_json(sub)
    sub.add_argument(
        "--campaign",
        dest="is_whole",
        action="store_true",
        help="Write the page of the whole campaign: report.html in its folder, or the FILE of --html.",
    )
    sub.add_argument(
        "--html", type=Path, metavar="FILE", help="Write the page with figures, one file that needs nothing else."
    )

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
    from pipeline.pages.page import of_sections
    from pipeline.reporting import document

    campaigns = [Campaign.at(folder) for folder in arguments.campaigns]
    page = arguments.html
    if page:
        folder.refuse_inside(page, "--html")
    found = compare.compare(campaigns)
    sections = compare_page.sections(found)
    if page:
        write_file(page, of_sections(sections))
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    print(document.as_text(sections), end="")
    first = shlex.quote(str(arguments.campaigns[0]))
    print(f"next: open {shlex.quote(str(page))} in a browser" if page else next_command("report", first))


def report_verb(arguments: argparse.Namespace) -> None:
    from pipeline.campaign.facts import read_plan
    from pipeline.campaign.log import Log
    from pipeline.config import settings
    from pipeline.decision import history
    from pipeline.reporting import document, forecast_check, page, said

    if arguments.json and (arguments.is_whole or arguments.html):
        raise ConfigError("--json prints values, and --campaign and --html write a page", "Valid: one of the two")
    if arguments.is_whole and arguments.round:
        raise ConfigError("--campaign is about all rounds, and --round about one", "Valid: one of the two")
    campaign, folder = campaign_and_round(arguments, arguments.round)
    records = Log(campaign.log).records()
    newest = history.read_history(records).decided
    if arguments.is_whole and (newest or folder.evidence.exists()):
        return write_page(arguments.html, campaign.report, lambda write: write.campaign_page(records, campaign))
    if arguments.round is None and newest:
        folder = campaign.round(newest)
    if not folder.evidence.exists():
        return report_open(folder, arguments)
    read_plan(folder)  # raises IntegrityError if plan or configuration were changed
    if arguments.html:
        return write_page(arguments.html, folder.report, lambda write: write.round_page(records, folder))
    sections = page.of_round(records, folder)
    if arguments.json:
        found = {
            "round": folder.name,
            "said": said.as_json(records, folder.name),
            "sections": list(map(asdict, sections)),
        }
        found["forecast"] = forecast_check.compare(folder, settings.load(folder.config))
        print(json.dumps(found, indent=1))
        return
    print(document.as_text(sections), end="")
    where = f"    (with figures: {folder.report})" if folder.report.exists() else ""
    print(next_round_command(arguments) + where)


def write_page(asked: Path | None, own: Path, make: Callable[[Any], str]) -> None:
    """Write a page with figures. asked: the file of --html; own: where the meta stage writes this page. make: makes it with `pages.write`."""
    from pipeline.exports.folder import refuse_inside
    from pipeline.pages import write

    if asked:
        refuse_inside(asked, "--html")
    path = asked or own
    write_file(path, make(write))
    print(f"next: open {shlex.quote(str(path))} in a browser    (it is one file and can be sent as it is)")


def report_open(folder: Round, arguments: argparse.Namespace) -> None:
    """Report how many arms have a score, for a round that no meta stage has judged yet."""
    from pipeline.execution.results import has_score

    arms = [arm.name for arm in folder.frozen_plan().arms]
    scored = [arm for arm in arms if has_score(folder.published(arm))]
    if arguments.json:
        print(json.dumps({"round": folder.name, "scored": scored, "arms": len(arms), "sections": []}, indent=1))
        return
    is_or_not = "is not decided yet" if folder.number else "holds the reference and the base and is never decided"
    print(f"{folder.name} {is_or_not}: {len(scored)} of {len(arms)} arms have a score")
    print(next_command("status", quoted_campaign(arguments), "--round", folder.name))
