"""`evidence`: combine campaigns, or start the studies of the decision rule (`studies/`), which no campaign freezes and no module imports."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.campaign.errors import NotFound
from pipeline.campaign.layout import CODE_ROOT
from pipeline.cli.arguments import Commands, add_json, next_command
from pipeline.cli.audit import add_anchor, anchors_of, printable

if TYPE_CHECKING:
    from pipeline.audit.combine import Combined

STUDIES = {
    "simulate": "Measure false alarms, false claims and power in simulated campaigns.",
    "e-values": "Measure E of the board test, and its product over several campaigns.",
    "campaigns": "Run the real plan and decision in simulated campaigns, beside four simple policies.",
    "replay": "Judge a table of scores from anywhere.",
    "nulls": "Compute the critical values of every design that ships, or of one design.",
}
"""The acts of `python -m studies`, each with what it does."""


def add(commands: Commands) -> None:
    """Declare the commands."""
    acts = commands.within("evidence", "Combine what campaigns say, or measure how good the decision rule is.")
    sub = acts.add(
        "combine", combine_verb, "Combine what several campaigns say of the target: the product of their e-values."
    )
    sub.add_argument(
        "paths", nargs="+", type=Path, metavar="BUNDLE", help="Bundles or folders of campaigns, one of each campaign."
    )
    add_anchor(sub)
    add_json(sub)
    for name, summary in STUDIES.items():
        acts.add_other(name, study_verb, summary, f"Its options: `evidence {name} --help`.")


def study_verb(arguments: argparse.Namespace) -> int:
    """Run `python -m studies` with the words that follow. Raises NotFound in a campaign's frozen code, which has no studies."""
    if not (CODE_ROOT / "studies").is_dir():
        raise NotFound(f"{CODE_ROOT} has no folder studies/", "Run `evidence` from a checkout of the project")
    command = [sys.executable, "-m", "studies", arguments.name, *arguments.words]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CODE_ROOT)}).returncode


def combine_verb(arguments: argparse.Namespace) -> None:
    from pipeline.audit import combine

    anchors = anchors_of(arguments.anchor)
    found = combine.combine(arguments.paths, anchors)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    for line in lines_of(found, len(anchors)):
        print(printable(line))
    print(next_command("audit", shlex.quote(str(arguments.paths[0])), "--rescore"))


def lines_of(found: Combined, num_anchors: int = 0) -> list[str]:
    """What `combine` prints for people, line by line. num_anchors: of the log anchors that were given, all of which hold."""
    from pipeline.audit import combine

    if all(each.target == "none" for each in found.campaigns):
        return ["None of these campaigns has an external target, so there is nothing to combine: E is 1 for each."]
    lines = [
        f"E {show(each.e_value):>10}  {each.given}: {each.campaign}, {each.round}, {each.num_scores} scores of {each.target}"
        + (f"; E of the board test, {show(each.board_e)}, is divided by {each.divisor}" if each.divisor > 1 else "")
        + (f"; {each.note}" if each.note else "")
        for each in found.campaigns
    ]
    lines.append(f"E {show(found.product):>10}  the product, under constitution {found.constitution[:16]}")
    lines.append(f"E {show(found.mean):>10}  the mean, which is an e-value whatever the campaigns share")
    claim = "in at least one of these campaigns, gains that dev and fresh agree on did not arrive on the target"
    if found.decides == "mean":
        lines.append(
            f"The mean decides, because simulations allow the product of {combine.MOST} campaigns, and of {combine.MOST_OF_ONE_TARGET} "
            "with targets of one kind."
        )
    if found.is_said:
        lines.append(f"The {found.decides} is above {found.threshold}, so it is said: {claim}.")
    else:
        lines.append(f'The {found.decides} is not above {found.threshold}, so it is not said that "{claim}".')
    lines.append(
        f"Where every gain arrives, that is said of at most {float(100 * combine.ALPHA):.0f} % of such combinations."
    )
    if num_anchors:
        lines.append(
            f"{'The anchor that was given is' if num_anchors == 1 else f'All {num_anchors} anchors that were given are'} in the logs."
        )
    if len(found.campaigns) == 1:
        lines.append("One campaign is no combination: its own board test has sharper critical values for it.")
    return [*lines, *found.shared, *combine.DOES_NOT_SAY]


def show(value: Decimal) -> str:
    """An e-value in four digits."""
    return f"{value:.4g}"
