"""`report`: the one page of a decision, for a terminal or a program; the meta stage leaves the same as report.html in the round's folder."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

from pipeline.campaign.layout import Round
from pipeline.cli.arguments import Verb, found


def add(verb: Verb) -> None:
    """Declare the command. verb: makes a sub-parser from name, function and text."""
    sub = verb(
        "report", report_verb, "What a round's decision rests on, which article decided, what would have changed it."
    )
    sub.add_argument("campaign", type=Path)
    sub.add_argument("round", nargs="?", help="default: the newest that has a decision, else the newest frozen")
    sub.add_argument("--json", action="store_true")


def report_open(folder: Round, arguments: argparse.Namespace) -> None:
    """Of a round that no meta stage has looked at there is nothing to show yet but how far it is."""
    from pipeline.execution.results import status_of

    arms = [arm.name for arm in folder.frozen_plan().arms]
    scored = [arm for arm in arms if status_of(folder.published(arm)) == "completed"]
    if arguments.json:
        print(json.dumps({"round": folder.name, "scored": scored, "arms": len(arms), "sections": []}, indent=1))
        return
    print(f"{folder.name} is not decided yet: {len(scored)} of {len(arms)} arms have a score")
    print(f"next: python -m pipeline status {shlex.quote(str(arguments.campaign))} {folder.name}")


def report_verb(arguments: argparse.Namespace) -> None:
    from pipeline.campaign.facts import read_plan
    from pipeline.campaign.log import Log
    from pipeline.config import settings
    from pipeline.decision import history
    from pipeline.reporting import document, page

    campaign, folder = found(arguments, arguments.round)
    records = Log(campaign.log).records()
    newest = history.read_history(records).decided
    if arguments.round is None and newest:
        folder = campaign.round(newest)
    if not folder.evidence.exists():
        return report_open(folder, arguments)
    read_plan(folder)  # whose digest the configuration must have: the page's fence rests on it
    shown = page.of_log(records, folder.name, settings.load(folder.config).model.name)
    if arguments.json:
        sections = [{name: value for name, value in asdict(section).items() if name != "svg"} for section in shown]
        print(json.dumps({"round": folder.name, "sections": sections}, indent=1))
        return
    print(document.as_text(shown), end="")
    where = f"    (with figures: {folder.report})" if folder.report.exists() else ""
    print(f"next: python -m pipeline round {shlex.quote(str(arguments.campaign))}{where}")
