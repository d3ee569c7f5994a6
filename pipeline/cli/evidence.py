"""`evidence`: start the studies of the decision rule (`studies/`). No campaign freezes them, and no module imports them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from pipeline.campaign.errors import NotFound
from pipeline.campaign.layout import CODE_ROOT
from pipeline.cli.arguments import Commands


def add(commands: Commands) -> None:
    """Declare the command."""
    sub = commands.add(
        "evidence", evidence_verb, "Measure how good the decision rule is, or judge a table of scores by it."
    )
    sub.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="WORDS",
        help="simulate, campaigns, replay or nulls; `evidence simulate --help` and so on explain each.",
    )  # fmt: skip


def evidence_verb(arguments: argparse.Namespace) -> int:
    """Run `python -m studies` with the words that follow. Raises NotFound in a campaign's frozen code, which has no studies."""
    if not (CODE_ROOT / "studies").is_dir():
        raise NotFound(f"{CODE_ROOT} has no folder studies/", "Run `evidence` from a checkout of the project")
    command = [sys.executable, "-m", "studies", *(arguments.words or ["--help"])]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CODE_ROOT)}).returncode
