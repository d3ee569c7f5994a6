"""`evidence`: start the studies of the decision rule (`studies/`), which no campaign freezes and nothing else imports."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from pipeline.campaign.errors import NotFound
from pipeline.campaign.layout import CODE_ROOT
from pipeline.cli.arguments import Verb


def add(verb: Verb) -> None:
    """Declare the command. verb: makes a sub-parser from name, function and text."""
    sub = verb("evidence", evidence_verb, "How good the decision rule is: simulate, campaigns, replay a table, nulls.")
    sub.add_argument("words", nargs=argparse.REMAINDER, help="`evidence simulate --help` and the like show more")


def evidence_verb(arguments: argparse.Namespace) -> int:
    """Run `python -m studies` with the words that follow. Raises NotFound in the frozen code of a campaign, which has no studies."""
    if not (CODE_ROOT / "studies").is_dir():
        raise NotFound(f"{CODE_ROOT} holds no studies/", "Run `evidence` from a checkout of the project")
    command = [sys.executable, "-m", "studies", *(arguments.words or ["--help"])]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CODE_ROOT)}).returncode
